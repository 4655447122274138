"""Tool calls: list, approve, reject; and the definitions of the tools that a workspace may call.

Deciding executes nothing: the answer shows the call as it was decided, and a worker does the rest.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any

import msgspec
from sqlalchemy import text

from service.announce import Announcer
from service.api.answers import ToolCallPage, ToolCallView, ToolPage, ToolView
from service.api.paging import DEFAULT_PAGE, LARGEST_PAGE, decode_cursor, encode_cursor, query_id
from service.api.runs import ReasonBody
from service.api.wire import TOOL_CALL_JSON
from service.approvals import decide_tool_call
from service.db import Database
from service.errors import Invalid, NotFound
from service.exchange import Answer, Exchange, answer_json
from service.quota.inforce import Quotas
from service.toolcalls import DEFAULT_TIMEOUT_S, Definition, ToolCallStatus, create_definition, list_definitions

ONE = text(f"SELECT {TOOL_CALL_JSON}::text FROM tool_calls t WHERE t.tool_call_id = :tool_call_id")  # noqa: S608 - constants
PAGE = text(f"""
    SELECT {TOOL_CALL_JSON}::text AS tool_call, t.tool_call_id FROM tool_calls t
    WHERE (CAST(:workspace_id AS uuid) IS NULL OR t.workspace_id = :workspace_id)
      AND (CAST(:status AS text) IS NULL OR t.status = :status)
      AND (CAST(:run_id AS uuid) IS NULL OR t.run_id = :run_id)
      AND (CAST(:before AS uuid) IS NULL OR t.tool_call_id < :before)
    ORDER BY t.tool_call_id DESC LIMIT :limit
""")  # noqa: S608 - constants


class ToolBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /api/workspaces/<id>/tools/."""

    name: str
    tool: str
    risk: str
    schema: Annotated[dict[str, Any], msgspec.Meta(description="JSON Schema (2020-12) of the arguments")] | None = None
    needs_approval: bool | None = None
    timeout_seconds: float = DEFAULT_TIMEOUT_S


class ToolCalls:
    """The endpoints on tool calls and on the tools of a workspace."""

    def __init__(self, database: Database, quotas: Quotas, announcer: Announcer) -> None:
        self._database = database
        self._quotas = quotas
        self._announcer = announcer

    async def list(self, exchange: Exchange[None]) -> Answer[ToolCallPage]:
        """Return a page of tool calls, newest first, with a cursor for the next one."""
        query = exchange.query()
        workspace_id = query_id(query, "workspace_id") or exchange.caller.workspace_id
        if workspace_id is not None:
            await self._require_visible(exchange, workspace_id)
        status = query.get("status")
        if status is not None and status not in ToolCallStatus.__members__:
            raise Invalid("status", f"give one of {', '.join(ToolCallStatus)}")
        limit = int(exchange.query_number("limit", DEFAULT_PAGE, 1, LARGEST_PAGE))
        asked = time.perf_counter()
        async with self._database.read() as connection:
            found = await connection.execute(
                PAGE,
                {
                    "workspace_id": workspace_id,
                    "status": status,
                    "run_id": query_id(query, "run_id"),
                    "before": decode_cursor(query["cursor"]) if "cursor" in query else None,
                    "limit": limit + 1,
                },
            )
            page = found.all()
        exchange.db_ms += (time.perf_counter() - asked) * 1e3
        cursor = encode_cursor(page[limit - 1].tool_call_id) if len(page) > limit else None
        calls = ",".join(row.tool_call for row in page[:limit])
        return Answer(f'{{"tool_calls":[{calls}],"next_cursor":{msgspec.json.encode(cursor).decode()}}}'.encode())

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
        await self._require_visible(exchange, workspace_id)
        async with self._database.read() as connection:
            definitions = await list_definitions(connection, workspace_id)
        return answer_json({"tools": [_view(workspace_id, each) for each in definitions]})

    async def _decide(self, exchange: Exchange[ReasonBody], *, approve: bool) -> Answer[ToolCallView]:
        tool_call_id = exchange.path_id("tool_call_id", "tool call")
        asked = time.perf_counter()
        async with self._database.begin() as connection:
            written = await decide_tool_call(
                connection, exchange.caller, tool_call_id, approve=approve, reason=exchange.body.reason
            )
            decided: str = (await connection.execute(ONE, {"tool_call_id": tool_call_id})).scalar_one()
        exchange.db_ms = (time.perf_counter() - asked) * 1e3
        await self._announcer.announce(written.events, written.created_at, due=written.due)
        exchange.publish_ms = (time.perf_counter() - asked) * 1e3 - exchange.db_ms
        return Answer(decided.encode())

    async def _require_visible(self, exchange: Exchange[Any], workspace_id: uuid.UUID) -> None:
        """Raise NotFound unless the workspace exists and the caller may see it."""
        if not exchange.caller.may_see(workspace_id):
            raise NotFound("no such workspace")
        await self._quotas.of(workspace_id)


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
