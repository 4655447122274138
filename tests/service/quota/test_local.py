"""The buckets of one process: their share, their bound. That they decide as gcra.lua does: test_gcra."""

from __future__ import annotations

import uuid
from fractions import Fraction

import pytest

from service.quota.limits import Limit, Rate
from service.quota.local import LocalBuckets, State

RATE = (Limit.RUN_CREATION, Rate(Fraction("10.29"), 3))


class Clock:
    """Microseconds that a test sets."""

    def __init__(self) -> None:
        self.now_us = 0

    def __call__(self) -> int:
        return self.now_us


@pytest.mark.parametrize(("percent", "admitted"), [(100, 3 + 10), (50, 3 + 5), (1, 3)])
def test_a_process_gives_the_burst_and_its_part_of_the_rate(percent: int, admitted: int) -> None:
    clock, workspace_id, taken = Clock(), uuid.uuid4(), 0
    buckets = LocalBuckets(percent, monotonic_us=clock)
    for ms in range(1_001):  # a greedy client, for a second
        clock.now_us = ms * 1_000
        taken += not buckets.take(workspace_id, [RATE])[0].refused
    assert taken == admitted


def test_what_is_told_is_what_gcra_lua_tells() -> None:
    clock, workspace_id = Clock(), uuid.uuid4()
    buckets = LocalBuckets(monotonic_us=clock)
    assert [buckets.take(workspace_id, [RATE])[0] for _ in range(4)] == [
        State(2, 0, 0), State(1, 0, 0), State(0, 97_182, 0), State(0, 97_182, 1)
    ]  # fmt: skip


def test_of_too_many_buckets_the_one_that_was_used_longest_ago_goes() -> None:
    buckets, (first, second, third) = LocalBuckets(most=2, monotonic_us=Clock()), [uuid.uuid4() for _ in range(3)]
    once = [(Limit.RUN_CREATION, Rate(Fraction(1), 1))]
    for workspace_id in (first, second, first, third):  # the refused request used it, too
        buckets.take(workspace_id, once)
    assert len(buckets) == 2
    assert [buckets.take(workspace_id, once)[0].refused for workspace_id in (first, third, second)] == [1, 1, 0]
