"""From the recorded rows of a capacity search to its answer: tables in, tables out, nothing remembered.

Whoever has a sample set of mode `capacity` comes to the same levels, the same bracket and the same stable throughput as
the search itself: both read trials by `capacity.observe` and judge them by `capacity.judge_rate`. What was asked for is
in the set's manifest. `StableThroughput` is what quotas are made from. Before: `capacity`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from harness.analysis.capacity import (
    Check,
    RateRequirement,
    RateVerdict,
    Seen,
    Span,
    Window,
    judge_rate,
    more_windows,
    observe,
    served_per_s,
)
from harness.analysis.dataset import Dataset
from harness.analysis.dependence import Ints
from harness.analysis.quantiles import quantile
from harness.analysis.slo import Status, percent, rounded
from harness.sample import Endpoint, Mode, Outcome
from harness.sampleset import MANIFEST, UnreadableFile
from harness.search import Bracket, Ladder, capacity_ladder, consider, level_of, rate_per_s

INVALID = "INVALID"
"""The verdict on a level at which the generator could not keep up: nothing is said about the service."""


class Asked(msgspec.Struct, frozen=True):
    """What was asked of a search, as its manifest keeps it."""

    requirements: tuple[RateRequirement, ...]
    trials: int
    window_s: float
    lead_s: float
    first_rate_per_s: float
    max_rate_per_s: float

    @property
    def span(self) -> Span:
        """Return how long each trial was."""
        return Span(self.lead_s, self.window_s)

    @property
    def ladder(self) -> Ladder:
        """Return where the search could go."""
        return capacity_ladder(self.first_rate_per_s, self.max_rate_per_s)


@dataclasses.dataclass(frozen=True, slots=True)
class StableThroughput:
    """What an endpoint was shown to sustain: the highest rate that passed, and what was answered well at it."""

    endpoint: Endpoint
    rate_per_s: float  # of arrivals; at or below the true limit with 95 % confidence
    served_per_s: float  # good answers per second, mean over trials
    served_per_s_lower: float  # its one-sided 95 % lower bound over trials, never above the rate itself
    trials: int


def bracket_of(ladder: Ladder, tried: Mapping[int, RateVerdict]) -> Bracket:
    """Return what levels come to and which is next.

    A level at which the generator could not keep up is open, and nothing above it is tried: a generator that is late at
    one rate is late at every higher one.
    """
    bracket = consider(ladder, {level: verdict.status for level, verdict in tried.items()})
    invalid = [level for level, verdict in tried.items() if verdict.invalid]
    if bracket.next_level is not None and invalid and bracket.next_level > min(invalid):
        return dataclasses.replace(bracket, next_level=None)
    return bracket


def windows_at(samples: pd.DataFrame, resources: pd.DataFrame, endpoint: Endpoint, rate: float, span: Span,
               ) -> list[Window]:  # fmt: skip
    """Return the trials of one endpoint at one rate, in their order."""
    rows = samples[(samples["endpoint"] == endpoint.value) & (samples["level"] == rate)]
    instants = {
        name: rows[name].to_numpy(dtype=np.int64, na_value=-1)
        for name in ("intended_at_ns", "sent_at_ns", "done_at_ns")
    }
    ok = (rows["outcome"] == Outcome.OK.value).to_numpy(dtype=bool)
    trial = rows["trial"].to_numpy(dtype=np.int64)
    looks_at = resources.sort_values("at_ns")
    seen = Seen(
        looks_at["at_ns"].to_numpy(dtype=np.int64),
        looks_at["queue_depth"].to_numpy(dtype=np.float64, na_value=np.nan),
        looks_at["oldest_due_tick_s"].to_numpy(dtype=np.float64, na_value=np.nan),
    )
    found = []
    for number in np.unique(trial):
        here = trial == number
        arrays: list[Ints] = [instants[name][here] for name in instants]
        found.append(observe(arrays[0], arrays[1], arrays[2], ok[here], seen, span, rate))
    return found


COLUMNS = (
    "endpoint", "rate_per_s", "verdict", "because", "trials", "requests", "failed", "slow", "failed_share",
    "failed_share_upper", "slow_share", "slow_share_lower", "slow_share_upper", "under_way_growth",
    "under_way_growth_upper", "depth_growth", "depth_growth_upper", "age_growth", "age_growth_upper",
    "latency_ms_p50", "latency_ms_p95", "latency_ms_max", "served_per_s", "served_per_s_lower", "queue_depth_max",
    "oldest_due_tick_s_max", "sent_late_share", "send_lag_ms_max", "more_trials",
)  # fmt: skip
"""Of the table of levels; docs/capacity.md says what each holds."""


@dataclasses.dataclass(frozen=True)
class Capacity:
    """What one endpoint's levels come to, in one measurement."""

    measurement_id: str
    requirement: RateRequirement
    bracket: Bracket
    levels: tuple[dict[str, Any], ...]  # COLUMNS without the endpoint, by rising rate
    stable: StableThroughput | None  # null when nothing passed
    best: tuple[Window, ...]  # the trials at the highest rate that passed; empty when nothing did
    span: Span  # how long each of them was
    invalid_from_per_s: float | None  # lowest rate that the generator could not keep; null when it kept all

    @property
    def highest_pass_per_s(self) -> float | None:
        """Return the highest rate that was shown to be sustained."""
        return _rate(self.bracket.highest_pass)

    @property
    def lowest_fail_per_s(self) -> float | None:
        """Return the lowest rate that was shown not to be."""
        return _rate(self.bracket.lowest_fail)


def capacities(data: Dataset) -> tuple[Capacity, ...]:
    """Return the answer of each endpoint, measurement by measurement, from what `data` holds of mode capacity.

    Raises UnreadableFile for a manifest that does not say what was asked.
    """
    found: list[Capacity] = []
    for manifest, folder in zip(data.manifests, data.folders, strict=True):
        if manifest.mode != Mode.CAPACITY.value:
            continue
        try:
            asked = msgspec.convert(manifest.parameters, Asked)
        except msgspec.ValidationError as fault:
            raise UnreadableFile(
                Path(folder), MANIFEST, f"its parameters are no search for capacity: {fault}"
            ) from None
        ours = [frame[frame["measurement_id"] == manifest.measurement_id] for frame in (data.samples, data.resources)]
        name = manifest.measurement_id
        found += [_capacity(name, asked, requirement, ours[0], ours[1]) for requirement in asked.requirements]
    return tuple(found)


def stable_table(found: Sequence[Capacity]) -> pd.DataFrame:
    """Return a row for each endpoint that sustains some rate: the columns of `StableThroughput`."""
    rows = [dataclasses.asdict(one.stable) for one in found if one.stable is not None]
    return pd.DataFrame(rows, columns=[field.name for field in dataclasses.fields(StableThroughput)])


def _capacity(
    name: str, asked: Asked, requirement: RateRequirement, samples: pd.DataFrame, resources: pd.DataFrame
) -> Capacity:
    endpoint = requirement.latency.endpoint
    rates = samples.loc[samples["endpoint"] == endpoint.value, "level"].dropna().unique()
    tried: dict[int, RateVerdict] = {}
    windows: dict[int, list[Window]] = {}
    for rate in sorted(float(each) for each in rates):
        level = level_of(rate)
        windows[level] = windows_at(samples, resources, endpoint, rate, asked.span)
        tried[level] = judge_rate(windows[level], requirement, rate, asked.window_s, asked.trials)
    bracket = bracket_of(asked.ladder, tried)
    best = bracket.highest_pass
    invalid = [level for level, verdict in tried.items() if verdict.invalid]
    return Capacity(
        name,
        requirement,
        bracket,
        tuple(_row(asked, requirement, level, tried[level], windows[level]) for level in tried),
        None if best is None else _stable(endpoint, rate_per_s(best), windows[best]),
        () if best is None else tuple(windows[best]),
        asked.span,
        rate_per_s(min(invalid)) if invalid else None,
    )


def _stable(endpoint: Endpoint, rate: float, windows: Sequence[Window]) -> StableThroughput:
    served, lower = served_per_s(windows)
    return StableThroughput(endpoint, rate, rounded(served), rounded(min(lower, rate)), len(windows))


def because(verdict: RateVerdict, requirement: RateRequirement) -> str:
    """Say in a few words which checks keep a level from passing; empty when it passes."""
    if verdict.invalid:
        return "the generator was late"
    wanted = Status.FAIL if verdict.status is Status.FAIL else Status.INCONCLUSIVE
    told = [
        f"{check} {percent(finding.value)} of {percent(requirement.limit(check))}"
        for check, finding in verdict.findings.items()
        if finding.status is wanted and verdict.status is not Status.PASS
    ]
    return ", ".join(told)


def _row(
    asked: Asked, requirement: RateRequirement, level: int, verdict: RateVerdict, windows: Sequence[Window]
) -> dict[str, Any]:
    """Return one level's row, COLUMNS without the endpoint."""
    rate = rate_per_s(level)
    pooled = np.concatenate([window.latency for window in windows])
    served, served_lower = served_per_s(windows) if len(windows) > 1 else (math.nan, math.nan)
    sent = sum(window.sent for window in windows)
    findings = verdict.findings
    is_open = verdict.status is Status.INCONCLUSIVE and not verdict.invalid
    return {
        "rate_per_s": rate,
        "verdict": INVALID if verdict.invalid else verdict.status.value,
        "because": because(verdict, requirement),
        "trials": verdict.trials,
        "requests": len(pooled),
        "failed": int(np.isinf(pooled).sum()),
        "slow": int(requirement.latency.is_slow(pooled).sum()),
        "failed_share": known(findings[Check.ERRORS].value),
        "failed_share_upper": known(findings[Check.ERRORS].upper),
        "slow_share": known(findings[Check.LATENCY].value),
        "slow_share_lower": known(findings[Check.LATENCY].lower),
        "slow_share_upper": known(findings[Check.LATENCY].upper),
        "under_way_growth": known(findings[Check.UNDER_WAY].value),
        "under_way_growth_upper": known(findings[Check.UNDER_WAY].upper),
        "depth_growth": known(findings[Check.DEPTH].value),
        "depth_growth_upper": known(findings[Check.DEPTH].upper),
        "age_growth": known(findings[Check.AGE].value),
        "age_growth_upper": known(findings[Check.AGE].upper),
        "latency_ms_p50": known(quantile(pooled, 0.5)) if len(pooled) else None,
        "latency_ms_p95": known(quantile(pooled, 0.95)) if len(pooled) else None,
        "latency_ms_max": known(float(pooled.max())) if len(pooled) else None,
        "served_per_s": known(served),
        "served_per_s_lower": known(served_lower),
        "queue_depth_max": _most(window.depth_max for window in windows),
        "oldest_due_tick_s_max": _most(window.age_s_max for window in windows),
        "sent_late_share": known(sum(window.late for window in windows) / sent) if sent else None,
        "send_lag_ms_max": _most(window.lag_ms_max for window in windows),
        "more_trials": more_windows(windows, requirement, rate, asked.window_s, asked.trials) if is_open else None,
    }


def known(value: float) -> float | None:
    """Return a number that JSON can hold, null for what is not known or not bounded."""
    return rounded(value) if math.isfinite(value) else None


def _most(values: Any) -> float | None:
    told = [value for value in values if not math.isnan(value)]
    return known(max(told)) if told else None


def _rate(level: int | None) -> float | None:
    return None if level is None else rate_per_s(level)
