"""Quantiles with what can be said about them, and shares of slow requests with bounds.

One definition of a quantile everywhere: the smallest observed value that at least a share q of the values do not
exceed (type 1, "inverted CDF"; SQL's percentile_disc). It is always a latency that somebody waited, and it stays
meaningful when failures count as infinitely slow. A quantile is never averaged, and an interval that the sample cannot
carry is refused rather than guessed. Next: `slo`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from scipy import stats

from harness.analysis.dependence import Bools, Floats, Ints, modelled_inflation, seen_inflation

CONFIDENCE = 0.95
"""Of every one-sided bound, and of the two-sided interval of a quantile."""

MIN_EFFECTIVE = 300
MIN_EFFECTIVE_TAIL = 10
"""An interval of a quantile is given only from 300 effective requests with 10 of them in the tail: below, intervals by
effective size covered as little as 65 to 80 % instead of 95 %. How often those given cover, and what is left where a
service has a rare slow state that a short sample visits a dozen times: docs/evidence/quantiles-calibration.md."""

MODEL_WEIGHT = 1.0 / 3.0
"""How much the normal model of the tail counts in the width of an interval, beside the exceedances that are seen (as
exponent of a geometric mean). The model alone is needed where nothing was slow; of a sample's own quantile there are
always some above. Counted fully, intervals of a bimodal service's median covered 98.2 % instead of 95 %; not at all,
those of a median at a lag-1 correlation of 0.9 covered 92.8 %."""


@dataclasses.dataclass(frozen=True, slots=True)
class QuantileEstimate:
    """One quantile of one group of requests, failures counted as infinitely slow."""

    q: float  # 0.95 for a p95
    value_ms: float | None  # null when it falls among the failures: longer than anybody measured
    lower_ms: float | None  # two-sided 95 % interval; null when refused
    upper_ms: float | None  # null when refused, or when the interval reaches into the failures
    requests: int
    effective: float  # independent requests that they are worth; where refused, by the stricter view
    refusal: str | None  # why there is no interval; null when there is one


def quantile(values: Floats, q: float) -> float:
    """Return the smallest value that at least a share q of `values` (n_requests,) do not exceed. Needs n >= 1."""
    # q * n is a whole number more often than binary fractions admit: 0.07 * 100 is 7.000000000000001.
    rank = math.ceil(round(q * len(values), 9))
    return float(np.partition(values, max(rank, 1) - 1)[max(rank, 1) - 1])


def estimate_quantile(latency: Floats, q: float, groups: Ints) -> QuantileEstimate:
    """Return a quantile of latencies (n_requests,), in sending order, failures as infinity, with its interval.

    The interval runs between order statistics: the ranks at which a binomial with the effective number of requests
    would put the quantile (Clopper and Pearson 1934 on the effective size).
    """
    n = len(latency)
    if n == 0:
        return QuantileEstimate(q, None, None, None, 0, 0.0, "no such request")
    value = quantile(latency, q)
    seen, modelled = seen_inflation(latency > value, groups), modelled_inflation(latency, 1.0 - q, groups)
    effective = max(1.0, n / max(seen, modelled))
    refusal = None
    if effective < MIN_EFFECTIVE:
        refusal = f"effective sample size for the p{q * 100:g} is {effective:.0f}; an interval needs {MIN_EFFECTIVE}"
    elif effective * min(q, 1.0 - q) < MIN_EFFECTIVE_TAIL:
        need = math.ceil(MIN_EFFECTIVE_TAIL / min(q, 1.0 - q) - 1e-9)
        refusal = f"effective sample size for the p{q * 100:g} is {effective:.0f}; its interval needs {need}"
    if refusal is not None:
        return QuantileEstimate(q, _finite(value), None, None, n, effective, refusal)
    effective = n / (seen ** (1.0 - MODEL_WEIGHT) * max(seen, modelled) ** MODEL_WEIGHT)
    alpha = (1.0 - CONFIDENCE) / 2.0
    low, high = binomial_bounds(q * effective, effective, alpha)
    lower, upper = quantile(latency, low), quantile(latency, high)
    return QuantileEstimate(q, _finite(value), _finite(lower), _finite(upper), n, effective, None)


def share_bounds(is_slow: Bools, effective: float) -> tuple[float, float]:
    """Return the one-sided 95 % lower and upper bounds of the share of slow requests (exact binomial).

    `is_slow` has shape (n_requests,); the observed share is kept and the size is the effective one.
    """
    n = len(is_slow)
    return binomial_bounds(float(is_slow.sum()) * effective / n, effective, 1.0 - CONFIDENCE)


def more_for_share(is_slow: Bools, effective: float, limit: float) -> int | None:
    """Return how many more requests like these would settle whether the share of slow ones is under `limit`.

    Null when no number would, because the share seen is the limit itself.
    """
    n, slow = len(is_slow), float(is_slow.sum())
    worth, share = effective / n, slow / n
    if share == limit:
        return None

    def settled(count: int) -> bool:
        low, high = binomial_bounds(share * count * worth, count * worth, 1.0 - CONFIDENCE)
        return high <= limit if share < limit else low > limit

    return smallest(settled, n) - n


def smallest(holds: Callable[[int], bool], start: int) -> int:
    """Return the smallest count from `start` for which a condition that stays true holds; stops at a billion."""
    low, high = start, max(start, 1)
    while not holds(high) and high < 10**9:
        low, high = high, high * 2
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return high


def binomial_bounds(slow: float, size: float, alpha: float) -> tuple[float, float]:
    """Return the Clopper-Pearson bounds of a share, each with error `alpha`; counts need not be whole."""
    low = float(stats.beta.ppf(alpha, slow, size - slow + 1.0)) if slow > 0.0 else 0.0
    high = float(stats.beta.ppf(1.0 - alpha, slow + 1.0, size - slow)) if slow < size else 1.0
    return low, high


def _finite(value: float) -> float | None:
    """Return the value, or null for the infinity that stands for a failure."""
    return value if math.isfinite(value) else None
