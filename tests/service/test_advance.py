"""What one turn does to a run: whole results compared, and rules that hold for every life."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.advance import Advance, RunRow, advance, cancel, child_ended
from service.events import EventType
from service.runs import FINAL, TRANSITIONS, IllegalTransition, RunStatus, StepKind
from service.workspaces import DEFAULT_SCRIPT, ScriptStep

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
RUN, CHILD, WORKSPACE, AGENT, CORRELATION = (uuid.UUID(int=n) for n in range(1, 6))


def at(seconds: float) -> dt.datetime:
    """Return an instant, counted from the run's creation."""
    return NOW + dt.timedelta(seconds=seconds)


def row(**changes: Any) -> RunRow:
    """Return a run as it is accepted, with changes."""
    accepted = RunRow(
        run_id=RUN,
        workspace_id=WORKSPACE,
        agent_id=AGENT,
        parent_run_id=None,
        depth=0,
        status=RunStatus.PENDING,
        correlation_id=CORRELATION,
        group_id=None,
        expected_subruns=0,
        max_wait_seconds=60.0,
        spawned_subruns=0,
        pending_subruns=0,
        failed_subruns=0,
        script_position=0,
        step_count=0,
        last_seq=1,
        ticks=0,
        epoch=1,
        next_tick_at=at(2),
        wait_until=None,
        error_summary=None,
        created_at=NOW,
        started_at=None,
        ended_at=None,
    )
    return msgspec.structs.replace(accepted, **changes)


def running(**changes: Any) -> RunRow:
    """Return a run with the default script after its first tick, with changes."""
    after_first = {
        "status": RunStatus.RUNNING,
        "script_position": 1,
        "step_count": 1,
        "last_seq": 3,
        "ticks": 1,
        "started_at": NOW,
    }
    return row(**{**after_first, **changes})


def waiting(**changes: Any) -> RunRow:
    """Return a run with the default script that waits for one of two expected subruns, with changes."""
    parked = {
        "status": RunStatus.WAITING_FOR_SUBRUN,
        "script_position": 2,
        "step_count": 4,
        "last_seq": 9,
        "ticks": 2,
        "expected_subruns": 2,
        "spawned_subruns": 2,
        "pending_subruns": 1,
        "wait_until": at(60),
    }
    return running(**{**parked, **changes})


def child(status: RunStatus) -> RunRow:
    """Return a subrun of the run that has ended."""
    return row(run_id=CHILD, parent_run_id=RUN, depth=1, status=status, group_id="group", ended_at=NOW)


def told(result: Advance) -> list[tuple[int, str, dict[str, Any]]]:
    """Return the events of a result as (seq, event_type, payload)."""
    return [(event.seq, event.event_type, event.payload) for event in result.events]


def changes(before: RunRow, result: Advance) -> dict[str, Any]:
    """Return the columns that a result changes."""
    old, new = msgspec.structs.asdict(before), msgspec.structs.asdict(result.run)
    return {name: value for name, value in new.items() if old[name] != value}


def changed(old: RunStatus, new: RunStatus, **more: str) -> dict[str, str]:
    """Return the payload of a change of status."""
    return {"from": old, "to": new, **more}


def subrun_ended(status: RunStatus) -> dict[str, Any]:
    """Return the payload that tells a parent of its child's end."""
    return {"child_run_id": CHILD, "status": status, "group_id": "group"}


def test_the_first_tick_starts_the_run_and_executes_its_first_step() -> None:
    before = row()

    result = advance(before, DEFAULT_SCRIPT, at(1))

    assert told(result) == [
        (2, "state_changed", changed(RunStatus.PENDING, RunStatus.RUNNING)),
        (3, "step_created", {"step_index": 1, "kind": "MODEL_CALL"}),
    ]
    assert [(s.step_index, s.kind, s.payload) for s in result.steps] == [(1, "MODEL_CALL", {"script_position": 1})]
    assert changes(before, result) == {
        "status": RunStatus.RUNNING,
        "script_position": 1,
        "step_count": 1,
        "last_seq": 3,
        "ticks": 1,
        "next_tick_at": at(1),
        "started_at": at(1),
    }


def test_the_tick_of_the_last_step_completes_the_run() -> None:
    before = running()

    result = advance(before, DEFAULT_SCRIPT, at(2))

    assert told(result) == [
        (4, "step_created", {"step_index": 2, "kind": "OBSERVATION"}),
        (5, "state_changed", changed(RunStatus.RUNNING, RunStatus.COMPLETED)),
    ]
    assert changes(before, result) == {
        "status": RunStatus.COMPLETED,
        "script_position": 2,
        "step_count": 2,
        "last_seq": 5,
        "ticks": 2,
        "next_tick_at": None,
        "ended_at": at(2),
    }


def test_a_turn_leaves_the_row_that_it_was_given_alone() -> None:
    before = row()

    advance(before, DEFAULT_SCRIPT, at(1))

    assert before == row()


def test_a_first_step_with_a_latency_is_due_that_long_after_the_creation() -> None:
    script = (ScriptStep(StepKind.PLAN, latency_ms=500), ScriptStep(StepKind.MESSAGE, latency_ms=250))

    started = advance(row(), script, at(0.1))
    executed = advance(started.run, script, at(0.5))

    assert (told(started), started.steps, started.run.next_tick_at, started.run.ticks) == (
        [(2, "state_changed", changed(RunStatus.PENDING, RunStatus.RUNNING))],
        [],
        at(0.5),
        1,
    )
    assert (executed.run.script_position, executed.run.next_tick_at) == (1, at(0.75))
    assert [s.payload for s in executed.steps] == [{"script_position": 1, "latency_ms": 500}]


def test_a_late_worker_does_not_shorten_the_life_of_a_run_by_a_tick() -> None:
    script = (ScriptStep(StepKind.PLAN, latency_ms=500),)

    started = advance(row(), script, at(30))

    assert (started.steps, started.run.status, started.run.next_tick_at) == ([], RunStatus.RUNNING, at(0.5))


def test_a_later_step_is_due_its_latency_after_the_step_before_it() -> None:
    script = (ScriptStep(StepKind.MODEL_CALL), ScriptStep(StepKind.OBSERVATION, latency_ms=1500))

    assert advance(row(), script, at(1)).run.next_tick_at == at(2.5)


def test_a_step_with_an_error_is_written_and_fails_the_run() -> None:
    before = row()

    result = advance(before, (ScriptStep(StepKind.TOOL_CALL, error="out of tea"), *DEFAULT_SCRIPT), at(1))

    assert told(result) == [
        (2, "state_changed", changed(RunStatus.PENDING, RunStatus.RUNNING)),
        (3, "step_created", {"step_index": 1, "kind": "TOOL_CALL"}),
        (4, "state_changed", changed(RunStatus.RUNNING, RunStatus.FAILED, reason="out of tea")),
    ]
    assert [s.payload for s in result.steps] == [{"script_position": 1, "error": "out of tea"}]
    assert changes(before, result) == {
        "status": RunStatus.FAILED,
        "script_position": 1,
        "step_count": 1,
        "last_seq": 4,
        "ticks": 1,
        "next_tick_at": None,
        "error_summary": "out of tea",
        "started_at": at(1),
        "ended_at": at(1),
    }


def test_steps_are_numbered_beside_those_that_spawns_have_written() -> None:
    before = running(step_count=3, last_seq=7, spawned_subruns=2)

    result = advance(before, DEFAULT_SCRIPT, at(2))

    assert [s.step_index for s in result.steps] == [4]
    assert [event.seq for event in result.events] == [8, 9]


@pytest.mark.parametrize(
    ("before", "wait_until"),
    [
        pytest.param(
            running(expected_subruns=1, max_wait_seconds=5.0), at(7), id="expected subruns are waited for in bounds"
        ),
        pytest.param(running(spawned_subruns=1, pending_subruns=1), None, id="others are waited for without bounds"),
    ],
)
def test_a_run_with_open_subruns_is_parked_after_its_last_step(before: RunRow, wait_until: dt.datetime | None) -> None:
    result = advance(before, DEFAULT_SCRIPT, at(2))

    assert told(result) == [
        (4, "step_created", {"step_index": 2, "kind": "OBSERVATION"}),
        (5, "state_changed", changed(RunStatus.RUNNING, RunStatus.WAITING_FOR_SUBRUN)),
    ]
    assert (result.run.wait_until, result.run.next_tick_at) == (wait_until, wait_until)


def test_a_run_whose_subruns_have_all_completed_is_not_parked() -> None:
    before = running(expected_subruns=1, spawned_subruns=1)

    assert advance(before, DEFAULT_SCRIPT, at(2)).run.status == RunStatus.COMPLETED


def test_a_join_resumes_and_completes_in_one_tick() -> None:
    before = waiting(pending_subruns=0)

    result = advance(before, DEFAULT_SCRIPT, at(9))

    assert told(result) == [
        (10, "state_changed", changed(RunStatus.WAITING_FOR_SUBRUN, RunStatus.RUNNING)),
        (11, "state_changed", changed(RunStatus.RUNNING, RunStatus.COMPLETED)),
    ]
    assert changes(before, result) == {
        "status": RunStatus.COMPLETED,
        "last_seq": 11,
        "ticks": 3,
        "next_tick_at": None,
        "wait_until": None,
        "ended_at": at(9),
    }


def test_a_spurious_wake_parks_the_run_again_and_is_no_tick() -> None:
    before = waiting()

    result = advance(before, DEFAULT_SCRIPT, at(9))

    assert (told(result), result.steps, changes(before, result)) == ([], [], {"next_tick_at": at(60)})


def test_the_end_of_the_wait_fails_the_run_and_says_for_what_it_waited() -> None:
    result = advance(waiting(), DEFAULT_SCRIPT, at(60))

    assert (result.run.status, result.run.error_summary, result.run.wait_until) == (
        RunStatus.FAILED,
        "waited 60 s for 1 of 2 expected subruns: 0 never spawned, 1 unfinished",
        None,
    )


@pytest.mark.parametrize("before", [row, running, waiting], ids=["pending", "running", "waiting"])
def test_a_failed_subrun_fails_the_run_at_its_next_tick_without_a_step(before: Any) -> None:
    run: RunRow = before(spawned_subruns=2, pending_subruns=0, failed_subruns=1)

    result = advance(run, DEFAULT_SCRIPT, at(9))

    why = "1 of 2 subruns ended FAILED or CANCELED (FAIL_FAST)"
    assert told(result) == [
        (run.last_seq + 1, "state_changed", changed(RunStatus(run.status), RunStatus.FAILED, reason=why))
    ]
    assert (result.steps, result.run.error_summary, result.run.ticks) == ([], why, run.ticks + 1)


def test_children_that_end_with_a_failing_run_are_counted_before_its_last_event() -> None:
    before = running(spawned_subruns=1, pending_subruns=1)
    script = (DEFAULT_SCRIPT[0], ScriptStep(StepKind.OBSERVATION, error="no"))

    result = advance(before, script, at(2), [child(RunStatus.CANCELED)])

    assert told(result) == [
        (4, "step_created", {"step_index": 2, "kind": "OBSERVATION"}),
        (5, "subrun_cancelled", subrun_ended(RunStatus.CANCELED)),
        (6, "state_changed", changed(RunStatus.RUNNING, RunStatus.FAILED, reason="no")),
    ]
    assert (result.run.pending_subruns, result.run.failed_subruns) == (0, 1)


@pytest.mark.parametrize("status", sorted(FINAL | {RunStatus.PAUSED, RunStatus.WAITING_FOR_APPROVAL}))
def test_a_run_that_has_no_tick_is_refused(status: RunStatus) -> None:
    with pytest.raises(IllegalTransition, match=f"a run that is {status} has no tick"):
        advance(row(status=status), DEFAULT_SCRIPT, NOW)


@pytest.mark.parametrize(
    ("parent", "status", "event_type", "next_tick_at"),
    [
        pytest.param(
            waiting(), RunStatus.COMPLETED, "subrun_completed", at(9), id="the last join makes a waiting parent due"
        ),
        pytest.param(
            waiting(pending_subruns=2, next_tick_at=at(60)),
            RunStatus.COMPLETED,
            "subrun_completed",
            at(60),
            id="an earlier join leaves a waiting parent parked",
        ),
        pytest.param(
            waiting(pending_subruns=2),
            RunStatus.FAILED,
            "subrun_failed",
            at(9),
            id="a failure makes a waiting parent due",
        ),
        pytest.param(
            running(spawned_subruns=1, pending_subruns=1, next_tick_at=at(3600)),
            RunStatus.CANCELED,
            "subrun_cancelled",
            at(9),
            id="a cancelled child makes a running parent due, however long its next step would take",
        ),
        pytest.param(
            running(spawned_subruns=1, pending_subruns=1, next_tick_at=at(3600)),
            RunStatus.COMPLETED,
            "subrun_completed",
            at(3600),
            id="a completed child leaves a running parent to its worker",
        ),
    ],
)
def test_a_child_that_ends_is_counted_on_its_parent(
    parent: RunRow, status: RunStatus, event_type: str, next_tick_at: dt.datetime
) -> None:
    result = child_ended(parent, child(status), at(9))

    assert told(result) == [(parent.last_seq + 1, event_type, subrun_ended(status))]
    assert (result.run.pending_subruns, result.run.failed_subruns, result.run.next_tick_at, result.run.ticks) == (
        parent.pending_subruns - 1,
        parent.failed_subruns + (status != RunStatus.COMPLETED),
        next_tick_at,
        parent.ticks,
    )


def test_a_cancelled_run_keeps_the_reason() -> None:
    result = cancel(running(), "changed my mind", at(9))

    assert told(result) == [
        (4, "state_changed", changed(RunStatus.RUNNING, RunStatus.CANCELED, reason="changed my mind"))
    ]
    assert (result.run.status, result.run.error_summary, result.run.ended_at, result.run.next_tick_at) == (
        RunStatus.CANCELED,
        "changed my mind",
        at(9),
        None,
    )


def test_a_final_run_is_not_cancelled() -> None:
    with pytest.raises(IllegalTransition, match="COMPLETED -> CANCELED"):
        cancel(row(status=RunStatus.COMPLETED), None, NOW)


steps = st.builds(
    ScriptStep,
    kind=st.sampled_from([kind for kind in StepKind if kind is not StepKind.SUBRUN_SPAWN]),
    latency_ms=st.sampled_from([0.0, 0.5, 700.0]),
    error=st.sampled_from([None] * 9 + ["broken"]),
)
moves = st.lists(st.sampled_from(["tick", "spawn", "complete", "fail", "cancel child", "cancel"]), max_size=30)


@given(script=st.lists(steps, min_size=1, max_size=5), expected=st.integers(0, 3), story=moves)
def test_every_life_is_legal_numbered_without_gaps_and_never_due_after_its_end(
    script: list[ScriptStep], expected: int, story: list[str]
) -> None:
    run, now = row(expected_subruns=expected), NOW
    events, written = [], []
    ends = {"complete": RunStatus.COMPLETED, "fail": RunStatus.FAILED, "cancel child": RunStatus.CANCELED}
    for move in [*story, *["tick"] * 10]:
        if run.is_final:
            break
        result: Advance | None = None
        if move == "tick" and run.next_tick_at is not None:
            now = max(now, run.next_tick_at)
            result = advance(run, script, now)
            if result.run.status == RunStatus.FAILED:
                orphans = [child(RunStatus.CANCELED)] * run.pending_subruns
                result = advance(run, script, now, orphans)
        elif move == "spawn":
            run = msgspec.structs.replace(
                run, spawned_subruns=run.spawned_subruns + 1, pending_subruns=run.pending_subruns + 1
            )
        elif move in ends and run.pending_subruns > 0:
            result = child_ended(run, child(ends[move]), now)
        elif move == "cancel":
            result = cancel(run, None, now, [child(RunStatus.CANCELED)] * run.pending_subruns)
        if result is not None:
            run = result.run
            events += result.events
            written += result.steps
        assert run.is_final or run.next_tick_at is not None or run.pending_subruns > 0, "parked with nobody to wake it"

    assert [event.seq for event in events] == list(range(2, run.last_seq + 1))
    statuses = [(e.payload["from"], e.payload["to"]) for e in events if e.event_type is EventType.STATE_CHANGED]
    assert all(new in TRANSITIONS[old] for old, new in statuses)
    assert [old for old, _ in statuses[1:]] == [new for _, new in statuses[:-1]]
    assert [step.kind for step in written] == [step.kind for step in script[: run.script_position]]
    assert [step.step_index for step in written] == list(range(1, run.step_count + 1))
    if run.is_final:
        assert (run.next_tick_at, run.pending_subruns, run.ended_at) == (None, 0, now)
        assert statuses[-1][1] == run.status
        assert events[-1].event_type is EventType.STATE_CHANGED
    if run.status == RunStatus.COMPLETED:
        assert run.script_position == len(script)
        assert run.failed_subruns == 0
        assert run.spawned_subruns >= expected
