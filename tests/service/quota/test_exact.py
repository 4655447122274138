"""The reference itself, on cases that can be counted on the fingers."""

from __future__ import annotations

from fractions import Fraction

import pytest

from tests.service.quota.exact import ExactLimiter, excess

ONE = Fraction(1)
S = 1_000_000


def test_a_burst_passes_at_once_and_then_one_token_each_interval() -> None:
    limiter = ExactLimiter()
    waits = [limiter.take(at_s * S, [("a", ONE, 2)])[0] for at_s in (0, 0, 0, 1, 1, 3, 3, 3)]
    assert waits == [0, 0, 1, 0, 1, 0, 0, 1]


def test_a_refusal_of_one_takes_nothing_of_the_other() -> None:
    limiter = ExactLimiter()
    both = [("a", ONE, 1), ("b", ONE, 2)]
    assert [limiter.take(0, both), limiter.take(0, both), limiter.take(0, [("b", ONE, 2)])] == [[0, 0], [1, 0], [0]]


@pytest.mark.parametrize(
    ("admitted_s", "worst"),
    [
        ([], -2),
        ([0], -1),
        ([0, 0], 0),
        ([0, 0, 0], 1),
        ([0, 0, 1, 2, 3], 0),
        ([0, 0, 1, 2, 2], 1),
        ([0, 10, 20, 20, 20], 1),  # a rest is not saved up beyond the burst
    ],
)
def test_the_worst_window_is_found(admitted_s: list[int], worst: int) -> None:
    assert excess([at_s * S for at_s in admitted_s], ONE, 2) == worst
