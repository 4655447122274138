"""What an exchange of questions says about another clock, and how far it may be wrong."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.clocks import Exchange, Offset, best_of, measure_offset

MS = 1_000_000
ways = st.tuples(st.integers(0, 50 * MS), st.integers(0, 50 * MS))  # there and back


def exchange(asked_ns: int, offset_ns: int, there_ns: int, back_ns: int) -> Exchange:
    return asked_ns, asked_ns + there_ns + offset_ns, asked_ns + there_ns + back_ns


def test_the_shortest_round_trip_counts() -> None:
    slow, quick = exchange(0, 7 * MS, 30 * MS, 1 * MS), exchange(50 * MS, 7 * MS, 2 * MS, 1 * MS)
    assert best_of([slow, quick, slow]) == Offset(7 * MS + MS // 2, 3 * MS // 2, 3)


@given(st.integers(-(10**15), 10**15), st.integers(0, 10**15), st.lists(ways, min_size=1, max_size=20))
def test_the_truth_is_within_the_uncertainty_however_the_ways_share_the_time(
    offset_ns: int, begin_ns: int, trips: list[tuple[int, int]]
) -> None:
    found = best_of([exchange(begin_ns, offset_ns, *trip) for trip in trips])
    assert abs(found.ns - offset_ns) <= found.uncertainty_ns
    assert found.uncertainty_ns == (min(sum(trip) for trip in trips) + 1) // 2


async def test_questions_are_asked_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    here: Iterator[int] = iter([0, 10, 100, 104, 200, 250])
    there = iter([1_005, 1_102, 1_225])
    monkeypatch.setattr("time.monotonic_ns", lambda: next(here))

    async def ask() -> int:
        return next(there)

    assert await measure_offset(ask, round_trips=3) == Offset(1_000, 2, 3)
