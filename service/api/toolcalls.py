"""Tool calls: list, approve, reject; and the definitions of the tools that a workspace may call.

Deciding executes nothing: the answer shows the call as it was decided, and a worker does the rest.
"""

from __future__ import annotations

import uuid
from typing import Annotated, Any

import msgspec
from sqlalchemy import text

from service.announce import Announcer
from service.api.answers import ToolCallPage, ToolCallView, ToolPage, ToolView
from service.api.paging import Listing, Lists, page_of
from service.api.runs import ReasonBody
from service.api.sight import require_workspace
from service.api.wire import TOOL_CALL_JSON
from service.approvals import decide_tool_call
from service.db import Database
from service.exchange import Answer, Exchange, answer_json
from service.quota.inforce import Quotas
from service.toolcalls import DEFAULT_TIMEOUT_S, Definition, Risk, ToolCallStatus, create_definition, list_definitions

ONE = text(f"SELECT {TOOL_CALL_JSON}::text FROM tool_calls t WHERE t.tool_call_id = :tool_call_id")  # noqa: S608 - constants
LISTING = Listing(
    "tool_calls",
    ToolCallStatus,
    "run_id",
    page_of("tool_calls", "t", "tool_call_id", "run_id", TOOL_CALL_JSON, ("arguments", "result", "error", "reason")),
)


class ToolBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /api/workspaces/<id>/tools/."""

    name: str
    tool: str
    risk: Annotated[str, msgspec.Meta(extra_json_schema={"enum": list(Risk)})]
    schema: Annotated[dict[str, Any], msgspec.Meta(description="JSON Schema (2020-12) of the arguments")] | None = None
    needs_approval: bool | None = None
    timeout_seconds: float = DEFAULT_TIMEOUT_S


class ToolCalls:
    """The endpoints on tool calls and on the tools of a workspace."""

    def __init__(self, database: Database, quotas: Quotas, announcer: Announcer) -> None:
        self._database = database
        self._quotas = quotas
        self._announcer = announcer
        self._lists = Lists(database, quotas)

    async def list(self, exchange: Exchange[None]) -> Answer[ToolCallPage]:
        """Return a page of tool calls, newest first, with a cursor for the next one."""
        return await self._lists.page(exchange, LISTING)

    async def approve(self, exchange: Exchange[ReasonBody]) -> Answer[ToolCallView]:
        """Let a tool call that waits for approval be executed; a call of risk DANGEROUS needs the role ADMIN."""
        return await self._decide(exchange, approve=True)

    async def reject(self, exchange: Exchange[ReasonBody]) -> Answer[ToolCallView]:
        """Refuse a tool call that waits for approval; its run goes on without it."""
        return await self._decide(exchange, approve=False)

    async def create_tool(self, exchange: Exchange[ToolBody]) -> Answer[ToolView]:
        """Let a workspace's runs call a tool under a name."""
        workspace_id = exchange.path_id("workspace_id", "workspace")
        body = exchange.body
        with exchange.timed("db_ms"):
            async with self._database.begin() as connection:
                definition = await create_definition(
                    connection,
                    workspace_id,
                    body.name,
                    body.tool,
                    body.risk,
                    body.schema,
                    body.needs_approval,
                    body.timeout_seconds,
                )
        return answer_json(_view(workspace_id, definition))

    async def list_tools(self, exchange: Exchange[None]) -> Answer[ToolPage]:
        """Return every tool that a workspace's runs may call, those that every workspace has first."""
        workspace_id = exchange.path_id("workspace_id", "workspace")
        with exchange.timed("db_ms"):
            await require_workspace(self._quotas, exchange.caller, workspace_id)
            async with self._database.read() as connection:
                definitions = await list_definitions(connection, workspace_id)
        return answer_json({"tools": [_view(workspace_id, each) for each in definitions]})

    async def _decide(self, exchange: Exchange[ReasonBody], *, approve: bool) -> Answer[ToolCallView]:
        tool_call_id = exchange.path_id("tool_call_id", "tool call")
        with exchange.timed("db_ms"):
            async with self._database.begin() as connection:
                written = await decide_tool_call(
                    connection, exchange.caller, tool_call_id, approve=approve, reason=exchange.body.reason
                )
                decided: str = (await connection.execute(ONE, {"tool_call_id": tool_call_id})).scalar_one()
        with exchange.timed("publish_ms"):
            await self._announcer.announce(written.events, written.created_at, due=written.due)
        return Answer(decided.encode())


def _view(workspace_id: uuid.UUID, definition: Definition) -> ToolView:
    return ToolView(
        workspace_id,
        definition.name,
        definition.tool,
        definition.risk,
        definition.needs_approval,
        definition.arguments_schema,
        definition.timeout_seconds,
    )
