"""How many independent requests a sample is worth.

Requests repeat each other in two ways: neighbours in time meet the same queue, and requests of one group (a run, a
burst) share its fate. Both make a sample of n requests worth fewer than n, and a bound that ignores this is too sure
of itself: at a lag-1 correlation of 0.9 a nominal 95 % interval for a p95 covers about 51 %.

Whether one request is *slow* is what a bound counts, so the correlation of slowness is what matters. Where some
requests were slow it is estimated from them. Where none or few were, nothing can be seen in them, so it is also
estimated from the ranks of all latencies, carried to the tail by the bivariate normal: whichever says more wins.
Next: `quantiles`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import special, stats
from statsmodels.tsa.stattools import acf

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

SERIES_MIN = 20
"""Observations below which no correlation in time is estimated: its noise would be larger than itself. Samples this
small prove a mean only when it is far from its target, and a p95 never."""

COLD_SHARE = 0.2
"""Of the requests, from the first on, in which no memory is looked for: they may be a cold start."""

FADING_LAGS_MAX = 10_000
"""Lags to which a geometric fading is carried: 0.999^10,000 is 5e-5."""

SEEN_LAGS_MAX = 1_000
"""Lags at which correlation is looked for: waves of up to so many requests are recognised."""

NEGLIGIBLE = 1e-4
"""Correlation of scores that no longer counts."""

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)


def effective_size(is_slow: Bools, tail_share: float, groups: Ints, latency: Floats | None = None) -> float:
    """Return how many independent requests these are worth, between 1 and n.

    All arrays have shape (n_requests,), in the order of sending. `tail_share` is the share of slow requests that is in
    question (0.05 for a p95). `groups` numbers the run or the burst of each. `latency` holds infinity for failures.
    """
    n = len(is_slow)
    if n == 0:
        return 0.0
    modelled = 1.0 if latency is None else modelled_inflation(latency, tail_share, groups)
    return max(1.0, n / max(seen_inflation(is_slow, groups), modelled))


def seen_inflation(is_slow: Bools, groups: Ints) -> float:
    """Return by what factor the slow requests (n_requests,) vary more than independent ones; 1 where none is seen."""
    if not is_slow.any() or is_slow.all():
        return 1.0
    seen = is_slow.astype(np.float64)
    return max(1.0, series_inflation(seen), _group_inflation(_intraclass(seen, groups), groups))


def modelled_inflation(latency: Floats, tail_share: float, groups: Ints) -> float:
    """Return the same for exceeding the upper `tail_share`, from the ranks of all latencies (n_requests,)."""
    scores = normal_scores(latency)
    if scores is None:
        return 1.0
    in_tail = exceedance_correlation(np.array([_intraclass(scores, groups)]), tail_share)[0]
    return max(1.0, _tail_inflation(scores, tail_share), _group_inflation(in_tail, groups))


def series_inflation(series: Floats) -> float:
    """Return by what factor correlation in time inflates the variance of the mean of a series (n_requests,).

    1 + 2 * sum of autocorrelations, cut where the sum of a neighbouring pair first falls to 0 (Geyer 1992, initial
    positive sequence); never below 1, and 1 for fewer than SERIES_MIN values.
    """
    n = len(series)
    if n < SERIES_MIN or np.ptp(series) == 0.0:
        return 1.0
    rho = np.asarray(acf(series, nlags=n // 2, fft=True), dtype=np.float64)
    pairs = rho[: len(rho) // 2 * 2].reshape(-1, 2).sum(axis=1)
    ends = np.flatnonzero(pairs <= 0.0)
    kept = rho[1 : 2 * int(ends[0])] if len(ends) else rho[1:]
    return max(1.0, 1.0 + 2.0 * float(kept.sum()))


def _tail_inflation(scores: Floats, tail_share: float) -> float:
    """Return the inflation for exceeding the upper `tail_share`, from normal scores (n_requests,).

    The larger of two views, because each is blind to something. One takes the correlation of neighbours and lets it
    fade geometrically: it sees a long memory in a short sample. The other adds up the correlations that are there, up
    to a tenth of the sample: requests that come in waves resemble each other as much ten places apart as next to each
    other, and a geometric fading from neighbours would call such a wave short. The second leaves out the first fifth,
    since a cold start (a first wave that is slower than the rest, and far from any target) spreads over all lags of a
    short sample and would be taken for a memory that long.
    """
    if len(scores) < SERIES_MIN:
        return 1.0
    neighbours = float(np.clip(acf(scores, nlags=1, fft=True)[1], 0.0, 0.999))
    fading = neighbours ** np.arange(1, min(len(scores), FADING_LAGS_MAX))
    views = (np.asarray(fading, dtype=np.float64), _seen_correlations(scores[int(COLD_SHARE * len(scores)) :]))
    return 1.0 + 2.0 * max(float(exceedance_correlation(rho[rho > NEGLIGIBLE], tail_share).sum()) for rho in views)


def _seen_correlations(scores: Floats) -> Floats:
    """Return the autocorrelations of scores (n,) from lag 1 until a pair of them sums to 0 or less (Geyer 1992).

    Each is raised by what estimating the mean from the same series takes off it, its inflation over n (Marriott and
    Pope 1954). Up to a tenth of the series: beyond, the noise of the estimates adds up to more than they do.
    """
    lags = min(len(scores) // 10, SEEN_LAGS_MAX)
    if lags < 2 or np.ptp(scores) == 0.0:
        return np.empty(0)
    rho = np.asarray(acf(scores, nlags=lags, fft=True), dtype=np.float64)[1:]
    pairs = rho[: len(rho) // 2 * 2].reshape(-1, 2).sum(axis=1)
    ends = np.flatnonzero(pairs <= 0.0)
    kept = rho[: 2 * int(ends[0])] if len(ends) else rho
    bias = (1.0 + 2.0 * float(kept.sum())) / len(scores)
    return np.asarray(kept + bias * (1.0 - kept), dtype=np.float64)


def exceedance_correlation(rho: Floats, tail_share: float) -> Floats:
    """Return the correlation of "above the upper `tail_share`" for bivariate normals correlated by `rho`.

    cov = 1/(2 pi) * integral over t from 0 to arcsin(rho) of exp(-z^2 / (1 + sin t)) (Owen 1956).
    Where: z is the normal quantile at 1 - tail_share. Negative correlations count as none: they only help.
    """
    z = special.ndtri(1.0 - tail_share)
    top = np.arcsin(np.clip(rho, 0.0, 1.0))[:, None]
    angles = top * (_NODES + 1.0) / 2.0
    integral = (np.exp(-(z**2) / (1.0 + np.sin(angles))) * _WEIGHTS).sum(axis=1) * top[:, 0] / 2.0
    correlation: Floats = integral / (2.0 * np.pi * tail_share * (1.0 - tail_share))
    return correlation


def normal_scores(latency: Floats) -> Floats | None:
    """Return each latency's normal score by rank, ties averaged; None when all are equal."""
    if len(latency) < 2 or bool(np.all(latency == latency[0])):
        return None
    ranks = stats.rankdata(latency)
    return np.asarray(special.ndtri((ranks - 0.5) / len(latency)), dtype=np.float64)


def _intraclass(values: Floats, groups: Ints) -> float:
    """Return the correlation of two values of one group (one-way analysis of variance), not below 0."""
    _, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    n, k = len(values), len(sizes)
    if k < 2 or n == k:
        return 0.0
    means = np.bincount(codes, weights=values) / sizes
    within = float(((values - means[codes]) ** 2).sum()) / (n - k)
    between = float((sizes * (means - values.mean()) ** 2).sum()) / (k - 1)
    size = (n - float((sizes**2).sum()) / n) / (k - 1)
    spread = between + (size - 1.0) * within
    return max(0.0, (between - within) / spread) if spread > 0.0 else 0.0


def _group_inflation(intraclass: float, groups: Ints) -> float:
    """Return the design effect of groups whose members are correlated: 1 + (size - 1) * correlation (Kish 1965)."""
    sizes = np.unique(groups, return_counts=True)[1].astype(np.float64)
    size = float((sizes**2).sum() / sizes.sum())
    return 1.0 + (size - 1.0) * float(intraclass)
