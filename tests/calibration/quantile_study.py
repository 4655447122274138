"""Intervals of quantiles and verdicts on a p95 in series whose truth is known, and the page on what they are worth.

An interval is asked for in each world at two lengths; it is refused, or it covers the true quantile, or it does not.
A verdict is asked for right at the target, where it is easiest to be wrong: the true p95 is the target itself.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import stats

from harness.analysis.dependence import effective_size
from harness.analysis.quantiles import estimate_quantile, share_bounds
from tests.calibration.effort import Bar, Effort, bar_list, carry_out, random_of, written_by
from tests.calibration.series_world import QUANTILES, WAVE, Series, Tail

LENGTHS = (2_000, 8_000)
COVERS = (0.93, 0.97)


@dataclasses.dataclass(frozen=True)
class Cell:
    """Series of one world and length, judged so many times."""

    world: Series
    requests: int
    trials: int


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What became of the intervals of one quantile."""

    cell: Cell
    q: float
    answered: int
    covering: int
    effective: float  # mean, of answered and refused

    @property
    def share(self) -> float:
        """Return which share of the intervals that were given cover the true quantile."""
        return self.covering / self.answered if self.answered else float("nan")

    @property
    def is_carried(self) -> bool:
        """Say whether the sample carries an interval: it is given more often than not."""
        return self.answered >= self.cell.trials / 2

    @property
    def wrong(self) -> float:
        """Return which share of all trials gave an interval that does not cover."""
        return (self.answered - self.covering) / self.cell.trials


def cover(cell: Cell) -> list[Coverage]:
    """Ask for the interval of each quantile again and again; each request is its own group."""
    random, apart = random_of(cell), np.arange(cell.requests)
    truth = {q: cell.world.true_quantile(q) for q in QUANTILES}
    answered, covering, effective = (dict.fromkeys(QUANTILES, 0.0) for _ in range(3))
    for _ in range(cell.trials):
        latency = cell.world.draw(random, cell.requests)
        for q in QUANTILES:
            found = estimate_quantile(latency, q, apart)
            effective[q] += found.effective / cell.trials
            if found.lower_ms is not None and found.upper_ms is not None:
                answered[q] += 1
                covering[q] += found.lower_ms <= truth[q] <= found.upper_ms
    return [Coverage(cell, q, int(answered[q]), int(covering[q]), effective[q]) for q in QUANTILES]


@dataclasses.dataclass(frozen=True)
class AtTarget:
    """Verdicts on a p95 whose true value is the target, as shares of the trials."""

    cell: Cell
    knows_waves: bool  # whether each wave is a group, as a burst is; else nothing is known of them
    false_pass: float
    false_fail: float
    independent: float  # false PASS of the rule that was not taken: each request counts as one


def judge_at_target(cell: Cell) -> list[AtTarget]:
    """Judge the p95 again and again, with and without knowing which requests came together."""
    random, target = random_of(cell), cell.world.true_quantile(0.95)
    apart = np.arange(cell.requests)
    passed, failed, plain = [0, 0], [0, 0], 0
    for _ in range(cell.trials):
        latency = cell.world.draw(random, cell.requests)
        is_slow = latency >= target
        for place, groups in enumerate((apart, apart // WAVE)):
            low, high = share_bounds(is_slow, effective_size(is_slow, 0.05, groups, latency))
            passed[place] += high <= 0.05
            failed[place] += low > 0.05
        plain += share_bounds(is_slow, float(cell.requests))[1] <= 0.05
    shares = [(one / cell.trials, other / cell.trials) for one, other in zip(passed, failed, strict=True)]
    return [AtTarget(cell, bool(place), *shares[place], plain / cell.trials) for place in (0, 1)]


@dataclasses.dataclass(frozen=True)
class Measured:
    """Everything that the page shows."""

    coverage: list[Coverage]
    at_target: list[AtTarget]


def measure(effort: Effort) -> Measured:
    """Carry everything out."""
    series = [
        Cell(Series(tail, rho), requests, effort.trials)
        for requests in reversed(LENGTHS)  # the longest first: two processes are then busy to the end
        for tail in (Tail.LIGHT, Tail.HEAVY, Tail.BIMODAL)
        for rho in (0.0, 0.5, 0.9)
    ]
    waves = [
        Cell(Series(tail, rho), requests, effort.trials)
        for tail, rhos in ((Tail.WAVES, (0.1, 0.3, 0.5, 0.8)), (Tail.LIGHT, (0.0, 0.5, 0.9)))
        for rho in rhos
        for requests in (160, 320, 1_000)
    ]
    coverage = [one for each in carry_out(cover, series) for one in each]
    return Measured(coverage, [one for each in carry_out(judge_at_target, waves) for one in each])


def bars(measured: Measured) -> list[Bar]:
    """Return what must hold, with what was found; by chance: a true value at the bar shows more in 1 of 1,000."""
    trials = measured.coverage[0].cell.trials
    low = float(stats.binom.ppf(0.001, trials, COVERS[0])) / trials
    high = float(stats.binom.ppf(0.999, trials, COVERS[1])) / trials
    most = float(stats.binom.ppf(0.999, trials, 0.05)) / trials
    carried = [one.share for one in measured.coverage if one.is_carried]
    seldom = [one.wrong for one in measured.coverage if not one.is_carried]
    waves = max(one.false_pass for one in measured.at_target)
    fails = max(one.false_fail for one in measured.at_target)
    return [
        Bar(
            f"where the sample carries an interval, it covers in {min(carried):.1%} to {max(carried):.1%} of trials, "
            f"over {len(carried)} cells (93 to 97 %; {low:.1%} to {high:.1%} by chance)",
            low <= min(carried) and max(carried) <= high,
        ),
        Bar(
            f"elsewhere it is refused; an interval that is given all the same and is wrong came in at most "
            f"{max(seldom):.1%} of trials (at most 5 %)",
            max(seldom) <= 0.05,
        ),
        Bar(
            f"a p95 that is the target itself passes in at most {waves:.1%} of trials, waves included (at most 5 %; "
            f"{most:.1%} by chance)",
            waves <= most,
        ),
        Bar(f"and fails in at most {fails:.1%} (at most 5 %; {most:.1%} by chance)", fails <= most),
    ]


def page(measured: Measured, effort: Effort) -> str:
    """Return the whole page."""
    return f"""# Evidence: how often an interval of a quantile is wrong

{written_by(effort, ["numpy", "scipy", "statsmodels"])}
What is computed and why is in [methodology.md](../methodology.md#what-a-verdict-needs).

## What was shown

{bar_list(bars(measured))}

## Intervals

Nominal coverage is 95 %. *Light*: lognormal, each request resembling the one before (first-order autoregression).
*Heavy*: the same with shocks of Student's t with three degrees of freedom. *Bimodal*: fast nine tenths of the time, ten
times slower else; with the correlation as the probability to stay in a state. The true quantiles are formulas, but for
the heavy tail, whose are read off eight million rows. *Given*: the share of trials in which an interval is not refused;
*covers*: of those, how many hold the true quantile; in brackets if refused more often than given. There the few
samples that look longer than they are get one, and those are wrong more often; *wrong* is their share of all trials.

| tail | correlation | requests | quantile | worth | given | covers | wrong |
|---|---|---|---|---|---|---|---|
{chr(10).join(map(_coverage_row, measured.coverage))}

The weak spot is a slow state that a sample visits a dozen times (bimodal, 0.9, 2,000 requests): how long it lasts
cannot be told from so few visits.

## Verdicts on a p95 at its target

The true p95 is the target itself, so PASS and FAIL are both wrong. *Waves*: requests come {WAVE} at a time, and two
of one correlate as given; *waves known*: each wave is a group, as a burst is; *unknown*: they are found in the
latencies alone. The last column is the rule that was not taken: each request counts as one.

| requests come | correlation | requests | waves | false PASS | false FAIL | false PASS, each counts |
|---|---|---|---|---|---|---|
{chr(10).join(_target_row(one) for one in measured.at_target)}
"""


def _coverage_row(one: Coverage) -> str:
    """Return a row of the table of intervals."""
    world, share = one.cell.world, f"{one.share:.1%}" if one.answered else ""
    told = share if one.is_carried or not share else f"({share})"
    return (
        f"| {world.tail} | {world.rho:g} | {one.cell.requests:,} | p{one.q * 100:g} | {one.effective:,.0f} "
        f"| {one.answered / one.cell.trials:.1%} | {told} | {one.wrong:.1%} |"
    )


def _target_row(one: AtTarget) -> str:
    """Return a row of the table of verdicts."""
    world, waves = one.cell.world, one.cell.world.tail is Tail.WAVES
    known = ("known" if one.knows_waves else "unknown") if waves else ("as if" if one.knows_waves else "none")
    return (
        f"| {'in waves' if waves else 'one by one'} | {world.rho:g} | {one.cell.requests:,} | {known} "
        f"| {one.false_pass:.1%} | {one.false_fail:.1%} | {one.independent:.1%} |"
    )
