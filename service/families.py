"""A run and all its descendants, ended together: no run outlives the one that spawned it.

Two things end a family: a caller who cancels a run, and a tick that fails a run with subruns still pending. Each is a
transaction of its own. It locks the run's parent, the run, then its descendants level by level (`ledger` has the
order), so a spawn that races is either seen or refused. Descendants are cancelled deepest first: each is counted on its
parent once, and a run's last event is its last change of status.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.advance import RunRow, advance, cancel
from service.errors import IllegalState, NotFound
from service.events import NewEvent
from service.ledger import Ledger
from service.runs import RunStatus
from service.workspaces import ScriptStep

_PARENT = text("SELECT parent_run_id FROM runs WHERE run_id = :run_id")


class CancelOutcome(NamedTuple):
    """What to announce once the transaction has committed."""

    events: list[NewEvent]
    created_at: dt.datetime  # of all of them
    due: bool  # whether the run's parent became due, so that workers must be rung


async def cancel_run(connection: AsyncConnection, run_id: uuid.UUID, reason: str | None = None) -> CancelOutcome:
    """Cancel a live run and its descendants, inside the caller's transaction.

    Raises NotFound for a run that does not exist and IllegalState for one that has ended.
    """
    found = (await connection.execute(_PARENT, {"run_id": run_id})).first()
    if found is None:
        raise NotFound("no such run")
    ledger = Ledger(connection)
    await _lock_with_parent(ledger, run_id, found.parent_run_id)
    run = ledger.runs[run_id]
    if run.is_final:
        raise IllegalState(f"the run is {run.status}: only a run that has not ended can be cancelled")
    children = await _cancel_descendants(ledger, run, "the run that spawned it was cancelled")
    ledger.note(cancel(run, reason, ledger.now, children))
    await ledger.write()
    return CancelOutcome(ledger.events, ledger.now, ledger.makes_due())


async def advance_family(
    ledger: Ledger, run_id: uuid.UUID, parent_run_id: uuid.UUID | None, epoch: int, script: Sequence[ScriptStep]
) -> bool:
    """Write the tick of one claimed run that fails while subruns are pending; False when the claim no longer holds."""
    await _lock_with_parent(ledger, run_id, parent_run_id)
    run = ledger.runs[run_id]
    if run.epoch != epoch or run.is_final:
        return False
    outcome = advance(run, script, ledger.now)
    if leaves_orphans(outcome.run):
        children = await _cancel_descendants(ledger, run, "the run that spawned it failed")
        outcome = advance(run, script, ledger.now, children)
    ledger.note(outcome)
    await ledger.write()
    return True


def leaves_orphans(run: RunRow) -> bool:
    """Tell whether a run, as it shall be, has ended before its subruns."""
    return run.status == RunStatus.FAILED and run.pending_subruns > 0


async def _lock_with_parent(ledger: Ledger, run_id: uuid.UUID, parent_run_id: uuid.UUID | None) -> None:
    await ledger.lock([run_id] if parent_run_id is None else [parent_run_id, run_id])


async def _cancel_descendants(ledger: Ledger, run: RunRow, reason: str) -> list[RunRow]:
    """Cancel every live descendant and return the run's own children, which it has still to count."""
    children: list[RunRow] = []
    for descendant in reversed(await ledger.lock_descendants(run.run_id)):
        outcome = cancel(ledger.runs[descendant.run_id], reason, ledger.now)
        if descendant.parent_run_id == run.run_id:
            ledger.note_alone(outcome)
            children.append(outcome.run)
        else:
            ledger.note(outcome)
    return children
