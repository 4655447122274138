"""What one turn does to a run.

Pure: a run's row, its script and the instant come in; the row as it shall be, the steps and the numbered events go out.
Nothing here reads a clock or a database, so every rule can be tested as a table. What happens to a run between its
turns (a child, a caller): `changes`. What each stroke writes: `pen`. Who locks, checks the epoch and writes: `ledger`,
`tick` and `families`. Who may change from which status to which: `runs`. When to wait for subruns: `joins`.

A run's life in ticks. The first tick makes it RUNNING and executes the first step of the script, unless that step has a
latency: then the first tick only starts the run, and the step is due its latency after the run's creation. Every
further tick executes one step; a step's latency counts from the step before it. The tick of the last step also ends the
run or, if a group of subruns is still waited for or a subrun still expected, parks it in WAITING_FOR_SUBRUN. One more
tick, when its groups are decided or its patience ends, ends it. A turn that finds nothing to do (a spurious wake) is no
tick and leaves no event.

A step is put off when the workspace is over its tick rate (`backstop`), and everything else of the turn is done.

A step that calls a tool takes two ticks: one writes the TOOL_CALL step and, unless a person must decide first, leaves
the run due; the other, when the tool has ended or was refused, writes the OBSERVATION. A model's agent has moves
instead of a script (`turns`).
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Sequence

import msgspec

from service.events import EventType
from service.joins import Decision
from service.pen import WITH_STEPS, Advance, Pen, RunRow
from service.runs import IllegalTransition, RunStatus, StepKind
from service.toolcalls import UNKNOWN_END, Call, ToolCallStatus
from service.turns import PLAIN, Answered, CannotHaveTool, GaveUp, Means, Move, Wanted
from service.workspaces import ScriptStep

LOOK_FOR_ROOM = dt.timedelta(seconds=1)
"""How long a step waits before it looks again whether the workspace may have one more call that waits for approval."""

WITH_TURNS = (*WITH_STEPS, RunStatus.WAITING_FOR_APPROVAL, RunStatus.WAITING_FOR_SUBRUN)
"""Statuses in which a run may be due at all: the waiting ones for what becomes of their subruns."""


def advance(
    turn: RunRow,
    script: Sequence[ScriptStep],
    now: dt.datetime,
    cancelled: Sequence[RunRow] = (),
    means: Means = PLAIN,
) -> Advance:
    """Decide one turn of a live run that is due. `means` is what it has at hand beside the script.

    `cancelled` are the run's own children that were ended because of this very turn: they are counted before its last
    event. A result with `doomed` groups must not be written: cancel their children and decide again. Raises
    IllegalTransition for a run that has no turns.
    """
    pen = Pen(turn, now)
    status = RunStatus(turn.status)
    if status not in WITH_TURNS:
        raise IllegalTransition(f"a run that is {status} has no tick")
    pen.judge()
    decision = pen.decision()
    step_is_due = means.step and pen.step_is_due
    if step_is_due:
        pen.run.delayed_under = None
    if decision is Decision.FAIL:
        pen.tick()
        pen.end(RunStatus.FAILED, pen.why_failed(), cancelled)
    elif means.delay is not None and step_is_due:
        pen.delay(*means.delay)
        if cancelled:
            pen.tick()
    elif turn.tool_call is not None and step_is_due:
        _observe(pen, turn.tool_call, script, means, cancelled)
    elif status in WITH_STEPS and step_is_due:
        _take_step(pen, script, means, cancelled)
    elif status is RunStatus.WAITING_FOR_SUBRUN and decision is Decision.RESUME:
        pen.tick()
        pen.change_status(RunStatus.RUNNING)
        pen.end(RunStatus.COMPLETED, cancelled=cancelled)
    elif cancelled:
        pen.tick()
    if not pen.run.is_final:
        pen.count(cancelled)
        pen.schedule()
    return pen.result()


def _take_step(pen: Pen, script: Sequence[ScriptStep], means: Means, cancelled: Sequence[RunRow]) -> None:
    """Execute a step, unless it must wait; a wait is no tick."""
    if means.is_model and means.move is None:  # nothing was found out for it
        return
    if _must_wait_for_room(pen, script, means):
        pen.run.step_due_at = pen.now + LOOK_FOR_ROOM
        return
    pen.tick()
    _execute(pen, script, means, cancelled)


def _execute(pen: Pen, script: Sequence[ScriptStep], means: Means, cancelled: Sequence[RunRow]) -> None:
    """Execute the step at the script's position, or the model's move, and decide what follows it."""
    run = pen.run
    if run.status == RunStatus.PENDING:
        pen.change_status(RunStatus.RUNNING)
        if script and script[0].latency_ms > 0:
            run.step_due_at = (run.step_due_at or pen.now) + _latency(script[0])
            return
    wanted = means.wants(script, run.script_position)
    too_much = _exceeds(run, script, means, wanted)
    if too_much is not None:
        pen.end(RunStatus.FAILED, too_much, cancelled)
    elif means.move is not None and wanted is None:
        _move(pen, means.move, cancelled)
    elif wanted is not None:
        position: dict[str, object] = {}
        if means.move is None:
            run.script_position += 1
            position = {"script_position": run.script_position}
        _request(pen, wanted, means.new_tool_call_id, position)
    else:
        _follow(pen, script, cancelled)


def _follow(pen: Pen, script: Sequence[ScriptStep], cancelled: Sequence[RunRow]) -> None:
    """Write the step at the script's position."""
    run = pen.run
    if run.script_position < len(script):
        step = script[run.script_position]
        run.script_position += 1
        _write_step(pen, step)
        if step.error is not None:
            pen.end(RunStatus.FAILED, step.error, cancelled)
            return
    _go_on(pen, script, cancelled)


def _go_on(pen: Pen, script: Sequence[ScriptStep], cancelled: Sequence[RunRow]) -> None:
    """Say when the script's next step is due, or reach the join when it has none."""
    run = pen.run
    if run.script_position < len(script):
        run.step_due_at = pen.now + _latency(script[run.script_position])
    else:
        _reach_join(pen, cancelled)


def _move(pen: Pen, move: Move, cancelled: Sequence[RunRow]) -> None:
    """Write what a model said, or that it cannot have the tool that it asked for."""
    pen.run.step_due_at = pen.now
    if isinstance(move, GaveUp):
        pen.end(RunStatus.FAILED, move.error, cancelled)
    elif isinstance(move, Answered):
        pen.step(StepKind.MODEL_CALL, msgspec.to_builtins(move))
        if not move.tool_calls:
            pen.step(StepKind.MESSAGE, {"content": move.content})
            _reach_join(pen, cancelled)
    elif isinstance(move, CannotHaveTool):
        told = {"tool": move.tool, "model_call_id": move.model_call_id, "error": move.error}
        pen.step(StepKind.TOOL_CALL, {**told, "arguments": move.arguments})
        pen.step(StepKind.OBSERVATION, {**told, "status": ToolCallStatus.REJECTED})


def _request(pen: Pen, wanted: Wanted, tool_call_id: uuid.UUID, position: dict[str, object]) -> None:
    """Write the TOOL_CALL step and its tool call; without approval it is due at once, with it a person decides."""
    run, definition = pen.run, wanted.definition
    run.tool_calls += 1
    call = Call(
        tool_call_id=tool_call_id,
        workspace_id=run.workspace_id,
        run_id=run.run_id,
        step_index=run.step_count + 1,
        tool=definition.name,
        implementation=definition.tool,
        arguments=wanted.arguments,
        risk=definition.risk,
        timeout_seconds=definition.timeout_seconds,
        model_call_id=wanted.model_call_id,
        status=ToolCallStatus.PENDING if definition.needs_approval else ToolCallStatus.APPROVED,
        result=None,
        error=None,
        reason=None,
        decided_by=None,
        created_at=pen.now,
        decided_at=None,
        started_at=None,
        epoch=None,
        lease_until=None,
        ended_at=None,
    )
    pen.put_call(call)
    pen.step(StepKind.TOOL_CALL, {**position, **call.told(arguments=call.arguments)})
    pen.event(
        EventType.TOOL_CALL_REQUESTED,
        call.told(arguments=call.arguments, needs_approval=definition.needs_approval, step_index=call.step_index),
    )
    run.step_due_at = pen.now
    if definition.needs_approval:
        run.step_due_at = None
        pen.change_status(RunStatus.WAITING_FOR_APPROVAL)


def _observe(pen: Pen, call: Call, script: Sequence[ScriptStep], means: Means, cancelled: Sequence[RunRow]) -> None:
    """Write what became of the run's tool call, and go on; one that is still running is looked at again later."""
    run = pen.run
    if call.status == ToolCallStatus.RUNNING:
        if call.lease_until is not None and call.lease_until > pen.now:
            run.step_due_at = call.lease_until
            return
        call = msgspec.structs.replace(call, status=ToolCallStatus.FAILED, error=UNKNOWN_END, ended_at=pen.now)
        pen.put_call(call)
    if call.is_open:
        return
    pen.tick()
    if run.status == RunStatus.WAITING_FOR_APPROVAL:  # decided while the run was paused
        pen.change_status(RunStatus.RUNNING)
    run.tool_call, run.tool_call_id = None, None
    said = {"error": call.error, "reason": call.reason}
    told = call.told(status=call.status, **{name: value for name, value in said.items() if value is not None})
    if call.status != ToolCallStatus.REJECTED:
        pen.event(EventType.TOOL_CALL_COMPLETED, told)
    result = {"result": call.result} if call.status == ToolCallStatus.COMPLETED else {}
    pen.step(StepKind.OBSERVATION, {**told, **result})
    if call.model_call_id is None:
        _go_on(pen, script, cancelled)
    else:
        run.step_due_at = pen.now


def _must_wait_for_room(pen: Pen, script: Sequence[ScriptStep], means: Means) -> bool:
    """Tell whether the step would leave more tool calls waiting for approval than the workspace may have."""
    if means.room or (pen.run.status == RunStatus.PENDING and script and script[0].latency_ms > 0):
        return False
    wanted = means.wants(script, pen.run.script_position)
    return wanted is not None and wanted.definition.needs_approval


def _exceeds(run: RunRow, script: Sequence[ScriptStep], means: Means, wanted: Wanted | None) -> str | None:
    """Say in one line which bound of the agent the step would break; None when it breaks none."""
    if wanted is None and means.move is None and run.script_position >= len(script):
        return None
    own = run.step_count - run.spawned_subruns  # each spawn has written one step
    steps = 2 if wanted is not None or isinstance(means.move, CannotHaveTool) else 1
    if isinstance(means.move, Answered) and not means.move.tool_calls:
        steps = 2
    if own + steps > means.max_steps:
        return f"max_steps: the run has taken {own} of {means.max_steps} steps and is not finished"
    if wanted is not None and run.tool_calls >= means.max_tool_calls:
        return f"max_tool_calls: the run has requested {run.tool_calls} of {means.max_tool_calls} tool calls"
    return None


def _reach_join(pen: Pen, cancelled: Sequence[RunRow]) -> None:
    """End a run whose own steps are done, or let it wait for its subruns."""
    run = pen.run
    run.step_due_at = None
    pen.judge(at_join=True)
    decision = pen.decision()
    if decision is Decision.FAIL:
        pen.end(RunStatus.FAILED, pen.why_failed(), cancelled)
    elif decision is Decision.RESUME:
        pen.end(RunStatus.COMPLETED, cancelled=cancelled)
    else:
        pen.change_status(RunStatus.WAITING_FOR_SUBRUN)
        if run.expected_subruns > 0:
            run.wait_until = pen.now + dt.timedelta(seconds=run.max_wait_seconds)


def _write_step(pen: Pen, step: ScriptStep) -> None:
    payload: dict[str, object] = {"script_position": pen.run.script_position}
    if step.latency_ms:
        payload["latency_ms"] = step.latency_ms
    if step.error is not None:
        payload["error"] = step.error
    pen.step(step.kind, payload)


def _latency(step: ScriptStep) -> dt.timedelta:
    return dt.timedelta(milliseconds=step.latency_ms)
