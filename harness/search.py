"""Which level to try next, and when to stop. Pure: what was found at each level goes in, the next level comes out.

A level is a whole number: a burst's size, or a rate in units of `RATE_UNIT_PER_S`. The search climbs. It doubles while
levels pass; below the first that does not, it climbs again in equal steps; above the first step that does not pass it
looks only for the lowest that fails. Nothing above a level that did not pass is ever claimed to pass: that order is
what keeps the error small. Each of the two climbs can claim too much only at the first level above the true limit, so
two tests at most, each wrong with probability alpha, decide it (docs/methodology.md). What one level proves is
`analysis/bursts`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from harness.analysis.slo import Status
from harness.sample import Endpoint

ENDPOINTS = (Endpoint.CREATE, Endpoint.SPAWN, Endpoint.SNAPSHOT)
"""The endpoints that have limits to be found."""

TRIALS_MIN = 10
"""Trials of a level below which nothing is answered: the spread between fewer cannot be estimated."""

TRIALS_MAX = 1_000
RATE_MAX_PER_S = 5_000.0
"""Of a capacity search: what one generator on a core of its own sends without being late, and some more."""

BURST_MAX = 4_096
"""Largest burst, and so the most connections: each request has one of its own, and one process can hold so many."""

STEPS = 4
"""Equal steps in which the gap between the last level that passed and its double is climbed: 25 % to 14 % of a level.
Finer steps cost more requests than they tell: with twenty trials and trials that differ by 10 %, the bounds of two
levels 10 % apart overlap."""

FIRST_BURST = 8
"""Where doubling begins: smaller bursts need many trials, and are tried only when this one does not pass."""

RATE_UNIT_PER_S = 0.1
"""Of a capacity search: level 85 is 8.5 requests a second."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ladder:
    """Where a search may go."""

    lowest: int  # where the second climb begins when even `first` does not pass
    first: int  # where doubling begins
    most: int  # never beyond
    steps: int = STEPS

    def __post_init__(self) -> None:
        if not 1 <= self.lowest <= self.first <= self.most or self.steps < 1:
            raise ValueError(f"a ladder needs 1 <= lowest <= first <= most and a step, not {self}")

    def step_at(self, level: int) -> int:
        """Return the width of a refinement step in the octave that holds `level` (at least `first`)."""
        floor = self.first
        while 2 * floor <= level:
            floor *= 2
        return max(1, floor // self.steps)


@dataclasses.dataclass(frozen=True, slots=True)
class Bracket:
    """What the levels tried so far come to."""

    highest_pass: int | None  # every level on the way up to it passed; null when none did
    lowest_fail: int | None  # null when none failed
    next_level: int | None  # to be tried now; null when the search is over

    @property
    def found(self) -> bool:
        """Say whether the limit is held from both sides."""
        return self.highest_pass is not None and self.lowest_fail is not None


def consider(ladder: Ladder, tried: Mapping[int, Status]) -> Bracket:
    """Return what `tried` comes to and which level is next. The same findings always give the same answer."""
    passed: int | None = None
    for ceiling in _doubling(ladder):
        status = tried.get(ceiling)
        if status is None:
            return Bracket(passed, None, ceiling)
        if status is not Status.PASS:
            break
        passed = ceiling
    else:
        return Bracket(passed, None, None)  # even the highest passed
    climbing = True
    for level in (*_between(ladder, passed, ceiling), ceiling, *_beyond(ladder, ceiling)):
        status = tried.get(level)
        if status is None:
            return Bracket(passed, None, level)
        if status is Status.FAIL:
            return Bracket(passed, level, None)
        climbing = climbing and status is Status.PASS
        if climbing:
            passed = level
    return Bracket(passed, None, None)


def together(statuses: Iterable[Status]) -> Status:
    """Return what several checks of one level prove together: PASS only if every one passes, FAIL if any fails.

    A level that violates some check passes that check with probability alpha at most, so it passes all of them no more
    often (intersection-union test, Berger 1982): demanding more checks needs no correction. A false FAIL can come from
    any of them, so with k checks each is to be tested at alpha / k on that side.
    """
    found = set(statuses) - {Status.NOT_APPLICABLE}
    if Status.FAIL in found:
        return Status.FAIL
    return Status.PASS if found == {Status.PASS} else Status.INCONCLUSIVE


def burst_ladder(most: int) -> Ladder:
    """Return the ladder of a search for the highest burst, up to `most` requests at once."""
    return Ladder(lowest=1, first=min(FIRST_BURST, most), most=most)


def rate_ladder(lowest_per_s: float, most_per_s: float) -> Ladder:
    """Return the ladder of a capacity search; raises ValueError for rates below the unit or in the wrong order."""
    lowest, most = level_of(lowest_per_s), level_of(most_per_s)
    return Ladder(lowest=lowest, first=lowest, most=most)


def capacity_ladder(first_per_s: float, most_per_s: float) -> Ladder:
    """Return the ladder of `capacity`: from `first_per_s` upward, and from an eighth of it if not even that passes."""
    first, most = level_of(first_per_s), level_of(most_per_s)
    return Ladder(lowest=max(1, first // 8), first=first, most=most)


def level_of(rate_per_s: float) -> int:
    """Return the level of a capacity search that stands for a rate."""
    return round(rate_per_s / RATE_UNIT_PER_S)


def rate_per_s(level: int) -> float:
    """Return the rate that a level of a capacity search stands for, in requests a second."""
    return round(level * RATE_UNIT_PER_S, 9)


def _doubling(ladder: Ladder) -> Iterator[int]:
    """Return first, twice that and so on, the last cut to `most`."""
    level = ladder.first
    while level < ladder.most:
        yield level
        level *= 2
    yield ladder.most


def _between(ladder: Ladder, passed: int | None, ceiling: int) -> list[int]:
    """Return the levels below the ceiling that are climbed in equal steps, from the last that passed or the lowest."""
    floor = ladder.lowest if passed is None else passed
    rungs = {floor + (ceiling - floor) * step // ladder.steps for step in range(ladder.steps)}
    return sorted(rung for rung in rungs if rung < ceiling and rung != passed)


def _beyond(ladder: Ladder, ceiling: int) -> Iterator[int]:
    """Return the levels above a ceiling that may itself be neither, in equal steps of each octave, up to `most`."""
    while ceiling < ladder.most:
        for step in range(1, ladder.steps + 1):
            level = ceiling + max(step, ceiling * step // ladder.steps)
            if level >= ladder.most:
                yield ladder.most
                return
            yield level
        ceiling = max(2 * ceiling, ceiling + ladder.steps)
