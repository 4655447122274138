"""Histories of reports whose change points are known, how often they are found, and the page that says it."""

from __future__ import annotations

import dataclasses
import enum

import numpy as np

from harness.analysis.dependence import Floats
from harness.analysis.history import change_points
from tests.calibration.effort import Bar, Effort, bar_list, carry_out, random_of, written_by

REPORTS = 100
NOISE = 0.03
NEAR = 2
"""Reports by which a found change may be off."""


class Noise(enum.StrEnum):
    """How reports differ from their level."""

    NORMAL = "normal"
    HEAVY = "heavy"  # Student's t with four degrees of freedom, of the same standard deviation
    SPIKES = "spikes"  # normal, and one report of 33 is a fifth slower


@dataclasses.dataclass(frozen=True)
class Reports:
    """One world."""

    noise: Noise
    step: float  # by which the level rises, as a share; 0: it never does
    after: int  # reports after the step
    trials: int

    def draw(self, random: np.random.Generator) -> Floats:
        """Return the figure of each report."""
        logs = NOISE * random.standard_normal(REPORTS)
        if self.noise is Noise.HEAVY:
            logs = NOISE * random.standard_t(4.0, REPORTS) / np.sqrt(2.0)
        if self.noise is Noise.SPIKES:
            logs = logs + np.log1p(0.2) * (random.uniform(size=REPORTS) < 1.0 / 33.0)
        logs[REPORTS - self.after :] += np.log1p(self.step)
        return np.asarray(np.exp(5.0 + logs), dtype=np.float64)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How often a change was found, as shares of the trials."""

    reports: Reports
    flagged: float  # anywhere
    found: float  # within NEAR reports of the step; 0 without one


def study(reports: Reports) -> Outcome:
    """Look at a world again and again."""
    random, step = random_of(reports), REPORTS - reports.after
    flagged = found = 0
    for _ in range(reports.trials):
        places = [change.index for change in change_points(reports.draw(random)).changes]
        flagged += bool(places)
        found += bool(reports.step) and any(abs(place - step) <= NEAR for place in places)
    return Outcome(reports, flagged / reports.trials, found / reports.trials)


def measure(effort: Effort) -> list[Outcome]:
    """Carry everything out."""
    cells = [
        Reports(noise, step, after, effort.trials)
        for noise in Noise
        for step, after in ((0.0, 0), (0.1, 50), (0.1, 5), (0.1, 2), (0.05, 50), (0.05, 5))
    ]
    return carry_out(study, cells)


def bars(found: list[Outcome]) -> list[Bar]:
    """Return what must hold, with what was found."""
    normal = [one for one in found if one.reports.noise is Noise.NORMAL]
    still = next(one.flagged for one in normal if not one.reports.step)
    late = next(one.found for one in normal if (one.reports.step, one.reports.after) == (0.1, 2))
    middle = next(one.found for one in normal if (one.reports.step, one.reports.after) == (0.1, 50))
    return [
        Bar(f"{still:.1%} of histories of {REPORTS} reports without a change are flagged (at most 10 %)", still <= 0.1),
        Bar(f"a step of 10 % is found, to {NEAR} reports, in {middle:.1%} (at least 85 %)", middle >= 0.85),
        Bar(f"and in {late:.1%} when only two reports follow it (at least 85 %)", late >= 0.85),
    ]


def page(found: list[Outcome], effort: Effort) -> str:
    """Return the whole page."""
    rows = "\n".join(
        f"| {one.reports.noise} | {one.reports.step:.0%} | {one.reports.after if one.reports.step else ''} "
        f"| {one.flagged:.1%} | {f'{one.found:.1%}' if one.reports.step else ''} |"
        for one in found
    )
    return f"""# Evidence: how often a change point is wrong

{written_by(effort, ["numpy", "ruptures"])}
What is computed and why is in [methodology.md](../methodology.md#warm-up-scalability-history).

## What was shown

{bar_list(bars(found))}

## The worlds

{REPORTS} reports whose figure differs from its level by {NOISE:.0%} (standard deviation): normally, with heavy tails
(Student's t, four degrees of freedom), or normally with one report in 33 a fifth slower. *Flagged*: a change point
anywhere. *Found*: one within {NEAR} reports of the step. A change point in a history with heavy tails or spikes is a
hint to look, no verdict: the regression gate decides.

| noise | step | reports after it | flagged | found |
|---|---|---|---|---|
{rows}
"""
