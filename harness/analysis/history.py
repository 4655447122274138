"""When did a figure change for good, over many reports? Tables in, tables out.

The series is one figure of each report, such as a p95, in their order. Change points are found by kernel segmentation
(Arlot, Celisse and Harchaoui 2019; `ruptures.KernelCPD`) of the logarithms, in units of the noise between neighbouring
reports. The kernel is Gaussian: a single report that is far off counts little more than one that is somewhat off, so a
spike is no change. What is flagged by chance: docs/evidence/history-calibration.md.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import ruptures

from harness.analysis.dependence import Floats

POINTS_MIN = 10
"""Fewest reports that are looked at: with fewer, the noise between neighbours is a guess."""

GAMMA = 0.1
"""Width of the kernel, exp(-GAMMA * d^2) with d in units of the noise: at three times the noise two reports have little
in common, and beyond nothing less."""

PENALTY = 1.15
"""What a further change point must gain. Chosen by calibration: fewer than one of ten stationary series is flagged."""

SHORTEST = 2
"""Reports between two change points at least: one report is a spike."""

MAD_TO_SIGMA = 1.4826
"""From the median absolute deviation to the standard deviation of a normal distribution."""


@dataclasses.dataclass(frozen=True, slots=True)
class ChangePoint:
    """A report from which on the figure is another."""

    index: int  # of the first report of the new level
    before: float  # geometric mean of the level that ended, in the figure's unit
    after: float  # of the level that began

    @property
    def change(self) -> float:
        """Return the change as a share: 0.1 = 10 % more."""
        return self.after / self.before - 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class History:
    """What a series of reports shows."""

    reports: int
    noise: float | None  # from report to report, as a share; null when refused
    changes: tuple[ChangePoint, ...]
    refusal: str | None  # why it was not looked at; null when it was


def change_points(values: Floats) -> History:
    """Return the change points of a figure above 0 over reports (n_reports,), in their order.

    Infinity, a figure that lies among the failures, and values that are not above 0 refuse the series.
    """
    n = len(values)
    if n < POINTS_MIN:
        return History(n, None, (), f"{n} reports are too few to tell noise from change: {POINTS_MIN} are needed")
    if not (np.isfinite(values).all() and (values > 0.0).all()):
        return History(n, None, (), "a report's figure is no finite number above 0")
    logs = np.log(values)
    steps = np.diff(logs)
    noise = MAD_TO_SIGMA * float(np.median(np.abs(steps - np.median(steps)))) / math.sqrt(2.0)
    # A figure that hardly ever moves has no noise to count in: a thousandth of it is then the unit.
    scaled = (logs - np.median(logs)) / max(noise, 1e-3)
    search = ruptures.KernelCPD(kernel="rbf", min_size=SHORTEST, params={"gamma": GAMMA})
    ends = [int(end) for end in search.fit(scaled.reshape(-1, 1)).predict(pen=PENALTY)]
    edges = [0, *ends]
    levels = [float(np.exp(logs[a:b].mean())) for a, b in itertools.pairwise(edges)]
    found = zip(ends[:-1], levels[:-1], levels[1:], strict=True)
    return History(n, noise, tuple(ChangePoint(*one) for one in found), None)
