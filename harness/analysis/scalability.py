"""How throughput grows with load: the universal scalability law (Gunther 2007), fitted to runs.

X(N) = gamma N / (1 + alpha (N - 1) + beta N (N - 1)).
Where: X is throughput, N the load (requests in flight, workers), gamma the throughput of one, alpha the share that must
wait its turn, beta the cost of agreeing with all others.

The peak of the curve, at sqrt((1 - alpha) / beta), is said only if the load went past it by a fifth: a fit to loads
below the peak invents one, at anything from half to hundreds of times the truth. Else the highest load measured is a
lower bound. Intervals are percentile bootstrap over whole runs, because points of one run share its fate.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from arch.bootstrap import IIDBootstrap
from scipy.optimize import curve_fit

from harness.analysis.dependence import Floats

PAST_PEAK = 1.2
"""How far beyond the fitted peak the load must have gone for the peak to be said."""

LEVELS_MIN = 4
"""Different loads at least: the curve has three parameters."""

REPLICATES = 500
"""Of the bootstrap."""


@dataclasses.dataclass(frozen=True, slots=True)
class Scalability:
    """The fitted law, and its peak if the load went past it."""

    per_one: float | None  # gamma, throughput of a load of one; null when refused
    contention: float | None  # alpha
    coherence: float | None  # beta
    peak_load: float | None  # null unless the load went past it
    peak_load_interval: tuple[float, float] | None  # 95 %, over runs; null with the peak
    peak_throughput: float | None
    load_max: float | None  # the highest load measured: a lower bound of the peak where that is null
    throughput_at_load_max: float | None  # mean there
    reason: str


def throughput_at(load: Floats, per_one: float, contention: float, coherence: float) -> Floats:
    """Return the law's throughput at each load (n,)."""
    return np.asarray(per_one * load / (1.0 + contention * (load - 1.0) + coherence * load * (load - 1.0)))


def fit_scalability(load: Floats, throughput: Floats, seed: int) -> Scalability:
    """Fit the law to runs: each had one load and came to one throughput, both of shape (n_runs,).

    `seed` is of the bootstrap; the same gives the same interval.
    """
    levels = len(np.unique(load))
    most = float(load.max()) if len(load) else None
    at_most = float(throughput[load == most].mean()) if most is not None else None
    if levels < LEVELS_MIN:
        reason = f"{levels} different loads say nothing of the curve between them: {LEVELS_MIN} are needed."
        return Scalability(None, None, None, None, None, None, most, at_most, reason)
    found = _fit(load, throughput)
    if found is None or most is None:
        return Scalability(None, None, None, None, None, None, most, at_most, "No curve of this law fits these runs.")
    peak = _peak(found)
    if most < PAST_PEAK * peak:
        reason = f"The load did not go past the peak: {most:g} is a lower bound of it."
        return Scalability(*found, None, None, None, most, at_most, reason)

    def peak_of(some_load: Floats, some_throughput: Floats) -> Floats:
        again = _fit(some_load, some_throughput) if len(np.unique(some_load)) >= LEVELS_MIN else None
        return np.array([math.nan if again is None else _peak(again)])

    drawn = IIDBootstrap(load, throughput, seed=np.random.default_rng(seed)).apply(peak_of, REPLICATES)[:, 0]
    low, high = np.nanquantile(drawn, [0.025, 0.975], method="inverted_cdf")
    best = float(throughput_at(np.array([peak]), *found)[0])
    reason = f"Throughput peaks at a load of {peak:.3g}, with 95 % confidence between {low:.3g} and {high:.3g}."
    return Scalability(*found, peak, (float(low), float(high)), best, most, at_most, reason)


def _fit(load: Floats, throughput: Floats) -> tuple[float, float, float] | None:
    """Return gamma, alpha and beta by least squares on shares of the throughput; null when the search does not end."""
    start = (float((throughput / load).max()), 0.05, 1e-4)
    try:
        values, _ = curve_fit(
            throughput_at, load, throughput, p0=start, sigma=np.maximum(throughput, 1e-9),
            bounds=([0.0, 0.0, 0.0], [np.inf, 1.0, 1.0]), max_nfev=2_000,
        )  # fmt: skip
    except RuntimeError:  # what curve_fit raises when it did not converge
        return None
    return float(values[0]), float(values[1]), float(values[2])


def _peak(found: tuple[float, float, float]) -> float:
    """Return the load at which the law has its peak; infinity without a cost of agreeing."""
    _, contention, coherence = found
    return math.sqrt((1.0 - contention) / coherence) if coherence > 0.0 else math.inf
