"""Guardrails: reasons for which a revision is not put in force. Pure, so that a simulation can ask them by thousands.

A guardrail is a name, its reason, and a function of (the tables in force, the proposed ones, where those come from, the
instant) that returns a refusal with its numbers, or None. `revisions.activate` asks all of them and keeps every answer
in the history. A person may force what may be forced, with a name and a reason; nobody may force values under which
nothing could work. What an unattended recalibration needs besides is added where that is done: a list is passed in.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import msgspec

from service.quota.limits import CAPS, RATES, Limit
from service.quota.tables import ClassTable, Provenance, RateValue, Tables, tables_by_class

LARGEST_STEP = Fraction(1, 5)
"""Most by which one revision may move a value: 20 %. A wrong measurement then costs little until somebody looks."""

MOST_AGE = dt.timedelta(days=7)
"""Age at which a measurement says nothing about the service of today: recalibration is weekly at the least."""

CLOCK_SLACK = dt.timedelta(minutes=5)
"""How far ahead of ours the measuring machine's clock may be."""

LEAST_RATE_PER_S, MOST_RATE_PER_S = 0.01, 100_000.0
"""One request in 100 seconds is no service; on no machine has one process carried 100,000 (docs/performance.md)."""

MOST_BURST, MOST_CAP = 100_000, 100_000
"""More at once than any server has connections for."""

Check = Callable[[Tables, Tables, Provenance, dt.datetime], str | None]


@dataclass(frozen=True)
class Guardrail:
    """One reason to refuse."""

    name: str
    check: Check
    may_be_forced: bool  # by a named person with a reason


class Finding(msgspec.Struct, frozen=True):
    """What a guardrail said against an activation."""

    guardrail: str
    refusal: str
    forced: bool  # it was heard and overruled


def step_limit(current: Tables, proposed: Tables, provenance: Provenance, now: dt.datetime) -> str | None:
    """Refuse a value that moves by more than 20 %; a whole number may always move by one, as it cannot move by less."""
    too_far = [
        f"{name} {_shown(old)} -> {_shown(new)}{_percent(old, new)}"
        for (name, old), (_, new) in zip(_numbers(current), _numbers(proposed), strict=True)
        if old != new and not _within_a_step(old, new)
    ]
    return _sentence(too_far, f"at most {float(LARGEST_STEP):.0%} in one revision")


def implausible(current: Tables, proposed: Tables, provenance: Provenance, now: dt.datetime) -> str | None:
    """Refuse values under which the service could not work, or that no measurement can have found."""
    wrong = []
    for name, table in tables_by_class(proposed).items():
        for limit in RATES:
            value = table.value(limit)
            if isinstance(value, RateValue):
                if not (math.isfinite(value.per_s) and LEAST_RATE_PER_S <= value.per_s <= MOST_RATE_PER_S):
                    wrong.append(
                        f"{name}.{limit}.per_s {value.per_s:g} (plausible: {LEAST_RATE_PER_S:g} to {MOST_RATE_PER_S:g})"
                    )
                if not 1 <= value.burst <= MOST_BURST:
                    wrong.append(f"{name}.{limit}.burst {value.burst} (plausible: 1 to {MOST_BURST})")
        for limit in CAPS:
            cap = table.value(limit)
            if isinstance(cap, int) and not 1 <= cap <= MOST_CAP:
                wrong.append(f"{name}.{limit} {cap} (plausible: 1 to {MOST_CAP})")
        wrong += [f"{name}.{part} is above {name}.{whole}" for part, whole in PARTS if _is_above(table, part, whole)]
    return _sentence(wrong, "nothing could work under that, or nobody can have measured it")


def stale_input(current: Tables, proposed: Tables, provenance: Provenance, now: dt.datetime) -> str | None:
    """Refuse a measurement that is too old, is of the future or has no date; a person's wish has no age."""
    if provenance.measured_at is None:
        if provenance.samples:
            return f"{len(provenance.samples)} sample sets are named and not when they were taken (measured_at)"
        return None
    age = now - provenance.measured_at
    if age > MOST_AGE:
        return f"measured {age.total_seconds() / 86_400:.1f} days ago; at most {MOST_AGE.days} days"
    if age < -CLOCK_SLACK:
        return f"measured {-age.total_seconds():.0f} s in the future"
    return None


def below_use(usage: Mapping[Limit, float]) -> Guardrail:
    """Return the guardrail that refuses to lower a rate below what workspaces use of it (p99, per second).

    A service that is used is not broken to fit a measurement. A limit that nobody counted is not there and is not asked
    about; its shadow is (`recalibration_cycle`).
    """

    def check(current: Tables, proposed: Tables, provenance: Provenance, now: dt.datetime) -> str | None:
        below = []
        for limit, used in sorted(usage.items()):
            old, new = current.default.value(limit), proposed.default.value(limit)
            if isinstance(new, RateValue) and new.per_s < used and _is_lowered(old, new):
                below.append(f"default.{limit}.per_s {new.per_s:g}, of which workspaces use {used:g} (p99)")
        return _sentence(below, "a rate in use is not taken away")

    return Guardrail("below use", check, may_be_forced=True)


PARTS = (
    (Limit.LIVE_PARENT_RUNS, Limit.LIVE_RUNS),
    (Limit.PENDING_SUBRUNS, Limit.LIVE_RUNS),
    (Limit.WEBSOCKETS_PER_USER, Limit.WEBSOCKETS),
    (Limit.PENDING_TOOL_CALLS_PER_RUN, Limit.PENDING_TOOL_CALLS),
)
"""Caps on a part, and on the whole that it is a part of."""

GUARDRAILS = (
    Guardrail("implausible values", implausible, may_be_forced=False),
    Guardrail("step limit", step_limit, may_be_forced=True),
    Guardrail("stale input", stale_input, may_be_forced=True),
)
"""Asked at every activation."""


def ask(
    guardrails: Sequence[Guardrail],
    current: Tables,
    proposed: Tables,
    provenance: Provenance,
    now: dt.datetime,
    *,
    force: bool,
) -> tuple[Finding, ...]:
    """Return what each guardrail says against it; the activation stands if all of that was forced."""
    said = ((each, each.check(current, proposed, provenance, now)) for each in guardrails)
    return tuple(
        Finding(each.name, refusal, force and each.may_be_forced) for each, refusal in said if refusal is not None
    )


def _numbers(tables: Tables) -> Iterator[tuple[str, int | Fraction | None]]:
    """Yield every number of the tables with its name: rates as fractions, whole numbers as ints, lifted as None."""
    for name, table in tables_by_class(tables).items():
        for limit in RATES:
            value = table.value(limit)
            rate = value if isinstance(value, RateValue) else None
            yield f"{name}.{limit}.per_s", None if rate is None else Fraction(repr(rate.per_s))
            yield f"{name}.{limit}.burst", None if rate is None else rate.burst
        for limit in CAPS:
            cap = table.value(limit)
            yield f"{name}.{limit}", cap if isinstance(cap, int) else None


def _within_a_step(old: int | Fraction | None, new: int | Fraction | None) -> bool:
    """Tell whether a value may become another one; lifting a limit, or setting a lifted one, has no size."""
    if old is None or new is None:
        return False
    if isinstance(old, int) and isinstance(new, int) and abs(new - old) <= 1:
        return True
    return abs(Fraction(new) - Fraction(old)) <= LARGEST_STEP * old


def _is_lowered(old: RateValue | int | None, new: RateValue) -> bool:
    return not isinstance(old, RateValue) or new.per_s < old.per_s


def _is_above(table: ClassTable, part: Limit, whole: Limit) -> bool:
    one, other = table.value(part), table.value(whole)
    return isinstance(one, int) and isinstance(other, int) and one > other


def _shown(value: int | Fraction | None) -> str:
    return "lifted" if value is None else f"{float(value):g}"


def _percent(old: int | Fraction | None, new: int | Fraction | None) -> str:
    return f" ({float(new / old - 1):+.1%})" if old and new is not None else ""


def _sentence(found: Sequence[str], rule: str) -> str | None:
    return f"{'; '.join(found)}: {rule}" if found else None
