"""Candidates whose slowdown is known, how often the regression gate is wrong about them, and the page that says it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy import stats

from harness.analysis.dependence import Floats
from harness.analysis.regression import GateVerdict, compare_pairs, compare_runs
from harness.analysis.slo import Status
from tests.calibration.effort import Bar, Effort, bar_list, carry_out, random_of, written_by

MARGIN = 0.05

SIX = 6
"""Comparisons of a smoke load: p50 and p95 of create, spawn and snapshot."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One world: runs of a candidate and of a baseline."""

    candidates: int
    baselines: int
    is_paired: bool
    noise: float  # standard deviation from run to run, as a share
    shared: float  # of what the two runs of a pair both meet; 0 when unpaired
    slowdown: float  # of the candidate, as a share
    trials: int
    sharing: int = 1  # comparisons that share the error of a false FAIL

    def draw(self, random: np.random.Generator) -> tuple[Floats, Floats]:
        """Return each candidate run's and each baseline run's p95 in ms."""
        ours = self.noise * random.standard_normal(self.candidates) + np.log1p(self.slowdown)
        theirs = self.noise * random.standard_normal(self.baselines)
        if self.shared:
            met = self.shared * random.standard_normal(self.candidates)
            ours, theirs = ours + met, theirs + met
        return np.exp(3.0 + ours), np.exp(3.0 + theirs)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How often the gate said what, as shares of the trials."""

    comparison: Comparison
    passed: float
    failed: float
    slower: float  # a slowdown proven, harmless ones included
    equivalent: float
    observed: float  # of the rule that was not taken: alarm when the mean is more than the margin slower


def study(comparison: Comparison) -> Outcome:
    """Judge a world again and again."""
    random = random_of(comparison)
    found: list[GateVerdict] = []
    observed = 0
    for _ in range(comparison.trials):
        ours, theirs = comparison.draw(random)
        found.append(
            (compare_pairs if comparison.is_paired else compare_runs)(ours, theirs, MARGIN, comparison.sharing)
        )
        observed += float(ours.mean() / theirs.mean()) > 1.0 + MARGIN
    n = comparison.trials
    return Outcome(
        comparison,
        sum(one.status is Status.PASS for one in found) / n,
        sum(one.status is Status.FAIL for one in found) / n,
        sum(one.is_slower for one in found) / n,
        sum(one.equivalence is Status.PASS for one in found) / n,
        observed / n,
    )


@dataclasses.dataclass(frozen=True)
class Gate:
    """One world of the whole gate: as many comparisons at once as endpoints and quantiles give."""

    comparison: Comparison  # each of them
    alike: float  # correlation of the noise of two of them, within one run


def alarms_of(gate: Gate) -> float:
    """Return in which share of the trials some comparison of the gate fails."""
    world, random, alarms = gate.comparison, random_of(gate), 0
    compare = compare_pairs if world.is_paired else compare_runs
    for _ in range(world.trials):
        drawn = [world.draw(random) for _ in range(world.sharing + 1)]
        common = [np.log(side) - 3.0 for side in drawn.pop()]
        both = [
            [np.exp(3.0 + math.sqrt(gate.alike) * of_all + math.sqrt(1.0 - gate.alike) * (np.log(side) - 3.0))
             for of_all, side in zip(common, sides, strict=True)]
            for sides in drawn
        ]  # fmt: skip
        alarms += any(compare(ours, theirs, MARGIN, world.sharing).status is Status.FAIL for ours, theirs in both)
    return alarms / world.trials


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was found."""

    cells: list[Outcome]  # single comparisons
    gates: list[tuple[Gate, float]]  # in which share of the trials a whole gate alarms, on identical systems


def measure(effort: Effort) -> Measured:
    """Carry everything out."""
    return Measured(_measure_cells(effort), _measure_gates(effort))


def _measure_gates(effort: Effort) -> list[tuple[Gate, float]]:
    """Carry the whole gate out on identical systems."""
    gates = [
        Gate(Comparison(candidates, baselines, paired, 0.03, 0.0, 0.0, effort.trials, SIX), alike)
        for candidates, baselines, paired in ((3, 10, False), (10, 10, False), (5, 5, True))
        for alike in (0.0, 0.5, 0.9)
    ]
    return list(zip(gates, carry_out(alarms_of, gates), strict=True))


def _measure_cells(effort: Effort) -> list[Outcome]:
    """Carry every single comparison out."""
    unpaired = [
        Comparison(candidates, baselines, False, noise, 0.0, slowdown, effort.trials)
        for candidates, baselines in ((1, 10), (3, 10), (5, 10), (10, 10), (3, 3))
        for noise in (0.01, 0.03, 0.05)
        for slowdown in (0.0, MARGIN, 0.1)
    ]
    paired = [
        Comparison(pairs, pairs, True, noise, 0.05, slowdown, effort.trials)
        for pairs in (5, 10)
        for noise in (0.01, 0.03)
        for slowdown in (0.0, 0.03, MARGIN, 0.1)
    ]
    shared = [Comparison(3, 10, False, 0.03, 0.0, slowdown, effort.trials, SIX) for slowdown in (0.0, MARGIN, 0.1)]
    return carry_out(study, unpaired + paired + shared)


def bars(measured: Measured) -> list[Bar]:
    """Return what must hold, with what was found. A rate of 5 % shows more than its bar in one of 1,000."""
    found, trials = measured.cells, measured.cells[0].comparison.trials
    most = float(stats.binom.ppf(0.999, trials, 0.05)) / trials
    alarms = max(one.failed for one in found if one.comparison.slowdown == 0.0)
    missed = max(one.passed for one in found if one.comparison.slowdown == MARGIN)
    ten = _of(found, Comparison(3, 10, False, 0.03, 0.0, 0.1, trials, SIX)).failed
    whole = max(alarms for _, alarms in measured.gates)
    three = _of(found, Comparison(5, 5, True, 0.01, 0.05, 0.03, trials)).slower
    bound = f"(at most 5 %; {most:.1%} by chance)"
    return [
        Bar(f"identical systems: at most {alarms:.1%} alarms in any cell {bound}", alarms <= most),
        Bar(f"identical systems: at most {whole:.1%} of gates with {SIX} comparisons alarm {bound}", whole <= most),
        Bar(f"a slowdown of the whole margin passes in at most {missed:.1%} {bound}", missed <= most),
        Bar(f"a slowdown of 10 % in one of {SIX} fails in {ten:.1%}, 3 runs against 10 at 3 % noise (at least 95 %)",
            ten >= 0.95),
        Bar(
            f"a slowdown of 3 % is proven in {three:.1%} with 5 interleaved pairs that differ by 1 % beside the 5 % "
            "that both of a pair meet (at least 90 %)",
            three >= 0.9,
        ),
    ]  # fmt: skip


def _of(found: list[Outcome], comparison: Comparison) -> Outcome:
    """Return the outcome of one cell."""
    return next(one for one in found if one.comparison == comparison)


def page(measured: Measured, effort: Effort) -> str:
    """Return the whole page."""
    return f"""# Evidence: how often the regression gate is wrong

{written_by(effort, ["numpy", "scipy"])}
What is tested and why is in [methodology.md](../methodology.md#regression).

## What was shown

{bar_list(bars(measured))}

## The worlds

Each run's p95 is lognormal around its side's level (*noise* is its standard deviation, from run to run); the candidate
is slower by the share in the column *slowdown*. The two runs of an interleaved pair both meet a disturbance of 5 %.
The margin is {MARGIN:.0%}. PASS: slower than the margin is excluded. FAIL: a slowdown is proven, and the margin is not
kept for certain. *Slower* counts every proven slowdown, harmless ones included. *Equivalent*: neither slower nor faster
than the margin. The last column is the rule that was not taken: alarm when the means differ by more than the margin.

| runs | of | noise | slowdown | PASS | FAIL | slower | equivalent | alarm of the observed means |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(map(_row, measured.cells))}

## The whole gate

A gate compares the p50 and the p95 of three endpoints, and some of them fails by chance more often than one does. So
they share the error of a FAIL (column *of* above: how many do). Identical systems at 3 % noise; *alike* is the
correlation between the comparisons of one run.

| runs | alike | some comparison fails |
|---|---|---|
{chr(10).join(f"| {_runs(gate.comparison)} | {gate.alike:g} | {alarms:.1%} |" for gate, alarms in measured.gates)}
"""


def _row(one: Outcome) -> str:
    """Return a row."""
    cell = one.comparison
    told = " | ".join(f"{value:.1%}" for value in (one.passed, one.failed, one.slower, one.equivalent, one.observed))
    return f"| {_runs(cell)} | {cell.sharing} | {cell.noise:.0%} | {cell.slowdown:.0%} | {told} |"


def _runs(cell: Comparison) -> str:
    """Return how many runs are compared."""
    return f"{cell.candidates} pairs" if cell.is_paired else f"{cell.candidates} against {cell.baselines}"
