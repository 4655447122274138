"""Did latency drift during a soak? Tables in, tables out.

"No drift" is proven, not assumed: the change over the whole soak must lie within the margin with 95 % confidence on
either side (two one-sided tests, Schuirmann 1987). The change is the slope of a line through the logarithms of the
minutes' medians, times the duration. Minutes resemble their neighbours, so they are first averaged in nine equal bins,
six where the resemblance is strong: bins of ten minutes and more hardly resemble each other, and Student's t on so few
of them is honest where a test on all minutes would raise false alarms in up to half of all soaks (Mann and Kendall's).
What little resemblance is left between the bins widens the bounds.

A minute in which most requests failed has no median: failures count as infinitely slow, and such a soak fails.
What it costs and how often it is wrong: docs/evidence/drift-calibration.md. Next: `regression`, between soaks.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
from scipy import stats
from scipy.linalg import toeplitz
from statsmodels.tsa.stattools import acf

from harness.analysis.dataset import moment_ns, waited_ms
from harness.analysis.dependence import Floats
from harness.analysis.quantiles import CONFIDENCE, quantile
from harness.analysis.slo import Status, percent, plural

MINUTES_MIN = 80
"""Fewest minutes that are judged. With sixty, bins resemble each other too much where minutes correlate by 0.8, and
8.5 % of soaks with a drift of the whole margin passed."""

EMPTY_SHARE_MAX = 0.1
"""Most minutes without a request that a soak may have: beyond, its bins are not what they seem."""

BINS, BINS_CORRELATED, CORRELATED = 9, 6, 0.6
"""Nine bins, six where neighbouring minutes correlate by more than 0.6."""

POWER = 0.9
"""Probability with which the minutes that an open verdict asks for settle it, where nothing drifts."""

ROBUST_POINTS = 200
"""Points whose pairs the robust slope is taken from: 19,900 pairs; a week of minutes would be fifty million."""

MINUTES_MAX = 7 * 24 * 60
"""Longest soak that is asked for: a week. Beyond, the question is said to be open for good."""


@dataclasses.dataclass(frozen=True, slots=True)
class DriftVerdict:
    """What the minutes of a soak prove. Changes are shares over the whole soak: 0.03 = 3 % slower at its end."""

    status: Status  # PASS: no drift beyond the margin; FAIL: a drift beyond it
    change: float | None  # least squares on the bins; null when refused
    lower: float | None  # two one-sided 95 % bounds of it
    upper: float | None
    change_robust: float | None  # Theil and Sen's, on the minutes: to look at, not judged
    margin: float  # share by which the level may move
    minutes: int  # whole ones, with a request or without
    bins: int  # that the minutes were averaged in
    correlation: float | None  # of neighbouring minutes
    noise: float | None  # standard deviation of a minute's median around the line, as a share
    more_minutes: int | None  # further minutes that would settle it; null when settled or not to be told
    reason: str  # one or two plain sentences


def minute_medians(rows: pd.DataFrame) -> Floats:
    """Return the median latency in ms of each whole minute from the first request on, shape (n_minutes,).

    `rows` has the columns of `sample.Sample`, of one endpoint and one measurement. NaN where no request was due,
    infinity where at least half of them failed. The last minute, cut short by the end, is left out.
    """
    if rows.empty:
        return np.empty(0)
    at = moment_ns(rows).astype("int64").to_numpy()
    minute = (at - at.min()) // 60_000_000_000
    waited, whole = waited_ms(rows), int(minute.max())
    medians = np.full(whole, np.nan)
    order = np.argsort(minute, kind="stable")
    starts = np.searchsorted(minute[order], np.arange(whole + 1))
    for number in range(whole):
        part = waited[order[starts[number] : starts[number + 1]]]
        if len(part):
            medians[number] = quantile(part, 0.5)
    return medians


def judge_drift(medians: Floats, margin: float) -> DriftVerdict:
    """Return what the medians of a soak's minutes (n_minutes,), as of `minute_medians`, prove about drift.

    `margin` is the share by which the level may move over the whole soak, 0.05 = 5 % up or down; it lies between 0
    and 1, both exclusive.
    """
    if not 0.0 < margin < 1.0:
        raise ValueError(f"a margin lies between 0 and 1, not {margin}")
    minutes = len(medians)
    refusal = _refusal(medians)
    if refusal is not None:
        status, reason = refusal
        more = MINUTES_MIN - minutes if minutes < MINUTES_MIN and status is Status.INCONCLUSIVE else None
        return DriftVerdict(status, None, None, None, None, margin, minutes, 0, None, None, more, reason)
    known = np.flatnonzero(~np.isnan(medians))
    at, logs = (known + 0.5) / minutes, np.log(medians[known])
    line = stats.linregress(at, logs)
    residuals = logs - line.intercept - line.slope * at
    correlation = _neighbours(residuals)
    bins = _bins(correlation)
    edges = np.floor(at * bins).astype(np.int64)
    counts = np.bincount(edges, minlength=bins)
    fit = stats.linregress(np.bincount(edges, at, bins) / counts, np.bincount(edges, logs, bins) / counts)
    # Bins that are all equal have no scatter, and linregress then tells no error at all.
    error = float(np.nan_to_num(fit.stderr)) * _understated(minutes / bins, bins, correlation)
    half = float(stats.t.ppf(CONFIDENCE, bins - 2)) * error
    low, high = float(fit.slope) - half, float(fit.slope) + half
    status = _settle(low, high, margin)
    noise = float(residuals.std(ddof=2))
    return DriftVerdict(
        status,
        math.expm1(float(fit.slope)),
        math.expm1(low),
        math.expm1(high),
        math.expm1(_robust_slope(at, logs)),
        margin,
        minutes,
        bins,
        correlation,
        noise,
        _more_minutes(float(fit.slope), noise, correlation, minutes, margin) if status is Status.INCONCLUSIVE else None,
        _words(status, float(fit.slope), low, high, margin, minutes),
    )


def _refusal(medians: Floats) -> tuple[Status, str] | None:
    """Return the verdict on minutes that no line can be laid through, with its reason."""
    minutes, empty = len(medians), int(np.isnan(medians).sum())
    failed = int(np.isinf(medians).sum())
    if failed and failed < minutes - empty:
        words = (
            f"In {failed} of {plural(minutes, 'minutes')} at least half of the requests failed: they waited without end"
        )
        return Status.FAIL, f"{words}, and the other minutes did not."
    if failed:
        return (
            Status.INCONCLUSIVE,
            "At least half of the requests failed in every minute: there is no level to compare.",
        )
    if minutes < MINUTES_MIN:
        return (
            Status.INCONCLUSIVE,
            f"{plural(minutes, 'whole minutes')} prove no drift and none: {MINUTES_MIN} are needed.",
        )
    if empty > EMPTY_SHARE_MAX * minutes:
        return (
            Status.INCONCLUSIVE,
            f"{empty} of {plural(minutes, 'minutes')} hold no request: too many to lay a line through.",
        )
    if float(np.nanmin(medians)) <= 0.0:
        return Status.INCONCLUSIVE, "A minute's median is 0 ms: the change of a level of nothing has no share."
    return None


def _neighbours(residuals: Floats) -> float:
    """Return the correlation of neighbouring minutes, raised by what a line laid through them takes off it.

    A line takes about (2 + 4 rho) / n off the estimate (Kendall 1954, for a fitted trend); never below 0.
    """
    if float(np.ptp(residuals)) < 1e-12:
        return 0.0
    seen = float(acf(residuals, nlags=1, fft=True)[1])
    n = len(residuals)
    return float(np.clip((seen * n + 2.0) / (n - 4.0), 0.0, 0.99))


def _understated(size: float, bins: int, correlation: float) -> float:
    """Return by what factor the scatter of bins of `size` minutes understates the error of the slope through them.

    If minutes correlate as an autoregression of first order does, so do the bins a little: sqrt(w S w' / s^2), 1 where
    minutes are independent and 1.17 for six bins of 15 minutes that correlate by 0.8. Without it, 7 to 9 % of soaks at
    the margin were judged wrongly there; with it, 5 to 6 %.
    Where: S is the covariance of the bins' means, w the weights of the slope, s^2 the error that residuals are expected
    to show. Between bins k apart S is rho^((k-1) size + 1) * ((1 - rho^size) / (1 - rho) / size)^2.
    """
    if correlation <= 0.0:
        return 1.0
    rest = 1.0 - correlation
    once = (1.0 - correlation**size) / rest / size
    apart = np.arange(bins)
    cross = correlation ** ((np.maximum(apart, 1) - 1) * size + 1) * once**2
    cross[0] = ((1.0 + correlation) / rest - 2.0 * correlation * once / rest) / size
    covariance = toeplitz(cross)
    middles = (apart - apart.mean()) / bins
    weights = middles / (middles @ middles)
    design = np.column_stack([np.ones(bins), middles])
    leftover = np.eye(bins) - design @ np.linalg.solve(design.T @ design, design.T)
    shown = float(np.trace(leftover @ covariance)) / (bins - 2) / float(middles @ middles)
    return max(1.0, math.sqrt(float(weights @ covariance @ weights) / shown))


def _robust_slope(at: Floats, logs: Floats) -> float:
    """Return Theil and Sen's slope; beyond ROBUST_POINTS, of the medians of neighbouring minutes."""
    group = -(-len(at) // ROBUST_POINTS)
    starts = range(0, len(at), group)
    middles = np.array([at[start : start + group].mean() for start in starts])
    levels = np.array([np.median(logs[start : start + group]) for start in starts])
    return float(stats.theilslopes(levels, middles).slope)


def _settle(low: float, high: float, margin: float) -> Status:
    """Compare the bounds of a change of the logarithm with the margin, up and down."""
    down, up = math.log1p(-margin), math.log1p(margin)
    if down < low and high < up:
        return Status.PASS
    return Status.FAIL if low >= up or high <= down else Status.INCONCLUSIVE


def _more_minutes(slope: float, noise: float, correlation: float, minutes: int, margin: float) -> int | None:
    """Return how many more minutes would settle an open verdict; null when none below MINUTES_MAX would.

    Where the change seen lies within the margin, so many are asked for that a soak without any drift is proven with
    probability POWER; where that is no more than there are, or the change lies outside, so many that this very change
    is settled.
    """
    bound = math.log1p(margin)
    planned = minutes_needed(noise, correlation, margin)
    if abs(slope) >= bound or planned is None or planned <= minutes:
        gap = abs(bound - abs(slope))
        t = float(stats.t.ppf(CONFIDENCE, _bins(correlation) - 2))
        exact = _slope_variance(noise, correlation) * (t / gap) ** 2 if gap > 0.0 else math.inf
        planned = math.ceil(exact) if exact <= MINUTES_MAX else None
    return None if planned is None else max(1, planned - minutes)


def minutes_needed(noise: float, correlation: float, margin: float) -> int | None:
    """Return how many minutes a soak without drift needs to be proven still with probability POWER; null above a week.

    `noise` is the standard deviation of a minute's median as a share, `correlation` that of neighbouring minutes.
    """
    t = float(stats.t.ppf(CONFIDENCE, _bins(correlation) - 2))
    spare = float(stats.norm.ppf((1.0 + POWER) / 2.0))
    minutes = _slope_variance(noise, correlation) * ((t + spare) / math.log1p(margin)) ** 2
    return max(MINUTES_MIN, math.ceil(minutes)) if minutes <= MINUTES_MAX else None


def _slope_variance(noise: float, correlation: float) -> float:
    """Return the variance of slope * duration, times the minutes: 12 * noise^2 * (1 + rho) / (1 - rho)."""
    return 12.0 * noise**2 * (1.0 + correlation) / (1.0 - correlation)


def _bins(correlation: float) -> int:
    """Return in how many bins minutes are averaged."""
    return BINS_CORRELATED if correlation > CORRELATED else BINS


def _words(status: Status, slope: float, low: float, high: float, margin: float, minutes: int) -> str:
    """Return the reason in words."""
    change, lower, upper = (math.expm1(value) for value in (slope, low, high))
    seen = (
        f"Over {plural(minutes, 'minutes')} the median changed by {percent(change)}, with 95 % confidence on each side "
        f"between {percent(lower)} and {percent(upper)}"
    )
    if status is Status.PASS:
        return f"{seen}: within the margin of {percent(margin)}."
    if status is Status.FAIL:
        return f"{seen}: beyond the margin of {percent(margin)}."
    return f"{seen}: neither within the margin of {percent(margin)} nor beyond it."
