"""A caller stops a run and lets it go on: pause and resume. A third control, to cancel, ends a family: `families`.

Each locks one row and nothing else, because neither ends a run: its parent has nothing to count, and its subruns go on.
What stands still meanwhile, and what a resume returns to: docs/run-states.md. A worker that holds the run when it is
paused is fenced: the pause raises the run's epoch.
"""

from __future__ import annotations

import uuid

from sqlalchemy.ext.asyncio import AsyncConnection

from service.changes import pause, resume
from service.errors import IllegalState, NotFound
from service.ledger import Ledger, Written
from service.pen import RunRow
from service.runs import PAUSABLE, RunStatus


async def pause_run(connection: AsyncConnection, run_id: uuid.UUID, reason: str | None = None) -> Written:
    """Pause a live run, inside the caller's transaction.

    Raises NotFound for a run that does not exist and IllegalState for one that has ended or is paused already.
    """
    ledger = Ledger(connection)
    run = await _lock(ledger, run_id)
    if run.status not in PAUSABLE:
        raise IllegalState(f"the run is {run.status}: only a run that has not ended and is not paused can be paused")
    ledger.note_alone(pause(run, reason, ledger.now))
    await ledger.write()
    return ledger.written()


async def resume_run(connection: AsyncConnection, run_id: uuid.UUID, reason: str | None = None) -> Written:
    """Let a paused run go on from where it was paused, inside the caller's transaction.

    Raises NotFound for a run that does not exist and IllegalState for one that is not paused.
    """
    ledger = Ledger(connection)
    run = await _lock(ledger, run_id)
    if run.status != RunStatus.PAUSED:
        raise IllegalState(f"the run is {run.status}: only a paused run can be resumed")
    ledger.note_alone(resume(run, reason, ledger.now))
    await ledger.write()
    return ledger.written()


async def _lock(ledger: Ledger, run_id: uuid.UUID) -> RunRow:
    await ledger.lock([run_id])
    if run_id not in ledger.runs:
        raise NotFound("no such run")
    return ledger.runs[run_id]
