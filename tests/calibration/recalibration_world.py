"""Services whose capacity is known, measured with a known error; and measurements that somebody or something spoiled.

What a measurement finds of a rate is lognormal around the truth: each of twenty trials is off by a factor with the
standard deviation `within`, and all trials of one cycle together by another one, `between`, of which the interval knows
nothing, as it is with a machine that has a better and a worse week. Bounds are Student's t on the trials' logarithms.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
from collections.abc import Callable, Mapping

import msgspec
import numpy as np
from scipy import stats

from service.quota.limits import RATES, Limit
from service.quota.tables import FIRST, Measured, RateValue, RevisionFile, Tables
from tests.measuredtables import DIGEST, MACHINE, NOW, OTHER_MACHINE, SECONDS, measured_file

TRIALS = 20
WEEK = dt.timedelta(days=7)
STUDENT = float(stats.t.ppf(0.95, TRIALS - 1))

CAPACITY_PER_S: Mapping[Limit, float] = {
    limit: 4.0 * value.per_s for limit in RATES if isinstance(value := FIRST.default.value(limit), RateValue)
}
"""What the user's table says that the reference carried."""


@dataclasses.dataclass(frozen=True)
class Noise:
    """How a measurement errs; standard deviations of logarithms."""

    within: float  # between the trials of one cycle
    between: float  # between cycles, on top

    @property
    def name(self) -> str:
        """Say both, in percent."""
        return f"{self.within:.0%}, {self.between:.0%}"


@dataclasses.dataclass(frozen=True)
class World:
    """One service."""

    capacity_per_s: Mapping[Limit, float]
    noise: Noise
    inconclusive: float = 0.0  # share of measurements that prove nothing

    def after(self, factor: float) -> World:
        """Return the service when it carries so many times as much."""
        return dataclasses.replace(self, capacity_per_s={k: v * factor for k, v in self.capacity_per_s.items()})

    def measure(self, random: np.random.Generator, cycle: int, limits: Tables = FIRST) -> RevisionFile:
        """Return what a sound cycle measures, a week after the one before."""
        at = NOW + cycle * WEEK
        return measured_file({limit: self._measure(random, limit, at) for limit in self.capacity_per_s}, limits)

    def _measure(self, random: np.random.Generator, limit: Limit, at: dt.datetime) -> Measured:
        off = self.noise.between * random.standard_normal()
        logs = math.log(self.capacity_per_s[limit]) + off + self.noise.within * random.standard_normal(TRIALS)
        middle, error = float(logs.mean()), float(logs.std(ddof=1)) / math.sqrt(TRIALS)
        requests = round(math.exp(middle) * SECONDS)
        return Measured(
            per_s=math.exp(middle),
            lower_per_s=math.exp(middle - STUDENT * error),
            upper_per_s=math.exp(middle + STUDENT * error),
            verdict="INCONCLUSIVE" if random.random() < self.inconclusive else "PASS",
            requests_planned=requests,
            requests_recorded=requests,
            seconds=SECONDS,
            late_share=float(random.uniform(0, 0.009)),
            samples={f"set-{at:%Y%m%d}": DIGEST},
            measured_at=at - dt.timedelta(hours=1),
            machine=MACHINE | {"release": f"6.{random.integers(1, 20)}"},
        )


Poison = Callable[[Measured], Measured]
"""What is done to one limit's evidence; the table follows the evidence unless the poison is in the table."""


def _all_rates(factor: Callable[[float], float]) -> Poison:
    def spoil(each: Measured) -> Measured:
        rates = sorted((factor(each.lower_per_s), factor(each.per_s), factor(each.upper_per_s)))
        return msgspec.structs.replace(each, lower_per_s=rates[0], per_s=rates[1], upper_per_s=rates[2])

    return spoil


def _with(**changed: object) -> Poison:
    return lambda each: msgspec.structs.replace(each, **changed)


def _half_as_many_rows(each: Measured) -> Measured:
    return msgspec.structs.replace(each, requests_recorded=each.requests_planned // 2)


def _half_as_many_planned(each: Measured) -> Measured:
    half = each.requests_planned // 2
    return msgspec.structs.replace(each, requests_planned=half, requests_recorded=half)


def _older(days: float) -> Poison:
    return lambda each: msgspec.structs.replace(each, measured_at=each.measured_at - dt.timedelta(days=days))


def _consistently(factor: float) -> Poison:
    """Spoil rate and requests alike, so that only the measurement before can tell."""

    def spoil(each: Measured) -> Measured:
        requests = max(1, round(each.requests_planned * factor))
        each = _all_rates(lambda rate: rate * factor)(each)
        return msgspec.structs.replace(each, requests_planned=requests, requests_recorded=requests)

    return spoil


POISONS: Mapping[str, Poison] = {
    "zero": _with(per_s=0.0, lower_per_s=0.0, upper_per_s=0.0),
    "a lower bound of zero": _with(lower_per_s=0.0),
    "NaN": _with(per_s=math.nan),
    "NaN in the lower bound": _with(lower_per_s=math.nan),
    "infinite": _with(upper_per_s=math.inf),
    "negative": _all_rates(lambda rate: -rate),
    "bounds the wrong way round": lambda each: msgspec.structs.replace(
        each, lower_per_s=each.upper_per_s, upper_per_s=each.lower_per_s
    ),
    "per minute": _all_rates(lambda rate: rate * 60),
    "per hour": _all_rates(lambda rate: rate * 3_600),
    "per millisecond": _all_rates(lambda rate: rate / 1_000),
    "seconds for a request, not requests a second": _all_rates(lambda rate: 1 / rate),
    "stale": _older(8),
    "of the future": _older(-1),
    "rows missing": _half_as_many_rows,
    "truncated before it was counted": _half_as_many_planned,
    "without rows": _with(requests_planned=0, requests_recorded=0),
    "without samples": _with(samples={}),
    "generator overloaded": _with(late_share=0.3),
    "generator's lateness unknown": _with(late_share=math.nan),
    "without a machine": _with(machine={}),
}
"""Spoiled so that the file alone betrays it."""

POISONS_BESIDE_A_RECORD: Mapping[str, Poison] = {
    "another machine": _with(machine=OTHER_MACHINE),
    "older than what is in force": _older(7.5),
    "per minute, requests too": _consistently(60),
    "a fifth, requests too": _consistently(1 / 5),
}
"""Spoiled so that only the measurement before it betrays it."""


def spoiled(file: RevisionFile, poison: Poison, limit: Limit) -> RevisionFile:
    """Return a file of which one limit's evidence is poisoned; its value follows where it can be written."""
    evidence = dict(file.provenance.measured)
    evidence[limit] = poison(evidence[limit])
    return measured_file(evidence, file.limits)


def spoiled_table(file: RevisionFile, limit: Limit, factor: float) -> RevisionFile:
    """Return a file whose evidence is sound and whose value is another one."""
    value = file.limits.default.value(limit)
    assert isinstance(value, RateValue)
    rate = RateValue(max(0.001, round(value.per_s * factor, 3)), value.burst)
    default = msgspec.structs.replace(file.limits.default, **{limit.value: rate})
    return msgspec.structs.replace(file, limits=Tables(default, file.limits.calibration))
