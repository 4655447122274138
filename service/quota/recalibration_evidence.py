"""Whether a measurement is believed. Pure: each doubt is a name, its reason, and a function that says what is wrong.

One doubt about one limit refuses the whole file: what brought a zero into one line may have touched the others as well.
A limit that was not measured, or whose verdict is not PASS, is no doubt but a gap; its last good value is held
(`recalibration`). Nobody can force a doubt away in a recalibration: a person who knows better proposes the table by
hand. The reasons at length: docs/recalibration.md.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from service.quota.guardrails import CLOCK_SLACK, LEAST_RATE_PER_S, MOST_AGE, MOST_RATE_PER_S, Finding
from service.quota.limits import RATES, Limit
from service.quota.tables import Measured, Provenance, RateValue, RevisionFile

SHARE = Fraction(1, 4)
"""Of the lower bound of what the service carries, one workspace's quota: four tenants at full rate fill it."""

MOST_LATE_SHARE = 0.01
"""Requests that the generator may send late; beyond, it measured itself (the harness's own bound in open loop)."""

MOST_UNIT_GAP = 0.25
"""How far requests divided by seconds may be from the rate: random arrivals and brackets, but no other unit."""

MOST_CHANGE = 2.0
"""By what factor a service may have changed between two cycles and be believed without a person."""

MEMORY_SLACK = 0.05
"""How far the memory of two machines of one kind may differ: kernels keep a different part of it to themselves."""

MOST_NAMED = 3
"""Wrong limits that one refusal names."""


@dataclass(frozen=True)
class Known:
    """What a measurement is held against."""

    in_force: Provenance  # of the revision in force
    now: dt.datetime
    leaning: Mapping[Limit, float] = field(default_factory=dict)  # targets of the last cycle that wait for this one
    machine_worth: float | None = None  # what another machine's measurement is multiplied by; None: it is refused

    def worth_of(self, limit: Limit, measured: Measured) -> float:
        """Return what the measured rates are multiplied by: said once for a kind of machine, kept from then on."""
        before = self.in_force.measured.get(limit)
        if before is not None and is_same_kind(before.machine, measured.machine):
            return before.worth
        return 1.0 if self.machine_worth is None else self.machine_worth


@dataclass(frozen=True)
class Doubt:
    """One reason not to believe what was measured of one limit."""

    name: str
    check: Callable[[Limit, Measured, Known], str | None]


def doubts_about(file: RevisionFile, known: Known) -> tuple[Finding, ...]:
    """Return every doubt about a file, in the words of the history; none: it is believed."""
    measured = file.provenance.measured
    if not measured:
        return (Finding("measured", "the file holds no measurement, only values", forced=False),)
    found = []
    if strange := [limit for limit in measured if limit not in RATES]:
        found.append(Finding("measured", f"{', '.join(sorted(strange))}: not a rate", forced=False))
    for doubt in DOUBTS:
        said = [f"{limit} {wrong}" for limit, each in measured.items() if (wrong := doubt.check(limit, each, known))]
        if said:
            more = f" (and {len(said) - MOST_NAMED} more)" if len(said) > MOST_NAMED else ""
            found.append(Finding(doubt.name, "; ".join(said[:MOST_NAMED]) + more, forced=False))
    if not found and (apart := _apart_from_its_evidence(file)):
        found.append(Finding("values", "; ".join(apart[:MOST_NAMED]), forced=False))
    return tuple(found)


def numbers(limit: Limit, measured: Measured, known: Known) -> str | None:
    """Doubt zero, negative, NaN and infinite figures, and bounds that are not around the rate."""
    rates = (measured.lower_per_s, measured.per_s, measured.upper_per_s)
    if not all(math.isfinite(each) and each > 0 for each in (*rates, measured.seconds)):
        return f"{_shown(rates)} in {measured.seconds:g} s: every figure must be a number above 0"
    if not rates[0] <= rates[1] <= rates[2]:
        return f"{_shown(rates)}: lower bound, rate and upper bound are not in order"
    least, most = LEAST_RATE_PER_S / float(SHARE), MOST_RATE_PER_S / float(SHARE)
    if not (least <= rates[0] and rates[2] <= most):
        return f"{_shown(rates)}: plausible is {least:g} to {most:g}"
    return None


def fresh(limit: Limit, measured: Measured, known: Known) -> str | None:
    """Doubt what is too old, of the future, or older than what the value in force rests on."""
    age = known.now - measured.measured_at
    if age > MOST_AGE:
        return f"was measured {age.total_seconds() / 86_400:.1f} days ago; at most {MOST_AGE.days} days"
    if age < -CLOCK_SLACK:
        return f"was measured {-age.total_seconds():.0f} s in the future"
    before = known.in_force.measured.get(limit)
    if before is not None and measured.measured_at <= before.measured_at:
        return f"was measured at {measured.measured_at:%Y-%m-%d %H:%M:%SZ}, not after what is in force"
    return None


def whole(limit: Limit, measured: Measured, known: Known) -> str | None:
    """Doubt a measurement of which requests are missing, or that names no samples."""
    if not measured.samples:
        return "names no samples"
    if measured.requests_planned < 1 or measured.requests_recorded != measured.requests_planned:
        return f"has rows of {measured.requests_recorded:,} of {measured.requests_planned:,} planned requests"
    return None


def units(limit: Limit, measured: Measured, known: Known) -> str | None:
    """Doubt a rate that its own requests and seconds do not make: per minute, per millisecond, of another limit."""
    if not (measured.seconds > 0 and math.isfinite(measured.seconds)):
        return None  # `numbers` says so
    counted = measured.requests_planned / measured.seconds
    if not abs(counted - measured.per_s) <= MOST_UNIT_GAP * counted:
        return (
            f"is said to carry {measured.per_s:g}/s, but {measured.requests_planned:,} requests in"
            f" {measured.seconds:g} s are {counted:g}/s"
        )
    return None


def generator(limit: Limit, measured: Measured, known: Known) -> str | None:
    """Doubt a generator that did not keep its schedule: it measured itself."""
    if not 0 <= measured.late_share <= MOST_LATE_SHARE:
        return f"was measured with {measured.late_share:.1%} of requests sent late; at most {MOST_LATE_SHARE:.0%}"
    return None


def machine(limit: Limit, measured: Measured, known: Known) -> str | None:
    """Doubt another machine than the value in force was measured on, unless somebody said what it is worth."""
    if not measured.machine:
        return "does not say on which machine it was measured"
    before = known.in_force.measured.get(limit)
    if before is None or known.machine_worth is not None or is_same_kind(before.machine, measured.machine):
        return None
    return f"was measured on {_kind(measured.machine)}, the value in force on {_kind(before.machine)}"


def change(limit: Limit, measured: Measured, known: Known) -> str | None:
    """Doubt more than a doubling or halving since the last measurement: a person looks at that first."""
    before = known.in_force.measured.get(limit)
    if before is None or not before.per_s > 0:
        return None
    ratio = measured.per_s * known.worth_of(limit, measured) / (before.per_s * before.worth)
    if not 1 / MOST_CHANGE <= ratio <= MOST_CHANGE:
        return f"is {ratio:.3g} times what was measured before ({before.per_s:g}/s); at most {MOST_CHANGE:g} times"
    return None


DOUBTS = (
    Doubt("numbers", numbers),
    Doubt("fresh", fresh),
    Doubt("whole", whole),
    Doubt("units", units),
    Doubt("generator", generator),
    Doubt("machine", machine),
    Doubt("change", change),
)
"""Asked about each limit of each measurement."""

KIND = ("system", "architecture", "cpu", "cpu_count")
"""What two machines of one kind have in common, besides their memory; a kernel's release may differ."""


def is_same_kind(one: Mapping[str, object], other: Mapping[str, object]) -> bool:
    """Tell whether rates that were measured on two machines may be compared as they are."""
    if any(one.get(name) != other.get(name) for name in KIND):
        return False
    memory = (one.get("memory_bytes"), other.get("memory_bytes"))
    if not all(isinstance(each, (int, float)) for each in memory):
        return memory[0] == memory[1]
    smaller, larger = sorted(float(each) for each in memory if isinstance(each, (int, float)))
    return larger - smaller <= MEMORY_SLACK * larger


def _apart_from_its_evidence(file: RevisionFile) -> list[str]:
    """Return which values of the file are not a quarter of their lower bound: one of the two is not what it says."""
    apart = []
    for limit, measured in file.provenance.measured.items():
        value, meant = file.limits.default.value(limit), float(SHARE) * measured.lower_per_s
        if measured.verdict == "PASS" and not (
            isinstance(value, RateValue) and abs(value.per_s - meant) <= max(0.01 * meant, 0.001)
        ):
            said = f"{value.per_s:g}/s" if isinstance(value, RateValue) else "lifted"
            apart.append(f"{limit} is {said} in the table, and {float(SHARE):.0%} of its lower bound is {meant:g}/s")
    return apart


def _shown(rates: tuple[float, float, float]) -> str:
    return f"is {rates[1]:g}/s [{rates[0]:g}, {rates[2]:g}]"


def _kind(machine: Mapping[str, object]) -> str:
    return f"{machine.get('cpu_count')} x {machine.get('cpu')}"
