"""Is the candidate slower than the baseline? Run against run, because the run is what repeats independently.

Compared are logarithms of each run's own quantile (p50 or p95), so that a difference is a ratio and both sides may have
been measured at any level. Requests of one run resemble each other more than those of two: a test on requests alarms on
identical systems in up to a third of comparisons. Runs measured in turn, candidate and baseline side by side, are
compared in pairs, which takes out what both met; otherwise Student's t with the pooled spread of the runs.

Slower than the margin allows must be excluded for a PASS; a slowdown must be proven, and its harmlessness not, for a
FAIL. Of several comparisons (endpoints, quantiles) a false alarm may come from any, so they share the error of a FAIL
(Bonferroni); a PASS of all needs each to pass, so that side needs no share. A run whose quantile lies among its
failures was infinitely slow. Error rates: docs/evidence/regression-calibration.md. Next: `history`, over many reports.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy import special

from harness.analysis.dataset import waited_ms
from harness.analysis.dependence import Floats
from harness.analysis.quantiles import CONFIDENCE, quantile, smallest
from harness.analysis.slo import Status, percent, plural

RUNS_MIN = 5
"""Fewest runs of both sides together, unpaired, with at least BASELINE_MIN in the baseline: the spread between runs is
estimated from them, and below three degrees of freedom Student's t is too wide to prove anything."""

BASELINE_MIN = 3
"""Fewest runs of a baseline: two say next to nothing about the spread between runs."""

PAIRS_MIN = 4
"""Fewest pairs: three degrees of freedom."""

MORE_RUNS_MAX = 1_000
"""Beyond so many further runs, a question is said to be open for good."""


@dataclasses.dataclass(frozen=True, slots=True)
class GateVerdict:
    """What the runs of two sides prove. Changes are shares of the baseline: 0.1 = the candidate is 10 % slower."""

    status: Status  # PASS: no slower than the margin; FAIL: slower, and beyond the margin cannot be excluded
    equivalence: Status  # PASS: neither slower nor faster than the margin; FAIL: certainly beyond it, either way
    is_slower: bool  # a slowdown of whatever size is proven
    change: float | None  # ratio of the geometric means less 1; null when refused
    lower: float | None  # two one-sided 95 % bounds of it
    upper: float | None
    margin: float
    noise: float | None  # standard deviation from run to run, as a share; of pairs: of their ratios
    candidate_runs: int
    baseline_runs: int
    is_paired: bool
    more_candidate_runs: int | None  # further ones that would settle it; null when settled or not to be told
    more_baseline_runs: int | None  # the same; 0 where candidates alone would do. Of pairs: as many as candidates
    reason: str  # one or two plain sentences


def run_quantiles(rows: pd.DataFrame, q: float) -> Floats:
    """Return the quantile of each measurement's latencies in ms, shape (n_measurements,), ordered by measurement id.

    `rows` are samples of one endpoint as in `dataset.Dataset`; a repetition is a measurement, or a trial of one.
    Infinity where the quantile lies among the failures.
    """
    units = rows.groupby(["measurement_id", "trial"], sort=True, dropna=False)
    return np.array([quantile(waited_ms(part), q) for _, part in units], dtype=np.float64)


def compare_runs(candidate: Floats, baseline: Floats, margin: float, sharing: int = 1) -> GateVerdict:
    """Compare a quantile of each candidate run (n_candidate,) with that of each baseline run (n_baseline,), in ms.

    `sharing` is how many comparisons share the error of a false FAIL.
    """
    _check(margin)
    refusal = _unmeasured(candidate, baseline, margin, is_paired=False)
    if refusal is not None:
        return refusal
    missing = max(BASELINE_MIN - len(baseline), 0)
    short = max(RUNS_MIN - len(baseline) - missing - len(candidate), 1 - len(candidate), 0)
    if missing or short:
        reason = (
            f"{plural(len(candidate), 'candidate runs')} and {plural(len(baseline), 'baseline runs')} say too little "
            f"about the spread between runs: {BASELINE_MIN} baseline runs and {RUNS_MIN} in all are needed."
        )
        return _open(margin, len(candidate), len(baseline), (short, missing), reason, is_paired=False)
    ours, theirs = np.log(candidate), np.log(baseline)
    freedom = len(ours) + len(theirs) - 2
    squares = float(((ours - ours.mean()) ** 2).sum() + ((theirs - theirs.mean()) ** 2).sum())
    spread = math.sqrt(squares / freedom)
    change = float(ours.mean() - theirs.mean())

    def bounds(more_ours: int, more_theirs: int) -> Bounds:
        n, m = len(ours) + more_ours, len(theirs) + more_theirs
        return _bounds(change, spread * math.sqrt(1.0 / n + 1.0 / m), n + m - 2, sharing)

    # As scipy.stats.ttest_ind, which knows no interval for a single candidate, and warns of runs that are equal.
    found = bounds(0, 0)
    more: tuple[int, int] | None = None
    if _settle(found, margin) is Status.INCONCLUSIVE:
        alone = _smallest_more(lambda k: bounds(k, 0), margin)
        both = _smallest_more(lambda k: bounds(k, k), margin)
        if both is not None:
            more = (alone, 0) if alone is not None and alone <= 2 * both else (both, both)
    return _verdict(found, margin, spread, (len(ours), len(theirs)), more, sharing, is_paired=False)


def compare_pairs(candidate: Floats, baseline: Floats, margin: float, sharing: int = 1) -> GateVerdict:
    """Compare runs that were measured in turn: candidate[i] beside baseline[i], both of shape (n_pairs,), in ms.

    `sharing` as in `compare_runs`.
    """
    _check(margin)
    if len(candidate) != len(baseline):
        raise ValueError(f"pairs need as many candidates as baselines, not {len(candidate)} and {len(baseline)}")
    refusal = _unmeasured(candidate, baseline, margin, is_paired=True)
    if refusal is not None:
        return refusal
    pairs = len(candidate)
    if pairs < PAIRS_MIN:
        reason = f"{plural(pairs, 'pairs')} say too little about the spread between them: {PAIRS_MIN} are needed."
        return _open(margin, pairs, pairs, (PAIRS_MIN - pairs,) * 2, reason, is_paired=True)
    ratios = np.log(candidate) - np.log(baseline)
    spread, change = float(ratios.std(ddof=1)), float(ratios.mean())

    def bounds(more: int) -> Bounds:
        n = pairs + more
        return _bounds(change, spread / math.sqrt(n), n - 1, sharing)

    found = bounds(0)
    more = None
    if _settle(found, margin) is Status.INCONCLUSIVE:
        further = _smallest_more(bounds, margin)
        more = None if further is None else (further, further)
    return _verdict(found, margin, spread, (pairs, pairs), more, sharing, is_paired=True)


@dataclasses.dataclass(frozen=True, slots=True)
class Bounds:
    """A change of the logarithm."""

    seen: float
    low: float  # two one-sided 95 % bounds
    high: float
    alarm: float  # lower bound that has to be above 0 for a FAIL: further down, the more comparisons share the error


def _bounds(change: float, error: float, freedom: int, sharing: int) -> Bounds:
    """Return Student's t bounds of a change with its standard error."""
    width, wider = (float(special.stdtrit(freedom, 1.0 - (1.0 - CONFIDENCE) / k)) * error for k in (1, sharing))
    return Bounds(change, change - width, change + width, change - wider)


def _check(margin: float) -> None:
    """Raise ValueError unless the margin is a share."""
    if not 0.0 < margin < 1.0:
        raise ValueError(f"a margin lies between 0 and 1, not {margin}")


def _unmeasured(candidate: Floats, baseline: Floats, margin: float, *, is_paired: bool) -> GateVerdict | None:
    """Return the verdict on runs whose quantile has no finite value above 0; null when all have one."""
    sizes = (len(candidate), len(baseline))
    failed, failed_before = int(np.isinf(candidate).sum()), int(np.isinf(baseline).sum())
    if failed_before:
        among = f"In {failed_before} of {plural(sizes[1], 'baseline runs')} the quantile lies among the failures"
        reason = f"{among}: no level to compare with."
        return _open(margin, *sizes, None, reason, is_paired=is_paired)
    if failed:
        among = f"In {failed} of {plural(sizes[0], 'candidate runs')} the quantile lies among the failures"
        reason = f"{among}: those requests waited without end."
        return dataclasses.replace(
            _open(margin, *sizes, None, reason, is_paired=is_paired),
            status=Status.FAIL, equivalence=Status.FAIL, is_slower=True,
        )  # fmt: skip
    if not (np.concatenate([candidate, baseline]) > 0.0).all():
        return _open(
            margin, *sizes, None, "A run's quantile is 0 ms: a ratio to nothing has no value.", is_paired=is_paired
        )
    return None


def _open(
    margin: float, candidates: int, baselines: int, more: tuple[int, int] | None, reason: str, *, is_paired: bool
) -> GateVerdict:
    """Return an open verdict without an interval."""
    ours, theirs = (None, None) if more is None else more
    return GateVerdict(
        Status.INCONCLUSIVE, Status.INCONCLUSIVE, False, None, None, None, margin, None, candidates, baselines,
        is_paired, ours, theirs, reason,
    )  # fmt: skip


def _settle(found: Bounds, margin: float) -> Status:
    """Judge the bounds of a change of the logarithm."""
    if found.high <= math.log1p(margin):
        return Status.PASS
    return Status.FAIL if found.alarm > 0.0 else Status.INCONCLUSIVE


def _equivalence(low: float, high: float, margin: float) -> Status:
    """Judge the same bounds against the margin both ways (two one-sided tests)."""
    down, up = math.log1p(-margin), math.log1p(margin)
    if down <= low and high <= up:
        return Status.PASS
    return Status.FAIL if low > up or high < down else Status.INCONCLUSIVE


def _smallest_more(bounds: Callable[[int], Bounds], margin: float) -> int | None:
    """Return how many further runs would settle it if the change stays what it is; null when none up to the most."""

    def settled(more: int) -> bool:
        return _settle(bounds(more), margin) is not Status.INCONCLUSIVE or more > MORE_RUNS_MAX

    found = smallest(settled, 1)
    return None if found > MORE_RUNS_MAX else found


def _verdict(
    found: Bounds,
    margin: float,
    spread: float,
    runs: tuple[int, int],
    more: tuple[int, int] | None,
    sharing: int,
    *,
    is_paired: bool,
) -> GateVerdict:
    """Return the verdict on a change of the logarithm with its bounds."""
    status = _settle(found, margin)
    ours, theirs = (None, None) if more is None else more
    return GateVerdict(
        status, _equivalence(found.low, found.high, margin), found.low > 0.0,
        math.expm1(found.seen), math.expm1(found.low), math.expm1(found.high), margin,
        spread, *runs, is_paired, ours, theirs, _words(status, found, margin, runs, sharing, is_paired=is_paired),
    )  # fmt: skip


def _words(
    status: Status, found: Bounds, margin: float, runs: tuple[int, int], sharing: int, *, is_paired: bool
) -> str:
    """Return the reason in words."""
    of = plural(runs[0], "pairs") if is_paired else f"{plural(runs[0], 'runs')} against {runs[1]:,}"
    change, lower, upper = (percent(math.expm1(value)) for value in (found.seen, found.low, found.high))
    told = f"{of}: changed by {change}, with 95 % confidence on each side between {lower} and {upper}"
    if status is Status.PASS:
        slower = "; a slowdown is proven, but a harmless one" if found.low > 0.0 else ""
        return f"{told}: no slower than the margin of {percent(margin)}{slower}."
    if status is Status.FAIL:
        beyond = f"beyond the margin of {percent(margin)}" if found.low > math.log1p(margin) else "a slowdown"
        return f"{told}: {beyond} is proven."
    if found.low > 0.0:
        return f"{told}: a slowdown if it stood alone, but not proven among {sharing} comparisons."
    return f"{told}: neither a slowdown nor that it stays within the margin of {percent(margin)} is proven."
