"""What one turn does to a run: whole results compared, and rules that hold for every life."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest

from service.advance import advance
from service.pen import RunRow
from service.runs import FINAL, IllegalTransition, RunStatus, StepKind
from service.workspaces import DEFAULT_SCRIPT, ScriptStep
from tests.runrows import NOW, at, changed, changes, child, row, running, subrun_ended, told, waiting


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
        "step_due_at": at(1),
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
        "step_due_at": None,
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
        "step_due_at": None,
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

    why = "group group: 1 of 2 subruns ended FAILED or CANCELED (WAIT_ALL, FAIL_FAST)"
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


@pytest.mark.parametrize("status", sorted(FINAL | {RunStatus.PAUSED}))
def test_a_run_that_has_no_tick_is_refused(status: RunStatus) -> None:
    with pytest.raises(IllegalTransition, match=f"a run that is {status} has no tick"):
        advance(row(status=status), DEFAULT_SCRIPT, NOW)
