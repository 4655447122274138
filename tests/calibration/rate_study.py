"""Searches for capacities in worlds whose capacity is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from harness.analysis.bursts import looks
from harness.analysis.capacity import Check, RateVerdict, Window, judge_rate, rate_trials
from harness.analysis.quantiles import quantile
from harness.analysis.ratesets import bracket_of
from harness.analysis.slo import Status
from harness.search import capacity_ladder, rate_per_s
from tests.calibration.rate_world import REQUIREMENT, SPAN, RateWorld

FIRST_PER_S, MOST_PER_S = 8.0, 1_024.0

LIMIT_WINDOWS = 4_000
"""Of which the limit itself is counted: the share of slow requests is then known to some 0.2 %, what a rate 1 % higher
adds to it being 0.5 % and more. With 300 the limit found was off by more than that, and passes at it were no errors."""


@dataclasses.dataclass(frozen=True)
class RateResult:
    """One search beside the truth."""

    world: RateWorld
    highest_pass_per_s: float | None
    lowest_fail_per_s: float | None
    windows: int

    @property
    def overclaimed(self) -> bool:
        """Whether a rate was said to be sustained that is not."""
        return self.highest_pass_per_s is not None and not self.world.meets(self.highest_pass_per_s)

    @property
    def underclaimed(self) -> bool:
        """Whether a rate was said not to be sustained that is."""
        return self.lowest_fail_per_s is not None and self.world.meets(self.lowest_fail_per_s)

    @property
    def contains(self) -> bool:
        """Whether the limit lies in the bracket."""
        return not self.overclaimed and not self.underclaimed

    @property
    def found(self) -> bool:
        """Whether there is a bracket at all."""
        return self.highest_pass_per_s is not None and self.lowest_fail_per_s is not None

    @property
    def width(self) -> float:
        """Return the lowest failure over the highest pass; infinity when there is no bracket."""
        passed, failed = self.highest_pass_per_s, self.lowest_fail_per_s
        return float("inf") if passed is None or failed is None else failed / passed


def search(world: RateWorld, random: np.random.Generator, trials: int) -> RateResult:
    """Carry one search out as the command does."""
    ladder = capacity_ladder(FIRST_PER_S, MOST_PER_S)
    tried: dict[int, RateVerdict] = {}
    while (level := (bracket := bracket_of(ladder, tried)).next_level) is not None:
        tried[level] = judge_level(world, random, trials, rate_per_s(level))
    passed, failed = bracket.highest_pass, bracket.lowest_fail
    return RateResult(
        world,
        None if passed is None else rate_per_s(passed),
        None if failed is None else rate_per_s(failed),
        sum(verdict.trials for verdict in tried.values()),
    )


def judge_level(world: RateWorld, random: np.random.Generator, trials: int, rate: float) -> RateVerdict:
    """Return what the looks at one rate come to."""
    windows: list[Window] = []
    for look in looks(rate_trials(rate, SPAN.window_s, trials)):
        windows += [world.window(random, rate) for _ in range(look.trials - len(windows))]
        verdict = judge_rate(windows, REQUIREMENT, rate, SPAN.window_s, trials)
        if verdict.status is not Status.INCONCLUSIVE:
            break
    return verdict


def by_observed_p95(world: RateWorld, random: np.random.Generator, trials: int) -> RateResult:
    """Search as scripts do: a rate passes when the p95 and the errors seen do; double, then bisect to 1.19 times."""
    made = 0

    def passes(rate: float) -> bool:
        nonlocal made
        made += trials
        latency = np.concatenate([world.window(random, rate).latency for _ in range(trials)])
        p95 = quantile(latency, 1.0 - REQUIREMENT.latency.slow_share)
        good = float(np.isinf(latency).mean()) <= REQUIREMENT.failed_share
        return good and REQUIREMENT.latency.op.holds(p95, REQUIREMENT.latency.limit_ms)

    low, high = 0.0, FIRST_PER_S
    while passes(high) and high < MOST_PER_S:
        low, high = high, 2.0 * high
    while low and high / low > 1.19:
        middle = round((low * high) ** 0.5, 1)
        low, high = (middle, high) if passes(middle) else (low, middle)
    return RateResult(world, low or None, high, made)


def worlds(random: np.random.Generator, count: int, spreads: tuple[float, ...]) -> Iterator[RateWorld]:
    """Return worlds with capacities from 16 to 256 requests a second, evenly over the octaves, either stage tighter."""
    for _ in range(count):
        capacity = 16.0 * 2.0 ** float(random.uniform(0.0, 4.0))
        slack = float(random.uniform(1.3, 3.0))
        first, second = (capacity, capacity * slack) if random.random() < 0.5 else (capacity * slack, capacity)
        servers, workers = (int(random.choice([1, 2, 4])) for _ in range(2))
        spread, failing = float(random.choice(spreads)), float(random.choice([0.0, 0.0, 0.002]))
        yield RateWorld(servers, 1e3 * servers / first, workers, 1e3 * workers / second, spread, failing)


@dataclasses.dataclass(frozen=True)
class AtTheRate:
    """How often one rate is judged wrongly where that is easiest: next to the limit. Shares of `repeats`."""

    world: RateWorld
    trials: int
    above_per_s: float  # the rate that just misses the requirement
    below_per_s: float  # the rate that just meets it
    false_pass: float
    false_fail: float
    decides: Check  # what is missed at `above_per_s`


def at_the_rate(world: RateWorld, random: np.random.Generator, trials: int, repeats: int) -> AtTheRate:
    """Judge the rates beside the limit again and again, as close as thousands of windows can tell them apart."""
    low, high = 0.5 * world.capacity_per_s, 1.5 * world.capacity_per_s
    while high / low > 1.01:
        middle = round((low + high) / 2.0, 2)
        low, high = (middle, high) if world.meets(middle, LIMIT_WINDOWS) else (low, middle)
    truth = world.truth(high, LIMIT_WINDOWS)
    decides = max(Check, key=lambda check: truth[check] / REQUIREMENT.limit(check))
    verdicts = [[judge_level(world, random, trials, rate).status for _ in range(repeats)] for rate in (high, low)]
    return AtTheRate(
        world,
        trials,
        high,
        low,
        verdicts[0].count(Status.PASS) / repeats,
        verdicts[1].count(Status.FAIL) / repeats,
        decides,
    )
