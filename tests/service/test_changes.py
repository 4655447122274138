"""What happens to a run between its turns: children, callers, pauses; and rules that hold for every life."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest

from service.advance import advance
from service.changes import GroupOptions, cancel, child_ended, give_up, pause, resume, spawned
from service.errors import IllegalState, Invalid
from service.joins import FailurePolicy, JoinPolicy
from service.pen import RunRow
from service.runs import PAUSABLE, IllegalTransition, RunStatus
from service.workspaces import DEFAULT_SCRIPT
from tests.runrows import (
    CHILD,
    NOW,
    at,
    changed,
    changes,
    child,
    group,
    group_changes,
    row,
    running,
    subrun_ended,
    told,
    waiting,
)


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


# ---- spawns ----------------------------------------------------------------------------------------------------------


def test_a_first_spawn_begins_its_group_and_writes_a_step() -> None:
    before = running(next_tick_at=at(3600), step_due_at=at(3600))
    wanted = GroupOptions(JoinPolicy.QUORUM, FailurePolicy.CANCEL_SIBLINGS, 2, 30.0)

    result = spawned(before, CHILD, "group", wanted, at(5))

    assert told(result) == [
        (4, "step_created", {"step_index": 2, "kind": "SUBRUN_SPAWN"}),
        (5, "subrun_spawned", {"child_run_id": CHILD, "group_id": "group"}),
    ]
    assert [(step.step_index, step.kind) for step in result.steps] == [(2, "SUBRUN_SPAWN")]
    assert result.groups == [
        group(
            join_policy="QUORUM",
            failure_policy="CANCEL_SIBLINGS",
            quorum=2,
            timeout_seconds=30.0,
            deadline_at=at(35),
        )
    ]
    assert changes(before, result) == {
        "spawned_subruns": 1,
        "pending_subruns": 1,
        "step_count": 2,
        "last_seq": 5,
        "next_tick_at": at(35),
    }


def test_a_further_spawn_into_a_group_takes_its_options() -> None:
    before = running(group(join_policy="QUORUM", quorum=2))

    result = spawned(before, CHILD, "group", GroupOptions(), at(5))

    assert group_changes(before, result) == {"group": {"spawned": 2, "pending": 2}}


@pytest.mark.parametrize(
    ("wanted", "refusal"),
    [
        (GroupOptions(join_policy=JoinPolicy.WAIT_ANY), "options.join_policy: group group was begun with QUORUM; "),
        (GroupOptions(failure_policy=FailurePolicy.IGNORE_FAILURE), "options.failure_policy: group group was begun "),
        (GroupOptions(quorum=1), "options.quorum: group group was begun with 2; "),
        (GroupOptions(timeout_seconds=3.0), "options.timeout_seconds: group group was begun without one; "),
    ],
)
def test_a_spawn_with_other_options_than_its_group_is_refused_by_field(wanted: GroupOptions, refusal: str) -> None:
    with pytest.raises(Invalid) as refused:
        spawned(running(group(join_policy="QUORUM", quorum=2)), CHILD, "group", wanted, at(5))
    assert str(refused.value).startswith(refusal)


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        (GroupOptions(join_policy=JoinPolicy.QUORUM), "options.quorum"),
        (GroupOptions(quorum=1), "options.quorum"),
        (GroupOptions(join_policy=JoinPolicy.TIMEOUT), "options.timeout_seconds"),
    ],
)
def test_options_that_do_not_go_together_begin_no_group(wanted: GroupOptions, field: str) -> None:
    with pytest.raises(Invalid) as refused:
        spawned(running(), CHILD, "group", wanted, at(5))
    assert refused.value.extensions["field"] == field


def test_a_spawn_into_a_group_whose_time_is_over_is_refused() -> None:
    over = group(join_policy="TIMEOUT", timeout_seconds=4.0, deadline_at=at(4))

    with pytest.raises(IllegalState, match="the time of group group is over"):
        spawned(running(over), CHILD, "group", GroupOptions(), at(4))


@pytest.mark.parametrize(
    ("joined", "state"),
    [
        pytest.param(group(pending=0, state="JOINED", decided_at=NOW), "WAITING", id="nobody was left in it"),
        pytest.param(
            group(join_policy="WAIT_ANY", pending=0, state="JOINED", decided_at=NOW), "JOINED", id="it has its number"
        ),
    ],
)
def test_a_spawn_reopens_a_group_that_was_joined_for_want_of_children(joined: Any, state: str) -> None:
    result = spawned(running(joined), CHILD, "group", GroupOptions(), at(5))

    assert [(each.state, each.pending) for each in result.groups] == [(state, 1)]


@pytest.mark.parametrize(
    ("parent", "next_tick_at"),
    [
        pytest.param(running(next_tick_at=at(3), step_due_at=at(1)), at(3), id="a worker may hold it: left alone"),
        pytest.param(running(next_tick_at=at(90), step_due_at=at(90)), at(7), id="its step is later than the deadline"),
        pytest.param(running(next_tick_at=at(6), step_due_at=at(6)), at(6), id="its step is earlier"),
        pytest.param(waiting(group(), expected_subruns=0, next_tick_at=None), at(7), id="it is parked"),
        pytest.param(waiting(group(), expected_subruns=3, next_tick_at=at(60)), at(2), id="others may be out of reach"),
        pytest.param(
            waiting(group(), expected_subruns=0, next_tick_at=None, status="PAUSED", paused_from="WAITING_FOR_SUBRUN"),
            None,
            id="it is paused",
        ),
    ],
)
def test_a_spawn_makes_its_parent_due_at_the_groups_deadline(parent: RunRow, next_tick_at: dt.datetime | None) -> None:
    wanted = GroupOptions(timeout_seconds=5.0)

    assert spawned(parent, CHILD, "timed", wanted, at(2)).run.next_tick_at == next_tick_at


def test_a_quorum_above_what_was_announced_fails_the_parent_at_once() -> None:
    parent = waiting(expected_subruns=1, spawned_subruns=0, pending_subruns=0, next_tick_at=at(60))
    wanted = GroupOptions(JoinPolicy.QUORUM, quorum=2)

    result = spawned(parent, CHILD, "group", wanted, at(5))

    assert ([each.state for each in result.groups], result.run.next_tick_at) == (["FAILED"], at(5))


# ---- what a decided group brings -------------------------------------------------------------------------------------


def test_a_joined_group_that_cancels_siblings_makes_a_working_parent_end_them() -> None:
    race = group(join_policy="WAIT_ANY", failure_policy="CANCEL_SIBLINGS", spawned=2, pending=2)
    before = running(race, next_tick_at=at(3600), step_due_at=at(3600))

    joined = child_ended(before, child(RunStatus.COMPLETED), at(9)).run
    asks = advance(joined, DEFAULT_SCRIPT, at(9))
    done = advance(joined, DEFAULT_SCRIPT, at(9), [child(RunStatus.CANCELED)])

    assert (joined.next_tick_at, sorted(asks.doomed)) == (at(9), ["group"])
    assert told(done) == [(5, "subrun_cancelled", subrun_ended(RunStatus.CANCELED))]
    assert (done.run.status, done.run.next_tick_at, done.run.ticks, done.doomed) == (
        "RUNNING",
        at(3600),
        before.ticks + 1,
        frozenset(),
    )


def test_siblings_are_not_worth_a_step_that_a_worker_is_doing() -> None:
    race = group(join_policy="WAIT_ANY", failure_policy="CANCEL_SIBLINGS", spawned=2, pending=2)
    held = running(race, next_tick_at=at(11), step_due_at=at(8))

    assert child_ended(held, child(RunStatus.COMPLETED), at(9)).run.next_tick_at == at(11)


def test_a_deadline_that_passes_while_the_parent_works_decides_the_group_and_leaves_no_event() -> None:
    timed = group(join_policy="TIMEOUT", timeout_seconds=5.0, deadline_at=at(5))
    before = running(timed, next_tick_at=at(5), step_due_at=at(3600))

    result = advance(before, DEFAULT_SCRIPT, at(5))

    assert (told(result), changes(before, result)) == ([], {"next_tick_at": at(3600)})
    assert group_changes(before, result) == {"group": {"state": "JOINED", "decided_at": at(5)}}


def test_a_run_that_waits_for_approval_fails_with_a_group() -> None:
    before = running(group(spawned=2, pending=2), status="WAITING_FOR_APPROVAL", step_due_at=None, next_tick_at=None)

    failed = child_ended(before, child(RunStatus.FAILED), at(9)).run
    ended = advance(failed, DEFAULT_SCRIPT, at(9), [child(RunStatus.CANCELED)]).run

    assert (failed.next_tick_at, ended.status, ended.pending_subruns) == (at(9), "FAILED", 0)


# ---- callers ---------------------------------------------------------------------------------------------------------


def test_a_run_that_is_given_up_fails_with_the_reason() -> None:
    result = give_up(running(vain_attempts=8), "could not be advanced", at(9))

    assert (result.run.status, result.run.error_summary, result.run.vain_attempts) == (
        "FAILED",
        "could not be advanced",
        0,
    )


def test_a_pause_takes_the_run_from_its_worker_and_keeps_its_clocks() -> None:
    before = waiting(group(timeout_seconds=30.0, deadline_at=at(30)), epoch=4)

    result = pause(before, "lunch", at(10))

    assert told(result) == [
        (10, "state_changed", changed(RunStatus.WAITING_FOR_SUBRUN, RunStatus.PAUSED, reason="lunch"))
    ]
    assert changes(before, result) == {
        "status": "PAUSED",
        "paused_from": "WAITING_FOR_SUBRUN",
        "paused_at": at(10),
        "epoch": 5,
        "last_seq": 10,
        "next_tick_at": None,
    }
    assert result.groups == []


def test_a_resume_returns_to_the_wait_with_as_much_time_left_as_there_was() -> None:
    before = waiting(group(timeout_seconds=30.0, deadline_at=at(30)))

    result = resume(pause(before, None, at(10)).run, None, at(1010))

    assert changes(before, result) == {
        "epoch": 2,
        "last_seq": 11,
        "wait_until": at(1060),
        "next_tick_at": at(1030),
    }
    assert group_changes(before, result) == {"group": {"deadline_at": at(1030)}}


@pytest.mark.parametrize(
    ("before", "next_tick_at"),
    [
        pytest.param(
            running(step_due_at=at(15), next_tick_at=at(15)), at(1015), id="what is left of a latency is left"
        ),
        pytest.param(running(step_due_at=at(9), next_tick_at=at(12)), at(1010), id="a step in a worker's hands is due"),
        pytest.param(row(), at(1010), id="a run without a tick is due"),
        pytest.param(waiting(wait_until=None, next_tick_at=None), None, id="an unbounded wait goes on"),
        pytest.param(
            running(status="WAITING_FOR_APPROVAL", step_due_at=None, next_tick_at=None), None, id="so does an approval"
        ),
    ],
)
def test_a_resumed_run_is_due_when_it_would_have_been(before: RunRow, next_tick_at: dt.datetime | None) -> None:
    result = resume(pause(before, None, at(10)).run, None, at(1010))

    if next_tick_at == at(1010):  # it was due: as many seconds ago as before the pause, which is now or earlier
        assert result.run.next_tick_at is not None
        assert result.run.next_tick_at <= next_tick_at
    else:
        assert result.run.next_tick_at == next_tick_at
    assert (result.run.status, result.run.paused_from, result.run.paused_at) == (before.status, None, None)


@pytest.mark.parametrize(
    ("ends", "status"),
    [(RunStatus.COMPLETED, RunStatus.COMPLETED), (RunStatus.FAILED, RunStatus.FAILED)],
)
def test_a_child_that_ends_during_a_pause_is_counted_and_takes_effect_at_the_resume(
    ends: RunStatus, status: RunStatus
) -> None:
    paused = pause(waiting(), None, at(10)).run

    counted = child_ended(paused, child(ends), at(20))
    resumed = resume(counted.run, None, at(30))

    assert (counted.run.status, counted.run.pending_subruns, counted.run.next_tick_at) == ("PAUSED", 0, None)
    assert (resumed.run.status, resumed.run.next_tick_at) == ("WAITING_FOR_SUBRUN", at(30))
    assert advance(resumed.run, DEFAULT_SCRIPT, at(30)).run.status == status


def test_the_time_of_a_group_does_not_run_while_its_parent_is_paused() -> None:
    timed = group(join_policy="TIMEOUT", timeout_seconds=15.0, deadline_at=at(15), spawned=2, pending=2)
    paused = pause(waiting(timed), None, at(10)).run

    counted = child_ended(paused, child(RunStatus.COMPLETED), at(500)).run
    begun = spawned(counted, CHILD, "late", GroupOptions(timeout_seconds=7.0), at(500)).run
    resumed = resume(begun, None, at(1010)).run

    assert {each.group_id: (each.state, each.deadline_at) for each in resumed.groups.values()} == {
        "group": ("WAITING", at(1015)),
        "late": ("WAITING", at(1017)),
    }


@pytest.mark.parametrize("status", sorted(set(RunStatus) - PAUSABLE))
def test_what_has_ended_or_is_paused_cannot_be_paused(status: RunStatus) -> None:
    with pytest.raises(IllegalTransition):
        pause(row(status=status), None, NOW)


@pytest.mark.parametrize("status", sorted(set(RunStatus) - {RunStatus.PAUSED}))
def test_what_is_not_paused_cannot_be_resumed(status: RunStatus) -> None:
    with pytest.raises(IllegalTransition, match=f"{status} is not paused"):
        resume(row(status=status), None, NOW)


def test_a_paused_run_can_be_cancelled() -> None:
    result = cancel(pause(waiting(), None, at(10)).run, "enough", at(20), [child(RunStatus.CANCELED)])

    assert (result.run.status, result.run.paused_from, result.run.paused_at, result.run.wait_until) == (
        "CANCELED",
        None,
        None,
        None,
    )
