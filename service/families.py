"""A run and all its descendants, ended together: no run outlives the one that spawned it.

Three things end descendants: a caller who cancels a run, a turn that ends a run with subruns still pending, and a turn
that finds a group joined whose policy ends the siblings left over (docs/joins.md). Each is a transaction of its own. It
locks the run's parent, the run, then its descendants level by level (`ledger` has the order), so a spawn that races is
either seen or refused. Descendants are cancelled deepest first: each is counted on its parent once, and a run's last
event is its last change of status.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.advance import advance
from service.changes import cancel, give_up
from service.errors import IllegalState, NotFound
from service.ledger import Ledger, Written
from service.pen import RunRow
from service.runs import RunStatus
from service.workspaces import ScriptStep

_PARENT = text("SELECT parent_run_id FROM runs WHERE run_id = :run_id")


async def cancel_run(connection: AsyncConnection, run_id: uuid.UUID, reason: str | None = None) -> Written:
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
    children = await _cancel_descendants(ledger, run, "the run that spawned it was cancelled", frozenset(run.groups))
    ledger.note(cancel(run, reason, ledger.now, children))
    await ledger.write()
    return ledger.written()


async def advance_family(
    ledger: Ledger, run_id: uuid.UUID, parent_run_id: uuid.UUID | None, epoch: int, script: Sequence[ScriptStep]
) -> bool:
    """Write the turn of one claimed run that ends children; False when the claim no longer holds."""
    await _lock_with_parent(ledger, run_id, parent_run_id)
    run = ledger.runs[run_id]
    if run.epoch != epoch or run.is_final:
        return False
    outcome = advance(run, script, ledger.now)
    if outcome.doomed:
        children = await _cancel_descendants(ledger, run, _why_cancelled(outcome.run), outcome.doomed)
        outcome = advance(run, script, ledger.now, children)
    ledger.note(outcome)
    await ledger.write()
    return True


async def fail_run(ledger: Ledger, run_id: uuid.UUID, parent_run_id: uuid.UUID | None, epoch: int, reason: str) -> bool:
    """End one claimed run as FAILED, with its descendants; False when the claim no longer holds."""
    await _lock_with_parent(ledger, run_id, parent_run_id)
    run = ledger.runs[run_id]
    if run.epoch != epoch or run.is_final:
        return False
    children = await _cancel_descendants(ledger, run, "the run that spawned it failed", frozenset(run.groups))
    ledger.note(give_up(run, reason, ledger.now, children))
    await ledger.write()
    return True


def _why_cancelled(parent: RunRow) -> str:
    """Say to a child why it is ended with its parent as it shall be."""
    if parent.status == RunStatus.FAILED:
        return "the run that spawned it failed"
    if parent.status == RunStatus.COMPLETED:
        return "the run that spawned it completed without it"
    return "its group was joined without it"


async def _lock_with_parent(ledger: Ledger, run_id: uuid.UUID, parent_run_id: uuid.UUID | None) -> None:
    await ledger.lock([run_id] if parent_run_id is None else [parent_run_id, run_id])


async def _cancel_descendants(ledger: Ledger, run: RunRow, reason: str, group_ids: frozenset[str]) -> list[RunRow]:
    """Cancel the live children of these groups with all below them; returns the children, still to be counted."""
    ids, doomed = {run.run_id}, []
    for descendant in await ledger.lock_descendants(run.run_id):
        is_child = descendant.parent_run_id == run.run_id
        if descendant.group_id in group_ids if is_child else descendant.parent_run_id in ids:
            ids.add(descendant.run_id)
            doomed.append(descendant.run_id)
    children: list[RunRow] = []
    for run_id in reversed(doomed):
        outcome = cancel(ledger.runs[run_id], reason, ledger.now)
        if outcome.run.parent_run_id == run.run_id:
            ledger.note_alone(outcome)
            children.append(outcome.run)
        else:
            ledger.note(outcome)
    return children
