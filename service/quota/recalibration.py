"""What a measurement means for the table in force: which rates move, how far, and why the others do not. Pure.

A recalibration moves the rates of the class `default` and nothing else; bursts, caps and the class `calibration` say
what fits at one time or what is lifted on purpose, and are a person's. Each rate ends in one of six outcomes, with
a sentence. The rules, and how often they err: docs/recalibration.md and docs/evidence/recalibration-calibration.md.
What is not believed at all: `recalibration_evidence`. What happens to the proposal afterwards: `recalibration_cycle`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import msgspec

from service.quota.guardrails import GUARDRAILS, LARGEST_STEP, Finding, Guardrail, below_use
from service.quota.limits import RATES, Limit
from service.quota.recalibration_evidence import SHARE, Known, doubts_about
from service.quota.tables import FORMAT, Measured, RateValue, RevisionFile, Tables

TOLERANCE = Fraction(1, 20)
"""By how much more than its interval a measurement must differ from the value in force: 5 % is not worth a change."""

WIDEST = 1.5
"""Upper bound over lower bound from which an interval says too little to act on."""

AUTHOR = "recalibration"
"""Who proposes, in the history."""


class Outcome(enum.StrEnum):
    """What becomes of one rate."""

    GAP = "gap"  # it was not measured, or without a verdict that proves something: the last good value is held
    STEADY = "steady"  # what was measured does not contradict the value in force
    LEANING = "leaning"  # it does, and is no loss of a whole step: a good or bad week looks alike, the next must agree
    MOVED = "moved"  # to what was measured
    CUT = "cut"  # towards what was measured, by the largest step
    IN_USE = "in_use"  # not, or less far, as workspaces use more than that


class Move(msgspec.Struct, frozen=True):
    """One rate, before and after."""

    limit: Limit
    outcome: Outcome
    old_per_s: float | None  # in force; null: lifted
    new_per_s: float | None
    target_per_s: float | None  # a quarter of the measured lower bound; null in a gap
    reason: str


class Decision(msgspec.Struct, frozen=True):
    """What a measurement comes to."""

    doubts: tuple[Finding, ...]  # when there is one, nothing moves
    moves: tuple[Move, ...]
    proposal: RevisionFile | None  # null when nothing moves


Usage = Mapping[Limit, float]
"""Observed p99 use of a rate by one workspace in the last period, per second; a limit nobody counted is not there."""


def unattended(usage: Usage) -> tuple[Guardrail, ...]:
    """Return what is asked before a proposal is in force for anybody, when no person activates it."""
    return (*GUARDRAILS, below_use(usage))


def decide(limits: Tables, file: RevisionFile, usage: Usage, known: Known) -> Decision:
    """Return what a measured table comes to, beside the one in force (`limits`, `known.in_force`)."""
    doubts = doubts_about(file, known)
    if doubts:
        return Decision(doubts, (), None)
    moves = tuple(_move(limit, limits, file, usage, known) for limit in RATES)
    if all(move.new_per_s == move.old_per_s for move in moves):
        return Decision((), moves, None)
    return Decision((), moves, _proposal(limits, file, moves, known))


def leaning(moves: Sequence[Move]) -> dict[Limit, float]:
    """Return what the next cycle has to agree with: targets by limit."""
    return {
        move.limit: move.target_per_s
        for move in moves
        if move.outcome is Outcome.LEANING and move.target_per_s is not None
    }


def _move(limit: Limit, limits: Tables, file: RevisionFile, usage: Usage, known: Known) -> Move:
    """Decide on one rate."""
    value, measured = limits.default.value(limit), file.provenance.measured.get(limit)
    if not isinstance(value, RateValue):
        return Move(limit, Outcome.GAP, None, None, None, "is lifted: a person's decision")
    old = Fraction(repr(value.per_s))
    if measured is None or (gap := _gap(measured)) is not None:
        reason = "was not measured" if measured is None else gap
        return Move(limit, Outcome.GAP, value.per_s, value.per_s, None, f"{reason}: the last good value is held")
    scale = SHARE * Fraction(known.worth_of(limit, measured))
    target = _thousandths(scale * Fraction(measured.lower_per_s), math.floor)
    width = scale * (Fraction(measured.upper_per_s) - Fraction(measured.lower_per_s))
    if not _goes_on(old, target, known.in_force.towards.get(limit)):
        if not _contradicts(old, target, width):
            return Move(limit, Outcome.STEADY, value.per_s, value.per_s, float(target), _steady(old, target, width))
        is_loss = old - target >= LARGEST_STEP * old  # what protects the service does not wait
        if not is_loss and not _goes_on(old, target, known.leaning.get(limit)):
            reason = f"{_signed(old, target)} was measured: the next cycle has to agree"
            return Move(limit, Outcome.LEANING, value.per_s, value.per_s, float(target), reason)
    lowest = _thousandths(old * (1 - LARGEST_STEP), math.ceil)
    highest = _thousandths(old * (1 + LARGEST_STEP), math.floor)
    new = min(max(target, lowest), highest)
    outcome = Outcome.MOVED if new == target else Outcome.CUT
    reason = f"{_signed(old, new)}" + ("" if new == target else f" of {_signed(old, target)} in one revision")
    used = usage.get(limit)
    if used is not None and new < old and new < Fraction(used):
        new = min(old, _thousandths(Fraction(used), math.ceil))
        outcome = Outcome.IN_USE
        reason = f"{_signed(old, new)}, not {_signed(old, target)}: workspaces use {used:g}/s (p99)"
    return Move(limit, outcome, value.per_s, float(new), float(target), reason)


def _contradicts(old: Fraction, target: Fraction, width: Fraction) -> bool:
    """Tell whether a measurement excludes the value in force by more than the tolerance.

    The target is a lower bound. Downwards, even the upper bound must be too low for the value. Upwards the mirror image
    of that: the value in force is the lower bound of another measurement, and of two such one is higher by luck; so the
    target must clear it by the whole width.
    """
    return target + width < old * (1 - TOLERANCE) or target - width > old * (1 + TOLERANCE)


def _goes_on(old: Fraction, target: Fraction, shown: float | None) -> bool:
    """Tell whether a measurement points to the side that another one has shown, be it less clearly."""
    return shown is not None and ((shown < old and target < old) or (shown > old and target > old))


def _gap(measured: Measured) -> str | None:
    """Say why a measurement proves nothing; None when it does."""
    if measured.verdict != "PASS":
        return f"came out {measured.verdict}"
    if measured.upper_per_s > WIDEST * measured.lower_per_s:
        return f"came out as {measured.lower_per_s:g} to {measured.upper_per_s:g}/s, too wide to act on"
    return None


def _proposal(limits: Tables, file: RevisionFile, moves: tuple[Move, ...], known: Known) -> RevisionFile:
    """Return the table in force with the moved rates, and the evidence under all of its rates."""
    values = {
        move.limit.value: RateValue(move.new_per_s, rate.burst)
        for move in moves
        if move.new_per_s is not None and isinstance(rate := limits.default.value(move.limit), RateValue)
    }
    default = msgspec.structs.replace(limits.default, **values)
    heard = {move.limit for move in moves if move.target_per_s is not None}
    measured = dict(known.in_force.measured)
    for limit in heard:
        new = file.provenance.measured[limit]
        measured[limit] = msgspec.structs.replace(new, worth=known.worth_of(limit, new))
    towards = {limit: goal for limit, goal in known.in_force.towards.items() if limit not in heard}
    towards |= {move.limit: move.target_per_s for move in moves if move.outcome is Outcome.CUT and move.target_per_s}
    provenance = msgspec.structs.replace(
        file.provenance,
        author=AUTHOR,
        note="; ".join(f"{move.limit} {move.outcome}: {move.reason}" for move in moves),
        measured_at=max(each.measured_at for each in file.provenance.measured.values()),
        measured=measured,
        towards=towards,
    )
    return RevisionFile(FORMAT, Tables(default, limits.calibration), provenance)


def _thousandths(value: Fraction, rounded: Callable[[Fraction], int]) -> Fraction:
    return Fraction(rounded(value * 1000), 1000)


def _signed(old: Fraction, new: Fraction) -> str:
    return f"{float(new / old - 1):+.1%}"


def _steady(old: Fraction, target: Fraction, width: Fraction) -> str:
    return (
        f"a quarter of the lower bound is {float(target):g}/s give or take {float(width):g}, which does not exclude"
        f" {float(old):g}/s by more than {float(TOLERANCE):.0%}"
    )
