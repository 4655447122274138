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
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

from service.joins import Decision
from service.pen import WITH_STEPS, Advance, Pen, RunRow
from service.runs import IllegalTransition, RunStatus
from service.workspaces import ScriptStep

WITH_TURNS = (*WITH_STEPS, RunStatus.WAITING_FOR_APPROVAL, RunStatus.WAITING_FOR_SUBRUN)
"""Statuses in which a run may be due at all: the waiting ones for what becomes of their subruns."""


def advance(turn: RunRow, script: Sequence[ScriptStep], now: dt.datetime, cancelled: Sequence[RunRow] = ()) -> Advance:
    """Decide one turn of a live run that is due.

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
    if decision is Decision.FAIL:
        pen.tick()
        pen.end(RunStatus.FAILED, pen.why_failed(), cancelled)
    elif status in WITH_STEPS and pen.step_is_due:
        pen.tick()
        _execute(pen, script, cancelled)
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


def _execute(pen: Pen, script: Sequence[ScriptStep], cancelled: Sequence[RunRow]) -> None:
    """Execute the step at the script's position and decide what follows it."""
    run = pen.run
    if run.status == RunStatus.PENDING:
        pen.change_status(RunStatus.RUNNING)
        if script and script[0].latency_ms > 0:
            run.step_due_at = (run.step_due_at or pen.now) + _latency(script[0])
            return
    if run.script_position < len(script):
        step = script[run.script_position]
        run.script_position += 1
        _write_step(pen, step)
        if step.error is not None:
            pen.end(RunStatus.FAILED, step.error, cancelled)
            return
    if run.script_position < len(script):
        run.step_due_at = pen.now + _latency(script[run.script_position])
    else:
        _reach_join(pen, cancelled)


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
