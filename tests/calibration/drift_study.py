"""Soaks whose drift is known, how often they are judged wrongly, and the page that says it."""

from __future__ import annotations

import dataclasses
import statistics

import numpy as np
from scipy.signal import lfilter

from harness.analysis.dependence import Floats
from harness.analysis.drift import DriftVerdict, judge_drift
from harness.analysis.slo import Status
from tests.calibration.effort import Bar, Effort, bar_list, carry_out, random_of, written_by

MARGIN = 0.05
NOISES = (0.005, 0.02, 0.05)
CORRELATIONS = (0.0, 0.5, 0.8)
LONG_MINUTES = 180


@dataclasses.dataclass(frozen=True)
class Soak:
    """One world: minutes' medians around a line, each resembling the one before."""

    minutes: int
    change: float  # over the whole soak, as a share
    correlation: float  # of neighbouring minutes
    noise: float  # standard deviation of a minute's median, as a share
    trials: int

    def draw(self, random: np.random.Generator, minutes: int | None = None) -> Floats:
        """Return the medians of its minutes in ms."""
        n = minutes or self.minutes
        shocks = random.standard_normal(n + 100) * np.sqrt(1.0 - self.correlation**2)
        noise = np.asarray(lfilter([1.0], [1.0, -self.correlation], shocks)[100:], dtype=np.float64)
        line = np.log1p(self.change) * (np.arange(n) + 0.5) / n
        return np.asarray(np.exp(3.0 + line + self.noise * noise), dtype=np.float64)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How often the soaks of a cell were said to hold still, and to drift."""

    soak: Soak
    no_drift: float
    drift: float
    minutes_asked: (
        float  # median of the minutes that the open ones ask for, those at hand included; 0 when none is open
    )
    settled_then: float  # share of soaks of so many minutes that are settled


def study(soak: Soak) -> Outcome:
    """Judge a world again and again, and once more with as many minutes as it asks for."""
    random = random_of(soak)
    found = [judge_drift(soak.draw(random), MARGIN) for _ in range(soak.trials)]
    asked = [one.minutes + one.more_minutes for one in found if one.more_minutes is not None]
    minutes, settled = 0.0, 0.0
    if len(asked) > soak.trials // 10 and soak.change == 0.0:
        minutes = statistics.median(asked)
        again = [judge_drift(soak.draw(random, round(minutes)), MARGIN) for _ in range(soak.trials // 10)]
        settled = 1.0 - share(again, Status.INCONCLUSIVE)
    return Outcome(soak, share(found, Status.PASS), share(found, Status.FAIL), minutes, settled)


def share(found: list[DriftVerdict], status: Status) -> float:
    """Return which share of verdicts has a status."""
    return sum(one.status is status for one in found) / len(found)


def measure(effort: Effort) -> list[Outcome]:
    """Carry everything out."""
    cells = [
        Soak(minutes, change, correlation, noise, effort.trials)
        for minutes, noises in ((90, NOISES), (LONG_MINUTES, (0.02,)))
        for correlation in CORRELATIONS
        for noise in noises
        for change in (0.0, MARGIN, -MARGIN)
    ]
    return carry_out(study, cells)


def bars(found: list[Outcome]) -> list[Bar]:
    """Return what must hold, with what was found."""
    still = max(one.no_drift for one in found if one.soak.change)
    drifting = max(one.drift for one in found)
    (power,) = (
        one.no_drift
        for one in found
        if (one.soak.minutes, one.soak.change, one.soak.correlation, one.soak.noise) == (90, 0.0, 0.5, 0.02)
    )
    asked = [one.settled_then for one in found if one.minutes_asked]
    return [
        Bar(f'false "no drift": at most {still:.1%} of soaks that drift by the margin (at most 8 %)', still <= 0.08),
        Bar(f'false "drift": at most {drifting:.1%} of those that drift by it or less (at most 8 %)', drifting <= 0.08),
        Bar(
            f"power: {power:.1%} of 90-minute soaks that hold still are shown to, at a noise of 2 % a minute, a margin "
            "of 5 % and a correlation of 0.5 (at least 90 %)",
            power >= 0.9,
        ),
        Bar(
            f"of soaks with as many minutes as an open verdict asks for, at least {min(asked):.1%} are settled "
            "(at least 75 %: the noise is itself an estimate)",
            min(asked) >= 0.75,
        ),
    ]  # fmt: skip


def page(found: list[Outcome], effort: Effort) -> str:
    """Return the whole page."""
    rows = "\n".join(_row(found, one) for one in found if one.soak.change == 0.0)
    return f"""# Evidence: how often a verdict on drift is wrong

{written_by(effort, ["numpy", "scipy", "statsmodels"])}
What is tested and why is in [methodology.md](../methodology.md#drift).

## What was shown

{bar_list(bars(found))}

## The worlds

The medians of a soak's minutes lie around a line that rises by 0, by the margin of {MARGIN:.0%}, or falls by it. Each
differs from the line by normal noise (its standard deviation as a share of the level), and resembles the one before
(first-order autoregression). *False "no drift"* is a PASS of a soak that drifts by the whole margin, up or down,
whichever is worse; *false "drift"* is a FAIL of the same soaks, or of one that holds still. *Power* is a PASS of one
that holds still. Where it is low the verdict is INCONCLUSIVE, and asks for the minutes in the last column but one (the
median of what the open ones ask for, from the start of the soak); the last column is which share of soaks of that
length is settled.

| minutes | correlation | noise | power | false "no drift" | false "drift" | minutes asked for | settled then |
|---|---|---|---|---|---|---|---|
{rows}

A margin of less than two and a half times the noise of a minute's median cannot be shown in 90 minutes.
"""


def _row(found: list[Outcome], still: Outcome) -> str:
    """Return a row: a world that holds still, and the same one drifting by the margin."""
    soak = still.soak
    same = [one for one in found if dataclasses.replace(one.soak, change=0.0) == soak]
    wrong = max(one.no_drift for one in same if one.soak.change)
    alarm = max(one.drift for one in same)
    asked = f"{still.minutes_asked:,.0f} | {still.settled_then:.0%}" if still.minutes_asked else " | "
    return (
        f"| {soak.minutes} | {soak.correlation:g} | {soak.noise:.1%} | {still.no_drift:.1%} | {wrong:.1%} "
        f"| {alarm:.1%} | {asked} |"
    )
