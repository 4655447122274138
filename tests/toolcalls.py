"""A run's tool call on a real database: scripts that make one, what a person decides, and how it stands."""

from __future__ import annotations

import itertools
import uuid
from typing import Any

from service.approvals import decide_tool_call
from service.auth import Caller, Role
from service.families import cancel_run
from service.ledger import Written
from tests.tenants import Tenant

ECHO: dict[str, Any] = {"kind": "TOOL_CALL", "tool": "echo", "arguments": {"say": "hello"}}
GUARDED: dict[str, Any] = {"kind": "TOOL_CALL", "tool": "guarded", "arguments": {"say": "may I?"}}
LAST: dict[str, Any] = {"kind": "MESSAGE"}
OPERATOR = Caller(uuid.UUID(int=7), None, Role.OPERATOR, None)


async def decide(tenant: Tenant, call: dict[str, Any], *, approve: bool, reason: str | None = None) -> Written:
    """Approve or reject in a transaction."""
    async with tenant.database.begin() as connection:
        return await decide_tool_call(connection, OPERATOR, call["tool_call_id"], approve=approve, reason=reason)


async def cancel(tenant: Tenant, run_id: uuid.UUID) -> None:
    """Cancel a run in a transaction."""
    async with tenant.database.begin() as connection:
        await cancel_run(connection, run_id)


async def call_of(tenant: Tenant, run_id: uuid.UUID) -> dict[str, Any]:
    """Return the run's only tool call."""
    (call,) = await tenant.rows("SELECT * FROM tool_calls WHERE run_id = :run_id", run_id=run_id)
    return dict(call)


async def until_started(tenant: Tenant, run_id: uuid.UUID) -> None:
    """Return when the run's tool was started; the test's own timeout bounds it."""
    for _ in itertools.count():
        if (await call_of(tenant, run_id))["status"] == "RUNNING":
            return


async def observation(tenant: Tenant, run_id: uuid.UUID) -> dict[str, Any]:
    """Return the payload of the run's only OBSERVATION."""
    (step,) = await tenant.rows(
        "SELECT payload FROM steps WHERE run_id = :run_id AND kind = 'OBSERVATION'", run_id=run_id
    )
    payload: dict[str, Any] = step["payload"]
    return payload
