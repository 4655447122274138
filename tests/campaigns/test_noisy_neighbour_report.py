"""The judge of the neighbour campaign finds what is wrong: each test breaks a sound course of things in one way."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest

from service.quota.limits import Rate
from tests.campaigns.noisy_neighbour_report import Kind, Measured, Window, page

TURNS_S = [number / 41 for number in range(41 * 6)]


def sound() -> Measured:
    """Return one window of each kind, six seconds long."""
    windows = [
        Window(Kind.ALONE, 6.0, [10.0] * 90 + [20.0] * 10, [], 0, 0),
        Window(Kind.WITH, 6.0, [11.0] * 90 + [30.0] * 10, TURNS_S, 492, 246),
        Window(Kind.WITHOUT, 6.0, [200.0] * 100, [number / 2000 for number in range(12_000)], 12_000, 12_000),
    ]
    statuses = {"COMPLETED": 50}, {"COMPLETED": 410}
    return Measured(windows, Rate(Fraction(41), 41), 4100.0, (50, 410), statuses, 0)


def change(measured: Measured, number: int, **changes: Any) -> None:
    measured.windows[number] = measured.windows[number]._replace(**changes)


def lose(measured: Measured) -> None:
    measured.statuses = ({"COMPLETED": 50}, {"COMPLETED": 409, "COMPLETED after 59 steps": 1})


SPOILT: list[tuple[Callable[[Measured], None], list[str]]] = [
    (lambda measured: None, []),
    (lose, ["of 410 accepted runs of the neighbour: {'COMPLETED': 409, 'COMPLETED after 59 steps': 1}"]),
    (
        lambda measured: change(measured, 1, turns_s=[0.0] * 329),
        ["the neighbour had 329 turns, 328 at most were due"],
    ),
    (lambda measured: change(measured, 1, claims=1000), ["1000 claims for 246 turns of the neighbour"]),
    (
        lambda measured: change(measured, 1, waits_ms=[50.0] * 100),
        ["p95 beside the neighbour is 2.50 times that alone"],
    ),
]


@pytest.mark.parametrize(("spoil", "faults"), SPOILT)
def test_each_fault_is_found_and_nothing_else(spoil: Callable[[Measured], None], faults: list[str]) -> None:
    measured = sound()
    spoil(measured)
    assert measured.faults() + measured.misses() == faults


def test_the_page_shows_every_window_and_what_was_found() -> None:
    shown = page(sound())
    assert all(f"| {kind} | 6.0 |" in shown for kind in Kind)
    assert "is 1.50 times that alone at p95" in shown
    assert "had 41.00/s with a rate of 41/s, in 2.00 claims for each turn; with its rate lifted 2,000/s" in shown
    assert "Faults and missed aims:\n\n- none\n" in shown
