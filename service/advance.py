"""What one turn does to a run: every change of a run's state is decided here, and nowhere else.

Pure: a run's row, its script and the instant come in; the row as it shall be, the steps and the numbered events go out.
Nothing here reads a clock or a database, so every rule can be tested as a table. Who locks, checks the epoch and
writes: `ledger`, `tick` and `families`. Who may change from which status to which: `runs`. When to wait for subruns:
`joins`.

A run's life in ticks. The first tick makes it RUNNING and executes the first step of the script, unless that step has a
latency: then the first tick only starts the run, and the step is due its latency after the run's creation. Every
further tick executes one step; a step's latency counts from the step before it. The tick of the last step also ends the
run or, if subruns are pending or still expected, parks it in WAITING_FOR_SUBRUN. One more tick, when its subruns have
settled or its patience ends, ends it. A turn that finds nothing to do (a spurious wake) is no tick and leaves no event.
"""

from __future__ import annotations

import copy
import datetime as dt
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from service.events import EventType, NewEvent
from service.joins import DEFAULT_POLICY, Children, Decision, decide, why_failed
from service.runs import FINAL, IllegalTransition, RunStatus, StepKind, require_legal
from service.workspaces import ScriptStep


class RunRow(msgspec.Struct, gc=False):
    """The columns of a run that the engine reads and writes, named and explained in `runs.Run`."""

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
    step_count: int
    last_seq: int
    ticks: int
    epoch: int
    next_tick_at: dt.datetime | None
    wait_until: dt.datetime | None
    error_summary: str | None
    created_at: dt.datetime
    started_at: dt.datetime | None
    ended_at: dt.datetime | None

    @property
    def is_final(self) -> bool:
        """Whether the run has ended."""
        return self.status in FINAL

    def children(self) -> Children:
        """Return the counters that the join rule reads."""
        return Children(self.expected_subruns, self.spawned_subruns, self.pending_subruns, self.failed_subruns)


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


def advance(turn: RunRow, script: Sequence[ScriptStep], now: dt.datetime, cancelled: Sequence[RunRow] = ()) -> Advance:
    """Decide one tick of a live run that is due.

    `cancelled` are the run's own children that were ended because this very tick fails the run: they are counted before
    its last event. A result that is FAILED with pending subruns must not be written: cancel them and decide again.
    Raises IllegalTransition for a run that no tick can advance.
    """
    pen = _Pen(turn, now)
    status = RunStatus(turn.status)
    decision = decide(turn.children(), DEFAULT_POLICY, turn.wait_until, now)
    if status not in (RunStatus.PENDING, RunStatus.RUNNING, RunStatus.WAITING_FOR_SUBRUN):
        raise IllegalTransition(f"a run that is {status} has no tick")
    if decision is Decision.FAIL:
        pen.tick()
        pen.fail(why_failed(turn.children(), DEFAULT_POLICY, turn.max_wait_seconds), cancelled)
    elif status is not RunStatus.WAITING_FOR_SUBRUN:
        pen.tick()
        _execute(pen, script, cancelled)
    elif decision is Decision.RESUME:
        pen.tick()
        pen.change_status(RunStatus.RUNNING)
        pen.end(RunStatus.COMPLETED)
    else:
        pen.run.next_tick_at = turn.wait_until
    return pen.result()


def child_ended(parent: RunRow, child: RunRow, now: dt.datetime) -> Advance:
    """Count one final child on its parent's row, and make the parent due if that leaves it something to do.

    Being due takes a parent away from a worker that holds it: the next claim raises the epoch, and the holder's turn is
    thrown away. That is wanted. A waiting parent has nothing to lose by it; a running one becomes due only because it
    must fail, so whatever the holder is still doing for it no longer matters.
    """
    pen = _Pen(parent, now)
    pen.child_ended(child)
    run = pen.run
    decision = decide(run.children(), DEFAULT_POLICY, run.wait_until, now)
    waiting = run.status == RunStatus.WAITING_FOR_SUBRUN
    if not run.is_final and (decision is Decision.FAIL or (waiting and decision is Decision.RESUME)):
        run.next_tick_at = now
    return pen.result()


def cancel(run: RunRow, reason: str | None, now: dt.datetime, cancelled: Sequence[RunRow] = ()) -> Advance:
    """End a live run as CANCELED, after counting the children that were ended with it.

    Raises IllegalTransition for a final run.
    """
    pen = _Pen(run, now)
    for child in cancelled:
        pen.child_ended(child)
    pen.end(RunStatus.CANCELED, reason)
    return pen.result()


def _execute(pen: _Pen, script: Sequence[ScriptStep], cancelled: Sequence[RunRow]) -> None:
    """Execute the step at the script's position and decide what follows it."""
    run = pen.run
    if run.status == RunStatus.PENDING:
        pen.change_status(RunStatus.RUNNING)
        if script and script[0].latency_ms > 0:
            run.next_tick_at = run.created_at + _latency(script[0])
            return
    if run.script_position < len(script):
        step = script[run.script_position]
        run.script_position += 1
        pen.write_step(step)
        if step.error is not None:
            pen.fail(step.error, cancelled)
            return
    if run.script_position < len(script):
        run.next_tick_at = pen.now + _latency(script[run.script_position])
    elif decide(run.children(), DEFAULT_POLICY, None, pen.now) is Decision.RESUME:
        pen.end(RunStatus.COMPLETED)
    else:
        pen.change_status(RunStatus.WAITING_FOR_SUBRUN)
        if run.expected_subruns > 0:
            run.wait_until = pen.now + dt.timedelta(seconds=run.max_wait_seconds)
        run.next_tick_at = run.wait_until


def _latency(step: ScriptStep) -> dt.timedelta:
    return dt.timedelta(milliseconds=step.latency_ms)


class _Pen:
    """Writes on a copy of a run's row, numbering steps and events as it goes."""

    def __init__(self, run: RunRow, now: dt.datetime) -> None:
        self.run = copy.copy(run)
        self.now = now
        self._steps: list[NewStep] = []
        self._events: list[NewEvent] = []

    def result(self) -> Advance:
        return Advance(self.run, self._steps, self._events)

    def tick(self) -> None:
        """Count a turn that changes the run."""
        self.run.ticks += 1
        if self.run.started_at is None:
            self.run.started_at = self.now

    def event(self, event_type: EventType, payload: dict[str, Any]) -> None:
        run = self.run
        run.last_seq += 1
        self._events.append(
            NewEvent(run.run_id, run.last_seq, event_type, payload, run.correlation_id, run.workspace_id)
        )

    def change_status(self, new: RunStatus, reason: str | None = None) -> None:
        old = RunStatus(self.run.status)
        require_legal(old, new)
        self.run.status = new
        self.run.wait_until = None
        payload = {"from": old, "to": new}
        self.event(EventType.STATE_CHANGED, payload if reason is None else {**payload, "reason": reason})

    def end(self, final: RunStatus, reason: str | None = None) -> None:
        """Make the run final; `reason` stands in its row and in its last event."""
        self.change_status(final, reason)
        self.run.error_summary = reason
        self.run.next_tick_at = None
        self.run.ended_at = self.now

    def fail(self, reason: str, cancelled: Sequence[RunRow]) -> None:
        for child in cancelled:
            self.child_ended(child)
        self.end(RunStatus.FAILED, reason)

    def write_step(self, step: ScriptStep) -> None:
        run = self.run
        run.step_count += 1
        payload: dict[str, Any] = {"script_position": run.script_position}
        if step.latency_ms:
            payload["latency_ms"] = step.latency_ms
        if step.error is not None:
            payload["error"] = step.error
        self._steps.append(NewStep(run.run_id, run.step_count, step.kind, payload, run.correlation_id))
        self.event(EventType.STEP_CREATED, {"step_index": run.step_count, "kind": step.kind})

    def child_ended(self, child: RunRow) -> None:
        run = self.run
        run.pending_subruns -= 1
        run.failed_subruns += child.status != RunStatus.COMPLETED
        self.event(
            _CHILD_ENDED[RunStatus(child.status)],
            {"child_run_id": child.run_id, "status": child.status, "group_id": child.group_id},
        )


_CHILD_ENDED = {
    RunStatus.COMPLETED: EventType.SUBRUN_COMPLETED,
    RunStatus.FAILED: EventType.SUBRUN_FAILED,
    RunStatus.CANCELED: EventType.SUBRUN_CANCELLED,
}
