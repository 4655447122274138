"""What happens to a run between its turns: children come and end, callers cancel, pause and resume it.

Pure, like `advance`, and written with the same `pen`. Each function takes a locked row and returns it as it shall be,
with its events. Who calls: `commits` for spawns, `ledger` for children that end, `families` and `control` for callers.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Sequence

import msgspec

from service.errors import IllegalState, Invalid
from service.events import EventType
from service.joins import Decision, FailurePolicy, Group, GroupState, JoinPolicy, reopens
from service.pen import WITH_STEPS, Advance, Pen, RunRow
from service.runs import IllegalTransition, RunStatus, StepKind


class GroupOptions(msgspec.Struct, frozen=True):
    """How a caller wants a group joined. Null: as the group has it, or the default when this spawn is its first."""

    join_policy: JoinPolicy | None = None
    failure_policy: FailurePolicy | None = None
    quorum: int | None = None
    timeout_seconds: float | None = None


def spawned(parent: RunRow, child_run_id: uuid.UUID, group_id: str, wanted: GroupOptions, now: dt.datetime) -> Advance:
    """Count one new child on its live parent's row; `parent.groups` need hold no other group than the child's.

    Raises Invalid when the group was begun with other options, and IllegalState when its time is over.
    """
    pen = Pen(parent, now)
    run = pen.run
    group = run.groups.get(group_id)
    if group is None:
        group = _begin_group(run.run_id, group_id, wanted, pen.clock)
    else:
        _require_same_options(group, wanted)
        if group.deadline_at is not None and group.deadline_at <= pen.clock:
            raise IllegalState(f"the time of group {group_id} is over; spawn into another group")
    group = msgspec.structs.replace(group, spawned=group.spawned + 1, pending=group.pending + 1)
    if reopens(group):
        group = msgspec.structs.replace(group, state=GroupState.WAITING, decided_at=None)
    pen.put(group)
    run.pending_subruns += 1
    run.spawned_subruns += 1
    payload = {"child_run_id": child_run_id, "group_id": group_id}
    pen.step(StepKind.SUBRUN_SPAWN, payload)
    pen.event(EventType.SUBRUN_SPAWNED, payload)
    pen.judge(group_id)
    _bring_forward(run, run.groups[group_id], now)
    return pen.result()


def _begin_group(run_id: uuid.UUID, group_id: str, wanted: GroupOptions, now: dt.datetime) -> Group:
    """Make a group of nobody; raises Invalid for options that do not go together."""
    policy, timeout_s = wanted.join_policy or JoinPolicy.WAIT_ALL, wanted.timeout_seconds
    if policy is JoinPolicy.QUORUM and wanted.quorum is None:
        raise Invalid("options.quorum", "the join policy QUORUM needs it: say how many subruns must complete")
    if policy is not JoinPolicy.QUORUM and wanted.quorum is not None:
        raise Invalid("options.quorum", f"belongs to the join policy QUORUM, not to {policy}; leave it out")
    if policy is JoinPolicy.TIMEOUT and timeout_s is None:
        raise Invalid("options.timeout_seconds", "the join policy TIMEOUT needs it: say how long to wait")
    return Group(
        run_id=run_id,
        group_id=group_id,
        join_policy=policy,
        failure_policy=wanted.failure_policy or FailurePolicy.FAIL_FAST,
        quorum=wanted.quorum,
        timeout_seconds=timeout_s,
        deadline_at=None if timeout_s is None else now + dt.timedelta(seconds=timeout_s),
        spawned=0,
        pending=0,
        failed=0,
        state=GroupState.WAITING,
        decided_at=None,
    )


def _require_same_options(group: Group, wanted: GroupOptions) -> None:
    for field in GroupOptions.__struct_fields__:
        value, fixed = getattr(wanted, field), getattr(group, field)
        if value is not None and value != fixed:
            begun = "without one" if fixed is None else f"with {fixed}"
            raise Invalid(
                f"options.{field}", f"group {group.group_id} was begun {begun}; leave it out or choose another group"
            )


def _bring_forward(run: RunRow, group: Group, now: dt.datetime) -> None:
    """Make a parent due in time for what a new child brings, unless a worker may be holding it.

    A run whose step is due is due already, or claimed: its next turn sees the child. A waiting run whose announced
    children are used up by one group may have put the goal of another out of reach: its turn judges them all.
    """
    if run.status == RunStatus.PAUSED or (run.step_due_at is not None and run.step_due_at <= now):
        return
    instants = [run.next_tick_at, group.deadline_at if group.state == GroupState.WAITING else None]
    others_may_fail = run.status == RunStatus.WAITING_FOR_SUBRUN and 1 < run.expected_subruns >= run.spawned_subruns
    if group.state == GroupState.FAILED or others_may_fail:
        instants.append(now)
    run.next_tick_at = min((instant for instant in instants if instant is not None), default=None)


def child_ended(parent: RunRow, child: RunRow, now: dt.datetime) -> Advance:
    """Count one final child on its parent's row, and make the parent due if that leaves it something to do.

    Being due takes a parent away from a worker that holds it: the next claim raises the epoch, and the holder's turn is
    thrown away. That is wanted for a parent that must fail, whose step no longer matters, and for a waiting one, which
    has nothing to lose. To cancel siblings is not worth a step: the holder's own turn sees to it. A paused parent only
    counts.
    """
    pen = Pen(parent, now)
    pen.count([child])
    run = pen.run
    held = run.status in WITH_STEPS and pen.step_is_due and pen.decision() is not Decision.FAIL
    if not run.is_final and run.status != RunStatus.PAUSED and not held and pen.has_a_turn():
        run.next_tick_at = now
    return pen.result()


def cancel(run: RunRow, reason: str | None, now: dt.datetime, cancelled: Sequence[RunRow] = ()) -> Advance:
    """End a live run as CANCELED, after counting the children that were ended with it.

    Raises IllegalTransition for a final run.
    """
    pen = Pen(run, now)
    pen.end(RunStatus.CANCELED, reason, cancelled)
    return pen.result()


def give_up(run: RunRow, reason: str, now: dt.datetime, cancelled: Sequence[RunRow] = ()) -> Advance:
    """End a live run as FAILED from outside of its script: its turn was tried too often in vain."""
    pen = Pen(run, now)
    pen.tick()
    pen.end(RunStatus.FAILED, reason, cancelled)
    return pen.result()


def pause(run: RunRow, reason: str | None, now: dt.datetime) -> Advance:
    """Stop a live run and its clocks, and take it away from a worker that holds it. Raises IllegalTransition."""
    pen = Pen(run, now)
    before = run.status
    pen.change_status(RunStatus.PAUSED, reason)
    paused = pen.run
    paused.paused_from, paused.paused_at = before, now
    paused.epoch += 1
    paused.next_tick_at = None
    return pen.result()


def resume(run: RunRow, reason: str | None, now: dt.datetime) -> Advance:
    """Return a paused run to exactly what it was paused from, each of its clocks with as much left as it had.

    Raises IllegalTransition for a run that is not paused.
    """
    if run.paused_from is None or run.paused_at is None:
        raise IllegalTransition(f"{run.status} is not paused")
    pen = Pen(run, now)
    pen.change_status(RunStatus(run.paused_from), reason)
    resumed, paused_at, pause_length = pen.run, run.paused_at, now - run.paused_at
    resumed.paused_from = resumed.paused_at = None
    if resumed.step_due_at is not None:
        resumed.step_due_at += pause_length
    if resumed.wait_until is not None:
        resumed.wait_until += pause_length
    for group in run.groups.values():
        if group.deadline_at is not None and group.deadline_at > paused_at:
            pen.put(msgspec.structs.replace(group, deadline_at=group.deadline_at + pause_length))
    pen.judge()
    pen.schedule()
    return pen.result()
