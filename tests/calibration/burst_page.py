"""What the calibration of the burst limits measures, and the page that says it."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from harness.analysis.slo import Status
from harness.machine import commit, versions
from tests.calibration.burst_study import (
    AtTheLimit,
    Result,
    at_the_limit,
    doubling_and_bisection,
    judge_level,
    search,
    worlds,
)
from tests.calibration.burst_world import World, world_with_limit
from tests.calibration.effort import Bar, bar_list

SEED = 2026
SEARCHES = 500  # of the claim itself
SEARCHES_EACH = 200  # of each row of the table by spread
REPEATS = 1_000  # of each level at the limit
PLAIN_SPREADS = (0.02, 0.05, 0.1)
TRIALS = 20


@dataclasses.dataclass(frozen=True)
class Measured:
    """Everything that the page shows."""

    ours: list[Result]
    to_step: list[Result]
    to_one: list[Result]
    by_spread: dict[tuple[float, int], list[Result]]
    at_limit: list[AtTheLimit]
    stalls: dict[tuple[float, int], float]

    @property
    def bars(self) -> list[Bar]:
        """Return what must hold, with what was found."""
        n = len(self.ours)
        held, over, near = (count(self.ours, each) for each in (contains, overclaims, within_a_step))
        ratio = mean_requests(self.ours) / mean_requests(self.to_step)
        worst = max(level.false_pass for level in self.at_limit if level.trials == TRIALS)
        return [
            Bar(f"the bracket contains the true limit in {held} of {n} searches (at least 95 %)", held >= 0.95 * n),
            Bar(f"{over} of {n} searches claim too much (at most 5 %)", over <= 0.05 * n),
            Bar(f"{near} of {n} searches end within one refinement step (at least 90 %)", near >= 0.9 * n),
            Bar(f"they take {ratio:.2f} of the requests of doubling and bisection to the same step", ratio < 1.0),
            # Of 1,000 repeats of an event with 5 %, more than 66 are seen in 1 % of cases.
            Bar(f"right at the limit, at most {worst:.1%} of levels with {TRIALS} trials pass wrongly", worst <= 0.05),
        ]


def contains(result: Result) -> bool:
    """Whether the limit lies in the bracket."""
    return result.contains


def overclaims(result: Result) -> bool:
    """Whether a burst was said to pass that does not."""
    return result.overclaimed


def within_a_step(result: Result) -> bool:
    """Whether there is a bracket, and its highest pass is at most one step from the highest step that truly passes."""
    return result.found and result.steps_off <= 1


def count(results: Sequence[Result], holds: Callable[[Result], bool]) -> int:
    """Return for how many results something holds."""
    return sum(map(holds, results))


def mean_requests(results: Sequence[Result]) -> float:
    """Return how many requests a search took on average."""
    return statistics.fmean(result.requests for result in results)


def measure_bursts() -> Measured:
    """Carry everything out; about two minutes."""
    random = np.random.default_rng(SEED)
    drawn = list(worlds(random, SEARCHES, PLAIN_SPREADS))
    by_spread = {}
    for spread in (0.02, 0.05, 0.1, 0.2, 0.3):
        some = list(worlds(random, SEARCHES_EACH, (spread,)))
        for trials in (10, 20, 40):
            by_spread[spread, trials] = [search(world, random, trials) for world in some]
    levels = [
        at_the_limit(world_with_limit(limit, 2, spread, noise), random, trials, REPEATS)
        for trials in (10, 20)
        for limit in (12, 60)
        for spread, noise in ((0.05, 0.02), (0.1, 0.02), (0.1, 0.2), (0.2, 0.02), (0.2, 0.2), (0.4, 0.02), (0.4, 0.2))
    ]
    stalls = {}
    for share in (0.05, 0.1, 0.2):
        # Far below the limit but for the stalls, which alone break the requirement.
        world = World(servers=2, service_ms=1.0, spread=0.05, noise=0.05, stalls=share)
        for trials in (20, 60, 120):
            stalls[share, trials] = passing_share(world, random, trials)
    return Measured(
        [search(world, random, TRIALS) for world in drawn],
        [doubling_and_bisection(world, random, TRIALS, to_one=False) for world in drawn],
        [doubling_and_bisection(world, random, TRIALS, to_one=True) for world in drawn],
        by_spread,
        levels,
        stalls,
    )


def passing_share(world: World, random: np.random.Generator, trials: int) -> float:
    """Return how often a burst of 64 passes."""
    return statistics.fmean(judge_level(world, random, trials, 64)[0] is Status.PASS for _ in range(REPEATS))


SEARCH_HEAD = "limit in the bracket | claims too much | fails too early"
END_HEAD = "within a step | median width, steps | requests"


def page(measured: Measured) -> str:
    """Return the whole page."""
    told = versions(["numpy", "scipy"])
    return f"""# Evidence: how often a burst limit is wrong

Written by `make calibrate` (`tests/calibration/`, some two minutes of processor time) at commit
{commit() or "unknown"}; seed {SEED}, so the counts are the same everywhere with the same libraries
(numpy {told["numpy"]}, scipy {told["scipy"]}).
A fast share of it is in `make test`. What is tested and why is in [methodology.md](../methodology.md#burst-limits).

## What was shown

{bar_list(measured.bars)}

The searches have {TRIALS} trials a level, in worlds whose trials differ by {PLAIN_SPREADS[0]:.0%} to
{PLAIN_SPREADS[-1]:.0%}; where they differ by more, see [below](#by-the-spread-between-trials).

## The worlds

A synthetic server takes the requests of a burst in turn with 1, 2 or 4 servers, so that request k waits for
ceil(k / servers) services. A whole trial is slower or faster by a lognormal factor (its standard deviation is the
*spread* below), each request by another one (0.05 or 0.2), and in a third of the worlds 1 % of requests get no answer.
The true share of slow requests is a closed formula (`tests/calibration/burst_world.py`), and so is the limit. Limits
are drawn between 16 and 256, evenly over the octaves. A search is the command's own: the same ladder, the same looks.

## Searches with {TRIALS} trials a level

{len(measured.ours)} worlds of a spread of {" or ".join(f"{spread:g}" for spread in PLAIN_SPREADS)}. *Within a step*:
the highest pass is at most one refinement step from the highest step that truly meets the SLO. The rivals use the same
worlds and trials, and let a level pass when its observed p95 does, as scripts do.

| search | {SEARCH_HEAD} | {END_HEAD} |
|---|---|---|---|---|---|---|
{row("ours", measured.ours)}
{row("doubling and bisection to the same step", measured.to_step)}
{row("doubling and bisection to one request", measured.to_one)}

## By the spread between trials

{SEARCHES_EACH} worlds each. Where trials differ much, twenty of them cannot place a limit within a step:
the bracket stays right and grows wide, or one side of it is missing (*no bracket*, exit code 3). More trials mend it.

| spread | trials | {SEARCH_HEAD} | no bracket | {END_HEAD} |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(spread_row(spread, trials, results) for (spread, trials), results in measured.by_spread.items())}

## One level, right at the limit

{REPEATS:,} repeats each. *False pass* is of the first burst above the limit, *false fail* of the limit itself, which is
where either is easiest; both are to stay at 2.5 %. Beside it the two rules that were not taken: Student's t on the
trials' shares (at least the exact binomial), and the observed p95.

| limit | spread | noise | trials | false pass | false fail | false pass, Student's t | false pass, observed p95 |
|---|---|---|---|---|---|---|---|
{chr(10).join(map(limit_row, measured.at_limit))}

## What no number of requests shows

When a share of bursts stalls as a whole, only the number of bursts can show it, not their size: of ten bursts none
stalls with probability (1 - share)^10, and who saw none cannot know. Such a world violates the SLO from a share of 5 %
on; here is how often a burst of 64 passes in it. A level passes after half of its trials at the earliest, so that
against rare stalls `--trials 120` is the least: 0.95^60 is 4.6 %.

| share of bursts that stall | trials | passes |
|---|---|---|
{chr(10).join(f"| {share:.0%} | {trials} | {passes:.1%} |" for (share, trials), passes in measured.stalls.items())}
"""


def row(name: str, results: Sequence[Result]) -> str:
    """Return a row of the table of searches."""
    return f"| {name} | {shares(results, contains, overclaims, underclaims, within_a_step)} | {tail(results)} |"


def spread_row(spread: float, trials: int, results: Sequence[Result]) -> str:
    """Return a row of the table by spread."""
    told = shares(results, contains, overclaims, underclaims, without_bracket, within_a_step)
    return f"| {spread:g} | {trials} | {told} | {tail(results)} |"


def limit_row(level: AtTheLimit) -> str:
    """Return a row of the table at the limit."""
    world = level.world
    wrong = (level.false_pass, level.false_fail, level.false_pass_student, level.false_pass_observed)
    told = " | ".join(f"{share:.1%}" for share in wrong)
    return f"| {world.limit} | {world.spread:g} | {world.noise:g} | {level.trials} | {told} |"


def underclaims(result: Result) -> bool:
    """Whether a burst was said to fail that does not."""
    return result.underclaimed


def without_bracket(result: Result) -> bool:
    """Whether one side of the bracket is missing."""
    return not result.found


def shares(results: Sequence[Result], *conditions: Callable[[Result], bool]) -> str:
    """Return for which share of the results each condition holds, as cells."""
    return " | ".join(f"{count(results, holds) / len(results):.1%}" for holds in conditions)


def tail(results: Sequence[Result]) -> str:
    """Return the median width and the mean number of requests, as cells."""
    width = statistics.median(result.width_steps for result in results)
    return f"{width:.1f} | {mean_requests(results):,.0f}"
