"""Which judge answers which SLO, and the judges of latencies and responses.

A failed request is never dropped: it was slower than any target, so it counts as slow, and it leaves a mean without
an upper bound. `throughput` and `completion` judge what only a run's record can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd

from harness.analysis import completion, soaks, throughput
from harness.analysis.dataset import GROUPED_BY_TRIAL, Dataset, counted_from_send, groups_of, in_order, waited_ms
from harness.analysis.dependence import Bools, effective_size
from harness.analysis.further import further_words
from harness.analysis.means import MIN_UNITS, more_for_ratio, ratio_bounds
from harness.analysis.quantiles import more_for_share, quantile, share_bounds
from harness.analysis.slo import (
    Measure,
    Op,
    Slo,
    Statistic,
    Status,
    Verdict,
    interval_of,
    number,
    percent,
    plural,
    settle,
    verdict_of,
)
from harness.sample import Endpoint, Mode, Outcome

FROM_SEND = " Latencies are from send; coordinated omission not excluded."

FAILURES_UNKNOWN = "The source of these samples does not tell which requests failed, so failures cannot be counted."


def judge_all(slos: Iterable[Slo], data: Dataset) -> tuple[Verdict, ...]:
    """Judge each SLO on each of its modes that was measured; those without one are listed as not applicable."""
    verdicts: list[Verdict] = []
    for slo in slos:
        measured = [mode for mode in slo.modes if any(manifest.mode == mode for manifest in data.manifests)]
        verdicts += [_judge(slo, mode, data.of_modes([mode])) for mode in measured]
        if not measured:
            modes = " or ".join(mode.value for mode in slo.modes)
            reason = f"Judged on {modes} load, which these samples do not hold."
            verdicts.append(verdict_of(slo, None, Status.NOT_APPLICABLE, reason))
    return tuple(verdicts)


def _judge(slo: Slo, mode: Mode, data: Dataset) -> Verdict:
    """Judge one SLO on the samples of one mode."""
    judge: Callable[[Slo, Mode, Dataset], Verdict]
    if slo.measure is Measure.TICKS:
        judge = throughput.judge
    elif slo.measure is Measure.COMPLETION:
        judge = completion.judge
    elif slo.measure is Measure.DRIFT:
        judge = soaks.judge
    elif slo.measure is Measure.RESPONSES:
        judge = judge_failed_count if slo.statistic is Statistic.FAILED_COUNT else judge_error_share
    else:
        judge = judge_mean if slo.statistic is Statistic.MEAN else judge_quantile
    return judge(slo, mode, data)


def judge_mean(slo: Slo, mode: Mode, data: Dataset) -> Verdict:
    """Bound the mean latency over runs, or over bursts where runs start together (see `means`)."""
    endpoint = slo.endpoint or Endpoint.OTHER
    rows = data.of_endpoint(endpoint)
    if rows.empty:
        return _no_rows(slo, mode, endpoint)
    waited = waited_ms(rows)
    failed = int(np.isinf(waited).sum())
    unit = "bursts" if mode in GROUPED_BY_TRIAL else "groups" if mode is Mode.IMPORT else "runs"
    groups, note = groups_of(rows), _note(rows)
    shown = {"p95": quantile(waited, 0.95) if np.isfinite(quantile(waited, 0.95)) else None}
    if failed:
        reason = (
            f"{failed} of {plural(len(rows), 'requests')} failed: a request that never succeeded waited without "
            f"end, so the mean has no upper bound.{note}"
        )
        return verdict_of(slo, mode, Status.FAIL, reason, size=int(groups.max()) + 1, of=unit, shown=shown)
    counts = np.bincount(groups).astype(np.float64)
    sums = np.bincount(groups, weights=waited).astype(np.float64)
    bounds = ratio_bounds(sums, counts)
    if bounds.lower is None or bounds.upper is None:
        more = more_for_ratio(bounds, slo.limit)
        reason = f"{plural(bounds.units, unit)} say next to nothing about their spread; a bound needs {MIN_UNITS}."
        return verdict_of(
            slo, mode, Status.INCONCLUSIVE, reason + further_words(more, unit, bounds.units, mode, data) + note,
            measured=bounds.estimate, size=bounds.units, of=unit, effective=bounds.effective, more=more, shown=shown,
        )  # fmt: skip
    status = settle(slo.op, slo.limit, bounds.lower, bounds.upper)
    more = more_for_ratio(bounds, slo.limit) if status is Status.INCONCLUSIVE else None
    reason = (
        f"Mean {number(bounds.estimate)} ms over {plural(bounds.units, unit)}, with 95 % confidence "
        f"{_side(status, bounds.lower, bounds.upper)}."
    )
    if status is Status.INCONCLUSIVE:
        reason += further_words(more, unit, bounds.units, mode, data)
    return verdict_of(
        slo, mode, status, reason + note,
        measured=bounds.estimate, size=bounds.units, of=unit, effective=bounds.effective, more=more, shown=shown,
        interval=interval_of("mean latency", "ms", bounds.estimate, (bounds.lower, bounds.upper), slo.limit),
    )  # fmt: skip


def judge_quantile(slo: Slo, mode: Mode, data: Dataset) -> Verdict:
    """Bound the share of slow requests: a p95 meets its target exactly when at most 5 % of the requests miss it."""
    endpoint = slo.endpoint or Endpoint.OTHER
    rows = data.of_endpoint(endpoint)
    if rows.empty:
        return _no_rows(slo, mode, endpoint)
    waited, unit = waited_ms(rows), f"{endpoint.value} requests"
    q = slo.statistic.q or 0.5
    allowed = round(1.0 - q, 9)
    is_slow: Bools = waited >= slo.limit if slo.op is Op.LT else waited > slo.limit
    effective = effective_size(is_slow, allowed, groups_of(rows), waited)
    lower, upper = share_bounds(is_slow, effective)
    status = Status.PASS if upper <= allowed else Status.FAIL if lower > allowed else Status.INCONCLUSIVE
    more = more_for_share(is_slow, effective, allowed) if status is Status.INCONCLUSIVE else None
    missed = "or longer" if slo.op.value == "lt" else "and more"
    reason = (
        f"{int(is_slow.sum()):,} of {plural(len(rows), unit)} took {number(slo.limit)} ms {missed}; at an effective "
        f"sample size of {effective:.0f}, the share of slow requests is {_side(status, lower, upper, percent)} with "
        f"95 % confidence, and {percent(allowed)} are allowed."
    )
    if status is Status.INCONCLUSIVE:
        reason += further_words(more, unit, len(rows), mode, data)
    return verdict_of(
        slo, mode, status, reason + _note(rows),
        measured=quantile(waited, q), size=len(rows), of=unit, effective=effective, more=more,
        interval=interval_of(f"share of slow {unit}", "share", float(is_slow.mean()), (lower, upper), allowed),
    )  # fmt: skip


def judge_failed_count(slo: Slo, mode: Mode, data: Dataset) -> Verdict:
    """Count the failed responses of this sample: a census, no inference; its bound on the share is shown beside it."""
    rows = data.samples
    if rows.empty:
        return verdict_of(slo, mode, Status.INCONCLUSIVE, f"The {mode.value} samples hold no request at all.")
    if not data.tells_failures:
        return verdict_of(slo, mode, Status.INCONCLUSIVE, FAILURES_UNKNOWN, size=len(rows), of="requests")
    is_failed = (rows["outcome"] != Outcome.OK.value).to_numpy(dtype=bool)
    failed = int(is_failed.sum())
    status = Status.PASS if slo.op.holds(failed, slo.limit) else Status.FAIL
    what = "No" if failed == 0 else f"{failed:,}"
    reason = f"{what} failed response among {plural(len(rows), 'requests')} of this sample, every one counted."
    if failed != 1:
        reason = reason.replace("response", "responses")
    if failed:
        reason += f" {_worst(rows['outcome'].astype(str).where(is_failed), rows['status'])}"
    return verdict_of(
        slo, mode, status, reason, measured=float(failed), size=len(rows), of="requests",
        interval=interval_of("failed responses", "requests", failed, (failed, failed), slo.limit),
    )  # fmt: skip


def judge_error_share(slo: Slo, mode: Mode, data: Dataset) -> Verdict:
    """Bound the share of failed requests of all endpoints together."""
    rows = in_order(data.samples)
    if rows.empty:
        return verdict_of(slo, mode, Status.INCONCLUSIVE, f"The {mode.value} samples hold no request at all.")
    if not data.tells_failures:
        return verdict_of(slo, mode, Status.INCONCLUSIVE, FAILURES_UNKNOWN, size=len(rows), of="requests")
    is_failed: Bools = (rows["outcome"] != Outcome.OK.value).to_numpy(dtype=bool)
    effective = effective_size(is_failed, slo.limit, groups_of(rows), waited_ms(rows))
    lower, upper = share_bounds(is_failed, effective)
    status = settle(slo.op, slo.limit, lower, upper)
    more = more_for_share(is_failed, effective, slo.limit) if status is Status.INCONCLUSIVE else None
    reason = (
        f"{int(is_failed.sum()):,} of {plural(len(rows), 'requests')} failed; at an effective sample size of "
        f"{effective:.0f}, the share of errors is {_side(status, lower, upper, percent)} with 95 % confidence."
    )
    if status is Status.INCONCLUSIVE:
        reason += further_words(more, "requests", len(rows), mode, data)
    share = float(is_failed.mean())
    return verdict_of(
        slo, mode, status, reason, measured=share, size=len(rows), of="requests", effective=effective, more=more,
        interval=interval_of("share of failed requests", "share", share, (lower, upper), slo.limit),
    )  # fmt: skip


def _note(rows: pd.DataFrame) -> str:
    """Return what must be said of latencies that do not start at the intended moment, with a space before it."""
    return FROM_SEND if counted_from_send(rows) else ""


def _no_rows(slo: Slo, mode: Mode, endpoint: Endpoint) -> Verdict:
    """Return the verdict on an endpoint that the load did not ask for."""
    reason = f"The {mode.value} samples hold no {endpoint.value} request."
    return verdict_of(slo, mode, Status.INCONCLUSIVE, reason, of=f"{endpoint.value} requests")


def _side(status: Status, lower: float, upper: float, text: Callable[[float], str] | None = None) -> str:
    """Return the bound that decided, in words; both when neither did."""
    words = text or (lambda value: f"{number(value)} ms")
    if status is Status.PASS:
        return f"below {words(upper)}"
    return f"above {words(lower)}" if status is Status.FAIL else f"between {words(lower)} and {words(upper)}"


def _worst(outcomes: pd.Series, statuses: pd.Series) -> str:
    """Return the commonest failures, such as "http_error 503: 3." """
    kinds = outcomes.str.cat(statuses.astype("string").fillna(""), sep=" ").str.strip()
    counts = kinds.dropna().value_counts().sort_index()
    return "; ".join(f"{kind}: {count}" for kind, count in counts.items()) + "."
