"""Means and rates with bounds, over units that are independent by design: runs, or bursts.

A mean over runs and a rate such as ticks per busy second are both a ratio of two sums over the units, so one function
bounds both. Correlation of neighbouring units in time widens the bounds. Next: `slo`.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy import stats

from harness.analysis.dependence import Floats, series_inflation
from harness.analysis.quantiles import CONFIDENCE, smallest

MIN_UNITS = 3
"""Units below which no bound is given: two values say next to nothing about their spread."""


@dataclasses.dataclass(frozen=True, slots=True)
class RatioBounds:
    """A ratio of two sums with its one-sided 95 % bounds."""

    estimate: float  # sum of numerators over sum of denominators
    lower: float | None  # null when refused
    upper: float | None  # null when refused
    units: int
    effective: float  # independent units that they are worth
    error_per_unit: float  # standard error that a single effective unit would have


def ratio_bounds(numerators: Floats, denominators: Floats) -> RatioBounds:
    """Bound a ratio of sums over units, both of shape (n_units,) in the order of time. Needs n >= 1.

    Linearised variance of a ratio and Student's t with the effective number of units less one (Cochran 1977, 6.3).
    With all denominators 1 this is the usual interval of a mean.
    """
    n = len(numerators)
    estimate = float(numerators.sum() / denominators.sum())
    residuals = (numerators - estimate * denominators) / denominators.mean()
    effective = max(1.0, n / series_inflation(residuals))
    if n < MIN_UNITS:
        return RatioBounds(estimate, None, None, n, effective, math.nan)
    spread = float(np.sqrt((residuals**2).sum() / (n - 1)))
    half = _half_width(effective, spread)
    return RatioBounds(estimate, estimate - half, estimate + half, n, effective, spread)


def more_for_ratio(bounds: RatioBounds, limit: float) -> int | None:
    """Return how many more units like these would settle on which side of `limit` the ratio lies.

    Null when no number would, because the estimate is the limit itself.
    """
    if bounds.units < MIN_UNITS:
        return MIN_UNITS - bounds.units
    gap = abs(limit - bounds.estimate)
    if gap == 0.0:
        return None
    worth = bounds.effective / bounds.units
    settled = smallest(lambda count: _half_width(count * worth, bounds.error_per_unit) < gap, bounds.units)
    return settled - bounds.units


def _half_width(effective: float, spread: float) -> float:
    """Return Student's t times the standard error; never fewer than one degree of freedom."""
    freedom = max(effective - 1.0, 1.0)
    return float(stats.t.ppf(CONFIDENCE, freedom)) * spread / math.sqrt(effective)
