"""What one measurement means for each rate: held, moved, cut to a step, or kept above its use."""

from __future__ import annotations

import datetime as dt
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.quota.guardrails import ask
from service.quota.limits import Limit
from service.quota.recalibration import Decision, Move, Outcome, decide, leaning, unattended
from service.quota.recalibration_evidence import Known
from service.quota.tables import FIRST, Measured, Provenance, RateValue, parse, write
from tests.measuredtables import MACHINE, NOW, OTHER_MACHINE, measured, measured_file
from tests.quotatables import tables

CREATE = Limit.RUN_CREATION
IN_FORCE = tables(run_creation=RateValue(10.0, 11))
WEEK = dt.timedelta(days=7)


def lower(value: float, spread: float = 0.01, **changed: Any) -> Measured:
    """Return a measurement of which a quarter of the lower bound is this."""
    return measured(4 * value / (1 - spread), spread, **changed)


def decided(
    each: Measured,
    *,
    limits: Any = IN_FORCE,
    in_force: Provenance | None = None,
    lean: float | None = None,
    used: float | None = None,
    worth: float | None = None,
) -> tuple[Decision, Move]:
    """Return what is decided on creates alone."""
    known = Known(in_force or Provenance(), NOW, {} if lean is None else {CREATE: lean}, worth)
    found = decide(limits, measured_file({CREATE: each}), {} if used is None else {CREATE: used}, known)
    return found, found.moves[0]


@pytest.mark.parametrize(
    ("each", "more", "outcome", "new"),
    [
        (lower(10.0), {}, Outcome.STEADY, 10.0),
        (lower(9.4), {}, Outcome.STEADY, 10.0),  # its upper bound is 9.59
        (lower(9.3), {}, Outcome.LEANING, 10.0),
        (lower(9.3), {"lean": 9.2}, Outcome.MOVED, 9.3),
        (lower(9.3), {"lean": 10.8}, Outcome.LEANING, 10.0),  # the last cycle pointed to the other side
        (lower(10.6), {}, Outcome.STEADY, 10.0),  # clears 5 % by less than the interval's width
        (lower(10.8), {}, Outcome.LEANING, 10.0),
        (lower(10.8), {"lean": 11.0}, Outcome.MOVED, 10.8),
        (lower(13.0), {}, Outcome.LEANING, 10.0),  # a raise always waits
        (lower(13.0), {"lean": 13.0}, Outcome.CUT, 12.0),
        (lower(8.0), {}, Outcome.MOVED, 8.0),  # a loss of a whole step does not
        (lower(7.0), {}, Outcome.CUT, 8.0),
        (lower(7.0), {"used": 8.5}, Outcome.IN_USE, 8.5),
        (lower(7.0), {"used": 12.0}, Outcome.IN_USE, 10.0),
        (lower(7.0), {"used": 5.0}, Outcome.CUT, 8.0),
        (lower(7.0, verdict="INCONCLUSIVE"), {}, Outcome.GAP, 10.0),
        (lower(7.0, verdict="FAIL"), {}, Outcome.GAP, 10.0),
        (lower(7.0, spread=0.21), {}, Outcome.GAP, 10.0),  # the upper bound is 1.53 times the lower
        (lower(9.9), {"in_force": Provenance(towards={CREATE: 7.0})}, Outcome.MOVED, 9.9),
        (lower(10.1), {"in_force": Provenance(towards={CREATE: 7.0})}, Outcome.STEADY, 10.0),
        (lower(7.0), {"limits": tables(run_creation=None)}, Outcome.GAP, None),
    ],
)
def test_each_outcome(each: Measured, more: dict[str, Any], outcome: Outcome, new: float | None) -> None:
    found, move = decided(each, **more)
    assert (move.outcome, move.new_per_s) == (outcome, new)
    assert (found.proposal is not None) == (new != move.old_per_s)


def test_every_move_says_why() -> None:
    told = {
        move.outcome: move.reason
        for _, move in (
            decided(lower(10.0)),
            decided(lower(9.3)),
            decided(lower(8.0)),
            decided(lower(7.0)),
            decided(lower(7.0), used=8.5),
            decided(lower(7.0, verdict="FAIL")),
        )
    }
    assert told == {
        Outcome.STEADY: "a quarter of the lower bound is 10/s give or take 0.20202, which does not exclude 10/s by more"
        " than 5%",
        Outcome.LEANING: "-7.0% was measured: the next cycle has to agree",
        Outcome.MOVED: "-20.0%",
        Outcome.CUT: "-20.0% of -30.0% in one revision",
        Outcome.IN_USE: "-15.0%, not -30.0%: workspaces use 8.5/s (p99)",
        Outcome.GAP: "came out FAIL: the last good value is held",
    }


def test_what_was_not_measured_stays_and_a_doubt_moves_nothing() -> None:
    found, _ = decided(lower(8.0))
    assert [(move.outcome, move.new_per_s) for move in found.moves] == [
        (Outcome.MOVED, 8.0),
        (Outcome.GAP, 2.14),
        (Outcome.GAP, 18.49),
        (Outcome.GAP, 41.0),
    ]
    doubted = decide(IN_FORCE, measured_file({CREATE: lower(8.0, late_share=1.0)}), {}, Known(Provenance(), NOW))
    assert (doubted.moves, doubted.proposal, len(doubted.doubts)) == ((), None, 1)


def test_a_proposal_moves_rates_alone_and_carries_the_evidence_of_all_of_them() -> None:
    tick = measured(164.0, measured_at=NOW - WEEK)
    before = Provenance(measured={Limit.TICK: tick}, towards={Limit.TICK: 30.0})
    each = lower(7.0)
    proposal = decided(each, in_force=before)[0].proposal
    assert proposal is not None
    assert proposal.limits == tables(run_creation=RateValue(8.0, 11))
    assert (proposal.provenance.measured, proposal.provenance.towards) == (
        {CREATE: each, Limit.TICK: tick},
        {CREATE: 7.0, Limit.TICK: 30.0},
    )
    assert (proposal.provenance.author, proposal.provenance.measured_at) == ("recalibration", each.measured_at)
    assert (proposal.provenance.note or "").startswith("run_creation cut: -20.0% of -30.0% in one revision; subrun")


def test_a_measured_file_is_read_back_as_it_was_and_show_prints_none_of_it() -> None:
    proposal = decided(lower(7.0))[0].proposal
    assert proposal is not None
    assert parse(msgspec.json.encode(proposal)) == proposal
    assert parse(write(proposal.limits)) == msgspec.structs.replace(proposal, provenance=Provenance())


def test_another_machines_rates_are_scaled_by_what_it_is_worth_and_that_is_kept() -> None:
    before = Provenance(measured={CREATE: measured(40.0, measured_at=NOW - WEEK, machine=MACHINE)})
    found, move = decided(lower(32.0, machine=OTHER_MACHINE), in_force=before, worth=0.25)
    assert (move.outcome, move.new_per_s) == (Outcome.MOVED, 8.0)
    assert found.proposal is not None
    assert found.proposal.provenance.measured[CREATE].worth == 0.25


def test_what_leans_is_what_the_next_cycle_is_asked_about() -> None:
    assert leaning(decided(lower(9.3))[0].moves) == {CREATE: 9.3}
    assert leaning(decided(lower(8.0))[0].moves) == {}


@given(
    target=st.floats(0.02, 20_000),
    old_thousandths=st.integers(20, 50_000_000),
    used=st.none() | st.floats(0, 60_000),
    spread=st.floats(0.0001, 0.3),
)
def test_whatever_is_proposed_passes_every_guardrail(
    target: float, old_thousandths: int, used: float | None, spread: float
) -> None:
    limits = tables(run_creation=RateValue(old_thousandths / 1000, 11))
    found, move = decided(lower(target, spread), limits=limits, used=used, lean=target)
    if found.proposal is not None:
        assert move.old_per_s != move.new_per_s
        usage = {} if used is None else {CREATE: used}
        assert ask(unattended(usage), limits, found.proposal.limits, found.proposal.provenance, NOW, force=False) == ()


def test_what_is_asked_of_an_unattended_activation_includes_use() -> None:
    usage = {CREATE: 10.0}
    said = ask(unattended(usage), FIRST, tables(run_creation=RateValue(9.5, 11)), Provenance(), NOW, force=False)
    assert [(each.guardrail, each.refusal) for each in said] == [
        (
            "below use",
            "default.run_creation.per_s 9.5, of which workspaces use 10 (p99): a rate in use is not taken away",
        )
    ]
    raised = tables(run_creation=RateValue(10.5, 11))
    assert ask(unattended({CREATE: 11.0}), FIRST, raised, Provenance(), NOW, force=False) == ()
