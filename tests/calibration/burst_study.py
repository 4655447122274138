"""Searches for burst limits in worlds whose limit is known, and the rival that they are compared with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from scipy import stats

from harness.analysis.bursts import ALPHA, judge, looks, trials_at
from harness.analysis.dependence import Floats
from harness.analysis.quantiles import binomial_bounds, quantile
from harness.analysis.slo import Status
from harness.search import Ladder, burst_ladder, consider
from tests.calibration.burst_world import REQUIREMENT, World, world_with_limit

MOST = 4_096


@dataclasses.dataclass(frozen=True)
class Result:
    """One search beside the truth."""

    world: World
    limit: int
    highest_pass: int | None
    lowest_fail: int | None
    requests: int
    steps_off: int  # refinement steps between the highest pass and the highest step that truly meets the SLO
    width_steps: float  # of the bracket, in refinement steps at the limit; infinity when it was not found

    @property
    def overclaimed(self) -> bool:
        """Whether a burst was said to pass that does not."""
        return self.highest_pass is not None and self.highest_pass > self.limit

    @property
    def underclaimed(self) -> bool:
        """Whether a burst was said to fail that does not."""
        return self.lowest_fail is not None and self.lowest_fail <= self.limit

    @property
    def contains(self) -> bool:
        """Whether the limit lies in the bracket."""
        return not self.overclaimed and not self.underclaimed

    @property
    def found(self) -> bool:
        """Whether there is a bracket at all."""
        return self.highest_pass is not None and self.lowest_fail is not None


def search(world: World, random: np.random.Generator, trials: int) -> Result:
    """Carry one search out as the command does."""
    ladder = burst_ladder(MOST)
    tried: dict[int, Status] = {}
    requests = 0
    while (level := (bracket := consider(ladder, tried)).next_level) is not None:
        tried[level], made = judge_level(world, random, trials, level)
        requests += made
    return result_of(world, ladder, bracket.highest_pass, bracket.lowest_fail, requests)


def result_of(world: World, ladder: Ladder, passed: int | None, failed: int | None, requests: int) -> Result:
    """Compare an answer with the truth."""
    limit = world.limit
    step = ladder.step_at(limit)
    off = abs((limit - limit % step - (passed or 0)) / step)
    width = float("inf") if passed is None or failed is None else (failed - passed) / step
    return Result(world, limit, passed, failed, requests, round(off), width)


def doubling_and_bisection(world: World, random: np.random.Generator, trials: int, *, to_one: bool) -> Result:
    """Find the limit as scripts do: all trials at each level, which passes when the observed p95 does.

    Bisects to a refinement step of ours, or to one request.
    """
    ladder = burst_ladder(MOST)
    requests = 0

    def passes(level: int) -> bool:
        nonlocal requests
        requests += trials * level
        p95 = quantile(world.trials(random, trials, level).ravel(), 1.0 - REQUIREMENT.slow_share)
        return REQUIREMENT.op.holds(p95, REQUIREMENT.limit_ms)

    low, high = 0, ladder.first
    while passes(high) and high < MOST:
        low, high = high, 2 * high
    width = 1 if to_one else max(1, (high - low) // ladder.steps)
    while high - low > width:
        middle = (low + high) // 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    return result_of(world, ladder, low or None, high, requests)


def worlds(random: np.random.Generator, count: int, spreads: tuple[float, ...]) -> Iterator[World]:
    """Return worlds with limits from 16 to 256, spread evenly over the octaves, and all else at random."""
    for _ in range(count):
        wanted = round(16.0 * 2.0 ** float(random.uniform(0.0, 4.0)))
        servers = int(random.choice([1, 2, 4]))
        noise, failing = float(random.choice([0.05, 0.2])), float(random.choice([0.0, 0.0, 0.01]))
        yield world_with_limit(wanted, servers, float(random.choice(spreads)), noise, failing)


@dataclasses.dataclass(frozen=True)
class AtTheLimit:
    """How often one level is judged wrongly where that is easiest: right at the limit. Shares of `repeats`."""

    world: World
    trials: int
    false_pass: float  # of the first burst above the limit
    false_fail: float  # of the limit itself
    false_pass_student: float  # by Student's t on the trials' shares, or the exact binomial where that is wider
    false_pass_observed: float  # by the observed p95 alone


def at_the_limit(world: World, random: np.random.Generator, trials: int, repeats: int) -> AtTheLimit:
    """Judge the two bursts beside the limit again and again."""
    limit = world.limit
    passed = failed = student = observed = 0
    for _ in range(repeats):
        passed += judge_level(world, random, trials, limit + 1)[0] is Status.PASS
        failed += judge_level(world, random, trials, limit)[0] is Status.FAIL
        shares = REQUIREMENT.is_slow(world.trials(random, trials, limit + 1)).mean(axis=1)
        observed += float(shares.mean()) <= REQUIREMENT.slow_share
        student += _student_upper(shares, limit + 1) <= REQUIREMENT.slow_share
    counts = (count / repeats for count in (passed, failed, student, observed))
    return AtTheLimit(world, trials, *counts)


def judge_level(world: World, random: np.random.Generator, trials: int, burst: int) -> tuple[Status, int]:
    """Return what the looks at one level come to, and how many requests that took."""
    status, latency = Status.INCONCLUSIVE, np.empty((0, burst))
    for look in looks(trials_at(burst, trials)):
        latency = np.vstack([latency, world.trials(random, look.trials - len(latency), burst)])
        status = judge(latency, REQUIREMENT, trials).status
        if status is not Status.INCONCLUSIVE:
            break
    return status, latency.size


def _student_upper(shares: Floats, burst: int) -> float:
    """Return the bound that was tried first: Student's t on the trials' shares, at least the exact binomial."""
    count, mean = len(shares), float(shares.mean())
    error = float(shares.std(ddof=1)) / math.sqrt(count)
    n = float(count * burst)
    return max(mean + float(stats.t.ppf(1.0 - ALPHA, count - 1)) * error, binomial_bounds(mean * n, n, ALPHA)[1])
