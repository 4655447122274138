"""Where does the warm-up end? By a rule that is fixed beforehand, and that may answer "never".

The rule is MSER-5 (White 1997, Simulation 69:323-334): of all places to cut, the one that leaves the mean of the rest
with the smallest standard error, over means of five neighbours. What is averaged are normal scores by rank, so that one
slow request, or a failure, weighs no more than the slowest. When the best place lies in the second half, or the rest
still rises or falls beyond doubt, the series never became steady and there is no rest to judge. Nothing is
cut by eye, and nothing is cut twice.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy import stats

from harness.analysis.dependence import Floats, normal_scores, series_inflation

BATCH = 5
"""Neighbours averaged before the rule looks."""

BATCHES_MIN = 20
"""Batches that are looked at at least: with fewer, the best place to cut is chance."""

TAIL_BATCHES = 5
"""Batches at the end before which a cut must lie: the spread of fewer is by chance as small as one likes."""


MOVES_AT = 4.0
"""Standard errors of its slope, widened by the resemblance of neighbours, beyond which the rest still moves."""


@dataclasses.dataclass(frozen=True, slots=True)
class WarmUp:
    """What the rule says of one series."""

    cut: int | None  # requests to leave out; null when the series never became steady, or is too short
    requests: int
    is_steady: bool
    reason: str  # one plain sentence


def find_warm_up(latency: Floats) -> WarmUp:
    """Return how many of these latencies (n_requests,), in sending order, failures as infinity, are warm-up."""
    n = len(latency)
    batches = n // BATCH
    if batches < BATCHES_MIN:
        needed = BATCHES_MIN * BATCH
        return WarmUp(
            None, n, is_steady=False, reason=f"{n} requests are too few to see a warm-up: {needed} are needed."
        )
    scores = normal_scores(latency)
    if scores is None:
        return WarmUp(0, n, is_steady=True, reason="All latencies are equal: there is no warm-up.")
    means = scores[: batches * BATCH].reshape(batches, BATCH).mean(axis=1)
    # Sums from each place to the end: the standard error of what is left, squared.
    left = np.arange(batches, 0, -1)
    sums, squares = np.cumsum(means[::-1])[::-1], np.cumsum(means[::-1] ** 2)[::-1]
    errors = (squares - sums**2 / left) / left**2
    best = int(np.argmin(errors[: batches - TAIL_BATCHES]))
    if best > batches / 2:
        return WarmUp(None, n, is_steady=False, reason="It never became steady: the best place to cut is near its end.")
    if _still_moves(means[best:]):
        return WarmUp(None, n, is_steady=False, reason="It never became steady: what is left still rises or falls.")
    cut = best * BATCH
    told = "There is no warm-up." if cut == 0 else f"The first {cut} of {n} requests are warm-up."
    return WarmUp(cut, n, is_steady=True, reason=told)


def _still_moves(means: Floats) -> bool:
    """Say whether a line through batch means (n,) rises or falls beyond doubt."""
    at = np.arange(len(means), dtype=np.float64)
    line = stats.linregress(at, means)
    residuals = means - line.intercept - line.slope * at
    error = float(np.nan_to_num(line.stderr)) * math.sqrt(series_inflation(np.asarray(residuals, dtype=np.float64)))
    return abs(float(line.slope)) > MOVES_AT * error
