"""A person decides on a tool call: approve or reject. Who may, and what follows for the run.

Each is one transaction that locks the run and its tool call, in this order, like every other change of them; so of two
people who decide at once, or of a decision and a cancel, the first counts and the second is told that it came too late.
Nothing is executed here: an approved call makes its run due, and a worker does the rest. A run that is paused stays
so, and goes on from the decision when it is resumed.
"""

from __future__ import annotations

import uuid

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.auth import Caller, Role
from service.errors import IllegalState, NotFound
from service.events import EventType
from service.ledger import Ledger, Written
from service.pen import Pen
from service.runs import RunStatus
from service.toolcalls import Risk, ToolCallStatus

DECIDERS = {Risk.SAFE: Role.OPERATOR, Risk.ELEVATED: Role.OPERATOR, Risk.DANGEROUS: Role.ADMIN}
"""The lowest role that may decide on a call of each risk."""

_FIND = text("SELECT run_id, workspace_id, risk FROM tool_calls WHERE tool_call_id = :tool_call_id")


async def decide_tool_call(
    connection: AsyncConnection, caller: Caller, tool_call_id: uuid.UUID, *, approve: bool, reason: str | None = None
) -> Written:
    """Approve or reject a tool call that waits for it, inside the caller's transaction.

    Raises NotFound for one that is absent or another workspace's, RoleTooLow, and IllegalState unless it is PENDING.
    """
    found = (await connection.execute(_FIND, {"tool_call_id": tool_call_id})).first()
    if found is None or not caller.may_see(found.workspace_id):
        raise NotFound("no such tool call")
    caller.require(DECIDERS[Risk(found.risk)])
    ledger = Ledger(connection)
    await ledger.lock([found.run_id])
    run = ledger.runs[found.run_id]
    call = run.tool_call
    if call is None or call.tool_call_id != tool_call_id or call.status != ToolCallStatus.PENDING:
        raise IllegalState("the tool call does not wait for approval any more")
    pen = Pen(run, ledger.now)
    event = EventType.TOOL_CALL_APPROVED if approve else EventType.TOOL_CALL_REJECTED
    call = msgspec.structs.replace(
        call,
        status=ToolCallStatus.APPROVED if approve else ToolCallStatus.REJECTED,
        reason=reason,
        decided_by=caller.token_id,
        decided_at=ledger.now,
        ended_at=None if approve else ledger.now,
    )
    pen.put_call(call)
    pen.event(event, call.told(reason=reason, decided_by=caller.token_id))
    pen.run.step_due_at = pen.clock
    if pen.run.status == RunStatus.WAITING_FOR_APPROVAL:
        pen.change_status(RunStatus.RUNNING)
    pen.schedule()
    ledger.note_alone(pen.result())
    await ledger.write()
    return ledger.written()
