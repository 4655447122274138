"""The regression gate: are these measurements slower than those of a baseline? One verdict per load, endpoint and
quantile.

Only like is compared with like: the same load with the same parameters on the same machine. A baseline that is none is
not compared at all, and says so; a slower machine is no regression and a faster one hides it. Measurements made in
turn, one of the candidate beside one of the baseline, are compared in pairs, which takes out what both met. The
statistics are `regression`'s; the gate's verdicts count like those of SLOs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd

from harness.analysis.dataset import Dataset, asked_alike, in_order
from harness.analysis.dependence import Floats
from harness.analysis.regression import PAIRS_MIN, GateVerdict, compare_pairs, compare_runs, run_quantiles
from harness.analysis.slo import Interval, Statistic, Status, Verdict, percent, plural, rounded
from harness.analysis.validity import Fault, Finding
from harness.sample import Endpoint, Mode
from harness.sampleset import Manifest

MARGIN = 0.05
"""Share by which the candidate may be slower before it counts as a regression (data/README.md)."""

GATED = (Statistic.P50, Statistic.P95)
"""Quantiles that are judged; the p99 is shown beside them."""

MACHINE = ("system", "architecture", "cpu", "cpu_count")
"""What of the machine a latency depends on; its memory and its kernel's patch level do so less."""


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """One quantile of one endpoint under one load, on both sides."""

    mode: Mode
    endpoint: Endpoint
    statistic: Statistic
    candidate_ms: Floats  # of each run, shape (n_candidate,); in the order of pairs where they are paired
    baseline_ms: Floats
    found: GateVerdict


def compare(data: Dataset, baseline: Dataset) -> tuple[Comparison, ...]:
    """Compare what both sides measured alike, in the order of loads and endpoints, the p99 included."""
    both = [
        (mode, ours, theirs, endpoint)
        for mode, ours, theirs in _loads(data, baseline)
        if not _difference(ours, theirs)
        for endpoint in Endpoint
        if not ours.of_endpoint(endpoint).empty and not theirs.of_endpoint(endpoint).empty
    ]
    sharing = len(both) * len(GATED)
    return tuple(_compared(*one, statistic, sharing) for one in both for statistic in (*GATED, Statistic.P99))


def judge_regression(data: Dataset, baseline: Dataset) -> tuple[Verdict, ...]:
    """Return the gate's verdicts, those first for which nothing could be compared."""
    refused: list[Verdict] = []
    loads = list(_loads(data, baseline))
    for mode, ours, theirs in loads:
        difference = _difference(ours, theirs)
        if difference:
            refused.append(_verdict(mode, "all", Statistic.P50, Status.INCONCLUSIVE, difference))
    if not loads:
        had = " and ".join(sorted({one.mode for one in baseline.manifests}))
        reason = f"The baseline holds only {had} load, which these samples do not hold."
        refused.append(_verdict(None, "all", Statistic.P50, Status.INCONCLUSIVE, reason))
    judged = [one for one in compare(data, baseline) if one.statistic in GATED]
    return (*refused, *(_judged(one) for one in judged))


def find_shared(data: Dataset, baseline: Dataset) -> tuple[Finding, ...]:
    """Return a finding for each measurement that was given on both sides: it would vouch for itself."""
    theirs = {one.measurement_id for one in baseline.manifests}
    shared = [one.measurement_id for one in data.manifests if one.measurement_id in theirs]
    said = "It was given as a sample and as the baseline."
    return tuple(Finding(Fault.MIXED_MEASUREMENTS, name, said, 0) for name in shared)


def comparison_frame(compared: Iterable[Comparison]) -> pd.DataFrame:
    """Return a row per comparison: both levels (geometric means over runs, ms), the change with its bounds."""
    rows = [
        {
            "mode": one.mode.value,
            "endpoint": one.endpoint.value,
            "statistic": one.statistic.value,
            "baseline_ms": _level(one.baseline_ms),
            "candidate_ms": _level(one.candidate_ms),
            "change": _rounded(one.found.change),
            "lower": _rounded(one.found.lower),
            "upper": _rounded(one.found.upper),
            "noise": _rounded(one.found.noise),
            "candidate_runs": one.found.candidate_runs,
            "baseline_runs": one.found.baseline_runs,
            "paired": one.found.is_paired,
            "verdict": one.found.status.value if one.statistic in GATED else "",
            "equivalence": one.found.equivalence.value,
        }
        for one in compared
    ]
    columns = ["mode", "endpoint", "statistic", "baseline_ms", "candidate_ms", "change", "lower", "upper", "noise",
               "candidate_runs", "baseline_runs", "paired", "verdict", "equivalence"]  # fmt: skip
    numbers = dict.fromkeys(columns[3:9], "Float64")
    return pd.DataFrame(rows, columns=columns).astype(numbers)


def _loads(data: Dataset, baseline: Dataset) -> Iterator[tuple[Mode, Dataset, Dataset]]:
    """Yield each load that both sides hold, with both parts."""
    for mode in Mode:
        if all(any(one.mode == mode for one in side.manifests) for side in (data, baseline)):
            yield mode, data.of_modes([mode]), baseline.of_modes([mode])


def _difference(ours: Dataset, theirs: Dataset) -> str:
    """Say in what the measurements differ besides what is compared; nothing when they are alike."""
    machines = {_machine(one) for one in (*ours.manifests, *theirs.manifests)}
    if len(machines) > 1:
        told = " and ".join(sorted(" ".join(words[1:]) for words in machines))
        return f"The baseline was not measured on this machine ({told}): make one here with `make baseline`."
    first = asked_alike(theirs.manifests[0])
    for one in (*ours.manifests, *theirs.manifests):
        for name, value in sorted((asked_alike(one) | first).items()):
            if asked_alike(one).get(name) != first.get(name):
                return (
                    f"The baseline was not measured with the same parameters: {name} is {first.get(name)!r} in it and "
                    f"{asked_alike(one).get(name, value)!r} in {one.measurement_id[:8]}."
                )
    return ""


def _machine(manifest: Manifest) -> tuple[str, ...]:
    """Return what of the machine counts."""
    return tuple(str(manifest.machine.get(name, "unknown")) for name in MACHINE)


def _compared(
    mode: Mode, ours: Dataset, theirs: Dataset, endpoint: Endpoint, statistic: Statistic, sharing: int
) -> Comparison:
    """Compare one quantile, in pairs where the measurements were made in turn."""
    q = statistic.q or 0.5
    candidate = run_quantiles(in_order(ours.of_endpoint(endpoint)), q)
    baseline = run_quantiles(in_order(theirs.of_endpoint(endpoint)), q)
    if _in_turn(ours, theirs) and len(candidate) == len(ours.manifests) and len(baseline) == len(theirs.manifests):
        candidate, baseline = candidate[_by_start(ours)], baseline[_by_start(theirs)]
        found = compare_pairs(candidate, baseline, MARGIN, sharing)
    else:
        found = compare_runs(candidate, baseline, MARGIN, sharing)
    return Comparison(mode, endpoint, statistic, candidate, baseline, found)


def _in_turn(ours: Dataset, theirs: Dataset) -> bool:
    """Say whether the measurements were made in pairs: in order of time, each two are one of either side."""
    starts = [(one.clock.start.wall_ns, side) for side, part in enumerate((ours, theirs)) for one in part.manifests]
    sides = [side for _, side in sorted(starts)]
    pairs = [set(sides[place : place + 2]) for place in range(0, len(sides), 2)]
    return len(pairs) >= PAIRS_MIN and all(pair == {0, 1} for pair in pairs)


def _by_start(data: Dataset) -> list[int]:
    """Return the places of the measurements, ordered by id, in the order of their starts."""
    starts = [one.clock.start.wall_ns for one in data.manifests]
    return sorted(range(len(starts)), key=lambda place: starts[place])


def _judged(one: Comparison) -> Verdict:
    """Return a comparison as a verdict that counts."""
    found = one.found
    interval = None
    if found.change is not None and found.lower is not None and found.upper is not None:
        of = f"change of the {one.statistic.value}"
        bounds = rounded(found.change), rounded(found.lower), rounded(found.upper)
        interval = Interval(of, "change", *bounds, limit=MARGIN)
    return _verdict(
        one.mode, one.endpoint.value, one.statistic, found.status, found.reason + _more(found),
        change=found.change, interval=interval, size=found.candidate_runs, more=found.more_candidate_runs,
    )  # fmt: skip


def _more(found: GateVerdict) -> str:
    """Say how many further measurements would settle it, with a space before it."""
    if found.status is not Status.INCONCLUSIVE:
        return ""
    if found.more_candidate_runs is None:
        return " No number of further measurements like these would settle it."
    if found.is_paired:
        return f" {plural(found.more_candidate_runs, 'more pairs')} like these would settle it."
    theirs = f" and {found.more_baseline_runs:,} of the baseline" if found.more_baseline_runs else ""
    return f" {plural(found.more_candidate_runs, 'more measurements')}{theirs} like these would settle it."


def _verdict(
    mode: Mode | None,
    endpoint: str,
    statistic: Statistic,
    status: Status,
    reason: str,
    *,
    change: float | None = None,
    interval: Interval | None = None,
    size: int = 0,
    more: int | None = None,
) -> Verdict:
    """Return a verdict of the gate."""
    whole = endpoint == "all"
    return Verdict(
        name=f"regression-{endpoint}" + ("" if whole else f"-{statistic.value}"),
        title="Against the baseline" if whole else f"{endpoint.capitalize()} {statistic.value} against the baseline",
        mode=mode,
        verdict=status,
        statistic=statistic,
        requirement=f"at most {percent(MARGIN)} slower",
        target=MARGIN,
        margin=0.0,
        unit="change",
        measured=_rounded(change),
        interval=interval,
        sample_size=size,
        sample_unit="measurements",
        effective_size=None,
        reason=reason,
        more_needed=more,
        shown={},
    )


def _level(runs_ms: Floats) -> float | None:
    """Return the geometric mean of the runs' quantiles, of which a change is the ratio; null where one failed."""
    if not len(runs_ms) or not np.isfinite(runs_ms).all() or not (runs_ms > 0.0).all():
        return None
    return rounded(float(np.exp(np.log(runs_ms).mean())))


def _rounded(value: float | None) -> float | None:
    return None if value is None else rounded(value)
