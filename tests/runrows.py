"""Runs as rows for tests of the pure engine: in each stage of their lives, with groups, and what a decision changes."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Any

import msgspec

from service.joins import FailurePolicy, Group, GroupState, JoinPolicy, judge
from service.pen import Advance, RunRow
from service.runs import RunStatus

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
RUN, CHILD, WORKSPACE, AGENT, CORRELATION = (uuid.UUID(int=n) for n in range(1, 6))


def at(seconds: float) -> dt.datetime:
    """Return an instant, counted from the run's creation."""
    return NOW + dt.timedelta(seconds=seconds)


def group(**changes: Any) -> Group:
    """Return a group named "group" that waits for all of one pending child, with changes."""
    begun = Group(
        run_id=RUN,
        group_id="group",
        join_policy=JoinPolicy.WAIT_ALL,
        failure_policy=FailurePolicy.FAIL_FAST,
        quorum=None,
        timeout_seconds=None,
        deadline_at=None,
        spawned=1,
        pending=1,
        failed=0,
        state=GroupState.WAITING,
        decided_at=None,
    )
    return msgspec.structs.replace(begun, **changes)


def row(*groups: Group, **changes: Any) -> RunRow:
    """Return a run as it is accepted, with changes; its children, if any, form one group unless groups are given."""
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
        spawned_subruns=sum(each.spawned for each in groups),
        pending_subruns=sum(each.pending for each in groups),
        failed_subruns=sum(each.failed for each in groups),
        script_position=0,
        step_count=0,
        last_seq=1,
        ticks=0,
        epoch=1,
        next_tick_at=at(2),
        step_due_at=NOW,
        wait_until=None,
        paused_from=None,
        paused_at=None,
        vain_attempts=0,
        error_summary=None,
        created_at=NOW,
        started_at=None,
        ended_at=None,
    )
    run = msgspec.structs.replace(accepted, **changes)
    if run.spawned_subruns and not groups:
        counted = group(spawned=run.spawned_subruns, pending=run.pending_subruns, failed=run.failed_subruns)
        state = judge(counted, 0, NOW)
        groups = (msgspec.structs.replace(counted, state=state, decided_at=None if state == "WAITING" else NOW),)
    return msgspec.structs.replace(run, groups={each.group_id: each for each in groups})


def running(*groups: Group, **changes: Any) -> RunRow:
    """Return a run with the default script after its first tick, with changes."""
    after_first = {
        "status": RunStatus.RUNNING,
        "script_position": 1,
        "step_count": 1,
        "last_seq": 3,
        "ticks": 1,
        "started_at": NOW,
    }
    return row(*groups, **{**after_first, **changes})


def waiting(*groups: Group, **changes: Any) -> RunRow:
    """Return a run with the default script that waits for one of two expected subruns, with changes."""
    parked = {
        "status": RunStatus.WAITING_FOR_SUBRUN,
        "script_position": 2,
        "step_count": 4,
        "last_seq": 9,
        "ticks": 2,
        "step_due_at": None,
        "expected_subruns": 2,
        "wait_until": at(60),
    }
    children = {} if groups else {"spawned_subruns": 2, "pending_subruns": 1}
    return running(*groups, **{**parked, **children, **changes})


def child(status: RunStatus, group_id: str = "group") -> RunRow:
    """Return a subrun of the run that has ended."""
    return row(run_id=CHILD, parent_run_id=RUN, depth=1, status=status, group_id=group_id, ended_at=NOW)


def told(result: Advance) -> list[tuple[int, str, dict[str, Any]]]:
    """Return the events of a result as (seq, event_type, payload)."""
    return [(event.seq, event.event_type, event.payload) for event in result.events]


def changes(before: RunRow, result: Advance) -> dict[str, Any]:
    """Return the columns that a result changes; groups are rows of their own."""
    old, new = (msgspec.structs.asdict(msgspec.structs.replace(run, groups={})) for run in (before, result.run))
    return {name: value for name, value in new.items() if old[name] != value}


def group_changes(before: RunRow, result: Advance) -> dict[str, dict[str, Any]]:
    """Return the columns of groups that a result changes, by group_id; all of them for a new group."""
    found: dict[str, dict[str, Any]] = {}
    for each in result.groups:
        old = msgspec.structs.asdict(before.groups[each.group_id]) if each.group_id in before.groups else {}
        new = msgspec.structs.asdict(each)
        found[each.group_id] = {name: value for name, value in new.items() if name not in old or old[name] != value}
    return found


def changed(old: RunStatus, new: RunStatus, **more: str) -> dict[str, str]:
    """Return the payload of a change of status."""
    return {"from": old, "to": new, **more}


def subrun_ended(status: RunStatus) -> dict[str, Any]:
    """Return the payload that tells a parent of its child's end."""
    return {"child_run_id": CHILD, "status": status, "group_id": "group"}
