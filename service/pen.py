"""The pen: writes one decision about one run on a copy of its row, numbering steps and events as it goes.

Pure. It knows how each column follows from what happens (a status that changes, a child that ends, the clocks that
decide when the run is due next) and not when anything happens: that is `advance`. Nothing changes a run's row but a
pen, so what holds after every stroke holds always: every change of status is legal, `seq` has no gaps, a final run is
never due, and a paused one neither.
"""

from __future__ import annotations

import copy
import datetime as dt
import math
import uuid
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from service.events import EventType, NewEvent
from service.joins import Decision, Group, GroupState, decide, judge, why_failed, why_waited_in_vain
from service.runs import FINAL, RunStatus, StepKind, require_legal
from service.toolcalls import Call, ToolCallStatus

WITH_STEPS = (RunStatus.PENDING, RunStatus.RUNNING)
"""Statuses in which a turn may execute a step."""


class RunRow(msgspec.Struct, gc=False, omit_defaults=True):
    """The columns of a run that the engine reads and writes, explained in `runs.Run`; its groups; its tool call."""

    run_id: uuid.UUID
    workspace_id: uuid.UUID
    agent_id: uuid.UUID
    parent_run_id: uuid.UUID | None
    depth: int
    status: str
    correlation_id: uuid.UUID
    group_id: str | None
    expected_subruns: int
    max_wait_seconds: float
    spawned_subruns: int
    pending_subruns: int
    failed_subruns: int
    script_position: int
    tool_call_id: uuid.UUID | None
    tool_calls: int
    step_count: int
    last_seq: int
    ticks: int
    epoch: int
    next_tick_at: dt.datetime | None
    step_due_at: dt.datetime | None
    wait_until: dt.datetime | None
    paused_from: str | None
    paused_at: dt.datetime | None
    vain_attempts: int
    error_summary: str | None
    created_at: dt.datetime
    started_at: dt.datetime | None
    ended_at: dt.datetime | None
    delayed_under: str | None = None
    groups: dict[str, Group] = {}
    """The groups of its children, by group_id, but for those that are joined with nobody left in them."""
    tool_call: Call | None = None
    """What `tool_call_id` names."""

    @property
    def is_final(self) -> bool:
        """Whether the run has ended."""
        return self.status in FINAL

    @property
    def missing(self) -> int:
        """How many announced children were never spawned."""
        return max(0, self.expected_subruns - self.spawned_subruns)


class NewStep(msgspec.Struct, frozen=True):
    """A step about to be written; the database stamps `created_at`."""

    run_id: uuid.UUID
    step_index: int
    kind: StepKind
    payload: dict[str, Any]
    correlation_id: uuid.UUID


class Advance(NamedTuple):
    """What one decision writes about one run."""

    run: RunRow  # the row as it shall be
    steps: list[NewStep]
    events: list[NewEvent]
    groups: list[Group]  # those that the decision changed, as they shall be
    doomed: frozenset[str]  # groups whose pending children must end first: until they have, nothing may be written
    tool_calls: list[Call]  # those that the decision made or changed, as they shall be


class Pen:
    """Writes on a copy of a run's row; `result` is what was written."""

    def __init__(self, run: RunRow, now: dt.datetime) -> None:
        self.run = copy.copy(run)
        self.now = now
        self._steps: list[NewStep] = []
        self._events: list[NewEvent] = []
        self._changed_groups: dict[str, Group] = {}
        self._changed_calls: dict[uuid.UUID, Call] = {}

    @property
    def clock(self) -> dt.datetime:
        """The instant as the run's own clocks show it: they stand still while it is paused."""
        return self.run.paused_at or self.now

    def result(self) -> Advance:
        """Return all that was written."""
        run = self.run
        doomed = frozenset(
            group.group_id for group in run.groups.values() if group.pending and (run.is_final or group.leaves_siblings)
        )
        return Advance(
            run,
            self._steps,
            self._events,
            list(self._changed_groups.values()),
            doomed,
            list(self._changed_calls.values()),
        )

    # ---- what happens to the run itself ------------------------------------------------------------------------------

    def tick(self) -> None:
        """Count a turn that changes the run."""
        self.run.ticks += 1
        self.run.vain_attempts = 0
        if self.run.started_at is None:
            self.run.started_at = self.now

    def event(self, event_type: EventType, payload: dict[str, Any]) -> None:
        """Append an event."""
        run = self.run
        run.last_seq += 1
        self._events.append(
            NewEvent(run.run_id, run.last_seq, event_type, payload, run.correlation_id, run.workspace_id)
        )

    def step(self, kind: StepKind, payload: dict[str, Any]) -> None:
        """Write a step, with its event."""
        run = self.run
        run.step_count += 1
        self._steps.append(NewStep(run.run_id, run.step_count, kind, payload, run.correlation_id))
        self.event(EventType.STEP_CREATED, {"step_index": run.step_count, "kind": kind})

    def change_status(self, new: RunStatus, reason: str | None = None) -> None:
        """Go over to another status; raises IllegalTransition. A pause leaves the bound of a wait where it is."""
        old = RunStatus(self.run.status)
        require_legal(old, new)
        self.run.status = new
        if RunStatus.PAUSED not in (old, new):
            self.run.wait_until = None
        payload = {"from": old, "to": new}
        self.event(EventType.STATE_CHANGED, payload if reason is None else {**payload, "reason": reason})

    def end(self, final: RunStatus, reason: str | None = None, cancelled: Iterable[RunRow] = ()) -> None:
        """Make the run final, after counting the children that were ended with it; `reason` stands in its row.

        A tool call that the run still waits for ends with it: what was not started never will be.
        """
        self.count(cancelled)
        if self.run.tool_call is not None:
            self.leave_call(self.run.tool_call)
        self.change_status(final, reason)
        run = self.run
        run.error_summary = reason
        run.ended_at = self.now
        run.next_tick_at = run.step_due_at = run.wait_until = run.delayed_under = None
        run.paused_from = run.paused_at = None

    # ---- its tool call -----------------------------------------------------------------------------------------------

    def put_call(self, call: Call) -> None:
        """Write the run's tool call."""
        self.run.tool_call, self.run.tool_call_id = call, call.tool_call_id
        self._changed_calls[call.tool_call_id] = call

    def leave_call(self, call: Call) -> None:
        """Tell the end of a tool call whose run ends first; what a started tool has done by then is not known."""
        if call.is_open:
            error = "its run ended while the tool was running" if call.started_at is not None else None
            call = msgspec.structs.replace(call, status=ToolCallStatus.CANCELED, error=error, ended_at=self.now)
            self.put_call(call)
        if call.status != ToolCallStatus.REJECTED:  # that was told when it happened
            self.event(EventType.TOOL_CALL_COMPLETED, call.told(status=call.status))

    # ---- its children ------------------------------------------------------------------------------------------------

    def count(self, ended: Iterable[RunRow]) -> None:
        """Count children that have ended, each on the run and on its group, and judge the groups."""
        for child in ended:
            run = self.run
            run.pending_subruns -= 1
            failed = child.status != RunStatus.COMPLETED
            run.failed_subruns += failed
            group = run.groups[child.group_id or ""]
            group = msgspec.structs.replace(group, pending=group.pending - 1, failed=group.failed + failed)
            self.put(group)
            self.judge(group.group_id)
            self.event(
                _CHILD_ENDED[RunStatus(child.status)],
                {"child_run_id": child.run_id, "status": child.status, "group_id": child.group_id},
            )

    def put(self, group: Group) -> None:
        """Write a group."""
        self.run.groups = {**self.run.groups, group.group_id: group}
        self._changed_groups[group.group_id] = group

    def judge(self, *group_ids: str, at_join: bool = False) -> None:
        """Judge some groups, or all when none is named, and write what was decided.

        Until the run has reached its join, children that nobody announced may still be spawned; a run that announced
        its subruns is held to that number from the start.
        """
        run = self.run
        at_join = at_join or RunStatus.WAITING_FOR_SUBRUN in (run.status, run.paused_from)
        more = run.missing if at_join or run.expected_subruns > 0 else math.inf
        for group in [run.groups[group_id] for group_id in group_ids] or list(run.groups.values()):
            state = judge(group, more, self.clock)
            if state != group.state:
                self.put(msgspec.structs.replace(group, state=state, decided_at=self.now))

    def decision(self) -> Decision:
        """Say what the run does about its children, as its groups were judged."""
        run = self.run
        return decide((group.state for group in run.groups.values()), run.missing, run.wait_until, self.clock)

    def why_failed(self) -> str:
        """Say in one line why `decision` is FAIL."""
        run = self.run
        for group in run.groups.values():
            if group.state == GroupState.FAILED:
                return why_failed(group)
        return why_waited_in_vain(run.expected_subruns, run.spawned_subruns, run.pending_subruns, run.max_wait_seconds)

    # ---- its clocks --------------------------------------------------------------------------------------------------

    def schedule(self) -> None:
        """Make the run due when it next has something to do, or park it."""
        run = self.run
        if run.is_final or run.status == RunStatus.PAUSED:
            run.next_tick_at = None
        elif self.has_a_turn():
            run.next_tick_at = self.now
        else:
            deadlines = [g.deadline_at for g in run.groups.values() if g.state == GroupState.WAITING]
            clocks = (run.step_due_at, run.wait_until, *deadlines)
            run.next_tick_at = min((instant for instant in clocks if instant is not None), default=None)

    def delay(self, by: dt.timedelta, under: str) -> None:
        """Move the run's step away, because of this tick rate (`Rate.code`); its other clocks stay."""
        self.run.step_due_at = self.now + by
        self.run.delayed_under = under

    def has_a_turn(self) -> bool:
        """Tell whether the run's children give it something to do at once."""
        decision = self.decision()
        return (
            decision is Decision.FAIL
            or (decision is Decision.RESUME and self.run.status == RunStatus.WAITING_FOR_SUBRUN)
            or any(group.leaves_siblings for group in self.run.groups.values())
        )

    @property
    def step_is_due(self) -> bool:
        """Whether the next step may be executed now; of a run in a worker's hands it always is."""
        return self.run.step_due_at is not None and self.run.step_due_at <= self.now


_CHILD_ENDED = {
    RunStatus.COMPLETED: EventType.SUBRUN_COMPLETED,
    RunStatus.FAILED: EventType.SUBRUN_FAILED,
    RunStatus.CANCELED: EventType.SUBRUN_CANCELLED,
}
