"""The two words of every report: an Slo is an objective, a Verdict is what the samples prove about it.

A verdict has three values that count. PASS and FAIL are proofs at 95 % confidence each way; INCONCLUSIVE means that
the samples carry neither, and says how many more would. An SLO whose mode was not measured is NOT_APPLICABLE and
does not count. `slofile` reads SLOs, `judges` makes verdicts, `verdictfile` keeps them.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable

import msgspec

from harness.errors import ExitCode
from harness.sample import Endpoint, Mode


class Measure(enum.StrEnum):
    """What an SLO is about; decides the unit of its target."""

    LATENCY = "latency"  # what a caller of one endpoint waits, in milliseconds
    RESPONSES = "responses"  # what became of every planned request
    TICKS = "ticks"  # worker turns per second, while a tick is due
    COMPLETION = "completion"  # from a parent run's creation to its end, in seconds
    DRIFT = "drift"  # how the latency of one endpoint moves over a soak, as a share of itself


class Statistic(enum.StrEnum):
    """Which number of the measure must meet the target."""

    MEAN = "mean"  # of latency
    P50 = "p50"  # of latency: half of the requests are no slower
    P90 = "p90"
    P95 = "p95"
    P99 = "p99"
    FAILED_COUNT = "failed_count"  # of responses: a census of this sample, no inference
    ERROR_SHARE = "error_share"  # of responses: failed over planned, 0.01 = 1 %
    PER_BUSY_SECOND = "per_busy_second"  # of ticks
    MAX = "max"  # of completion: a census of this sample, no inference
    P50_CHANGE = "p50_change"  # of drift: the minutes' medians at the end over those at the beginning, less 1

    @property
    def is_latency(self) -> bool:
        """Say whether it is a statistic of latency: the mean or a quantile."""
        return self is Statistic.MEAN or self.q is not None

    @property
    def q(self) -> float | None:
        """Return 0.95 for p95; null when this is no quantile."""
        return int(self.value[1:]) / 100 if self.value[1:].isdigit() else None


class Op(enum.StrEnum):
    """How the statistic must stand to the target (OpenSLO's names)."""

    LT = "lt"  # below
    LTE = "lte"  # at most
    GT = "gt"  # above
    GTE = "gte"  # at least

    @property
    def sign(self) -> str:
        """Return the mathematical sign."""
        return {"lt": "<", "lte": "≤", "gt": ">", "gte": "≥"}[self.value]

    def holds(self, value: float, limit: float) -> bool:
        """Say whether the value meets the limit."""
        return {"lt": value < limit, "lte": value <= limit, "gt": value > limit, "gte": value >= limit}[self.value]


STATISTICS: dict[Measure, tuple[Statistic, ...]] = {
    Measure.LATENCY: (Statistic.MEAN, Statistic.P50, Statistic.P90, Statistic.P95, Statistic.P99),
    Measure.RESPONSES: (Statistic.FAILED_COUNT, Statistic.ERROR_SHARE),
    Measure.TICKS: (Statistic.PER_BUSY_SECOND,),
    Measure.COMPLETION: (Statistic.MAX,),
    Measure.DRIFT: (Statistic.P50_CHANGE,),
}
"""Which statistics each measure has; anything else is refused when the file of SLOs is read."""

OPS: dict[Measure, tuple[Op, ...]] = {
    Measure.LATENCY: (Op.LT, Op.LTE),
    Measure.RESPONSES: (Op.LT, Op.LTE),
    Measure.TICKS: (Op.GT, Op.GTE),
    Measure.COMPLETION: (Op.LT, Op.LTE),
    Measure.DRIFT: (Op.LT, Op.LTE),
}

CHANGE = "change"
"""The unit of a ratio less 1: 0.05 is 5 % more, -0.05 is 5 % less."""

UNITS: dict[Measure, str] = {
    Measure.LATENCY: "ms",
    Measure.RESPONSES: "",
    Measure.TICKS: "/s",
    Measure.COMPLETION: "s",
    Measure.DRIFT: CHANGE,
}


class Slo(msgspec.Struct, frozen=True):
    """One service level objective."""

    name: str  # unique in its file
    title: str  # what a person reads
    modes: tuple[Mode, ...]  # loads to which it applies, each judged on its own
    measure: Measure
    endpoint: Endpoint | None  # of latency and drift only
    statistic: Statistic
    op: Op
    target: float  # in the unit of its measure
    margin: float  # share of the target by which it may be missed before the SLO counts as missed; 0 = none

    @property
    def limit(self) -> float:
        """Return the target moved outwards by the margin: what bounds are compared with."""
        outwards = 1.0 if self.op in {Op.LT, Op.LTE} else -1.0
        return self.target * (1.0 + outwards * self.margin)

    @property
    def requirement(self) -> str:
        """Return the SLO in short, such as "mean < 300 ms"."""
        if self.statistic is Statistic.FAILED_COUNT and self.limit == 0.0:
            return "none failed"
        if self.measure is Measure.DRIFT:
            return f"drift of p50 within {percent(self.limit)}"
        shares = self.statistic is Statistic.ERROR_SHARE
        target = percent(self.target) if shares else with_unit(self.target, UNITS[self.measure])
        words = {"failed_count": "failed", "error_share": "errors", "per_busy_second": "ticks", "max": "slowest"}
        margin = f" (margin {percent(self.margin)})" if self.margin else ""
        return f"{words.get(self.statistic, self.statistic.value)} {self.op.sign} {target}{margin}"


class Status(enum.StrEnum):
    """What the samples prove about an SLO."""

    PASS = "PASS"  # noqa: S105 - met, with 95 % confidence
    FAIL = "FAIL"  # missed, with 95 % confidence
    INCONCLUSIVE = "INCONCLUSIVE"  # neither is proven by these samples
    NOT_APPLICABLE = "NOT_APPLICABLE"  # no sample set of its modes: does not count


class Interval(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The quantity on which the verdict rests, with its one-sided 95 % bounds."""

    of: str  # "mean latency", or "share of slow snapshot requests"
    unit: str  # "ms", "share", "/s", "s" or "requests"
    estimate: float
    lower: float | None  # null: unbounded
    upper: float | None  # null: unbounded
    limit: float  # both bounds on its right side: PASS; both on its wrong side: FAIL


class Verdict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the samples of one mode prove about one SLO."""

    name: str  # of the SLO
    title: str
    mode: Mode | None  # the load judged; null when not applicable
    verdict: Status
    statistic: Statistic
    requirement: str  # "mean < 300 ms"
    target: float
    margin: float
    unit: str  # of target and measured
    measured: float | None  # the statistic itself; null when unbounded (failures) or unknown
    interval: Interval | None  # null when refused
    sample_size: int
    sample_unit: str  # "runs", "bursts", "snapshot requests"
    effective_size: float | None  # independent ones that they are worth; null for a census
    reason: str  # one or two plain sentences
    more_needed: int | None  # further sample units that would settle it; null when settled or not to be told
    shown: dict[str, float | None]  # for information: not judged


def verdict_of(
    slo: Slo,
    mode: Mode | None,
    status: Status,
    reason: str,
    *,
    measured: float | None = None,
    interval: Interval | None = None,
    size: int = 0,
    of: str = "",
    effective: float | None = None,
    more: int | None = None,
    shown: dict[str, float | None] | None = None,
) -> Verdict:
    """Return a verdict, its numbers rounded to six significant digits: its bytes never depend on the last bit."""
    known = None if measured is None or not math.isfinite(measured) else rounded(measured)
    return Verdict(
        name=slo.name,
        title=slo.title,
        mode=mode,
        verdict=status,
        statistic=slo.statistic,
        requirement=slo.requirement,
        target=slo.target,
        margin=slo.margin,
        unit=UNITS[slo.measure],
        measured=known,
        interval=interval,
        sample_size=size,
        sample_unit=of,
        effective_size=None if effective is None else rounded(effective),
        reason=reason,
        more_needed=more,
        shown={key: None if value is None else rounded(value) for key, value in (shown or {}).items()},
    )


def interval_of(
    of: str, unit: str, estimate: float, bounds: tuple[float | None, float | None], limit: float
) -> Interval:
    """Return an interval with its numbers rounded to six significant digits."""
    lower, upper = (None if bound is None or not math.isfinite(bound) else rounded(bound) for bound in bounds)
    return Interval(of, unit, rounded(estimate), lower, upper, rounded(limit))


def settle(op: Op, limit: float, lower: float, upper: float) -> Status:
    """Return PASS when every value between the bounds meets the limit, FAIL when none does, else INCONCLUSIVE."""
    met = {op.holds(lower, limit), op.holds(upper, limit)}
    if met == {True}:
        return Status.PASS
    return Status.FAIL if met == {False} else Status.INCONCLUSIVE


def overall(verdicts: Iterable[Verdict], *, valid: bool = True) -> ExitCode:
    """Return the exit code that a report's verdicts come to; the first that holds of invalid, failed, inconclusive."""
    found = {verdict.verdict for verdict in verdicts} - {Status.NOT_APPLICABLE}
    if not valid:
        return ExitCode.INVALID
    if Status.FAIL in found:
        return ExitCode.SLO_FAILED
    return ExitCode.PASSED if found == {Status.PASS} else ExitCode.INCONCLUSIVE


def rounded(value: float) -> float:
    """Return the value with six significant digits."""
    return float(f"{value:.6g}")


def number(value: float | None) -> str:
    """Return the value for a sentence, with three significant digits and never an exponent."""
    if value is None:
        return "unbounded"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{float(f'{value:.3g}'):g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.4f}"


def with_unit(value: float | None, unit: str) -> str:
    """Return a number with its unit, such as "9.3 ms" or "280/s"."""
    return f"{number(value)}{unit}" if unit.startswith("/") else f"{number(value)} {unit}".strip()


def percent(share: float) -> str:
    """Return a share for a sentence, such as "2.5 %"."""
    return f"{number(share * 100.0)} %"


def signed_percent(share: float) -> str:
    """Return a change for a sentence, such as "+2.5 %"; the sign of less is typographic."""
    sign = "+" if share > 0.0 else "\u2212" if share < 0.0 else ""
    return sign + percent(abs(share))


def plural(count: int, noun: str) -> str:
    """Return "1 run" or "2 runs"; the noun is given in the plural."""
    return f"{count:,} {noun.removesuffix('s') if count == 1 else noun}"
