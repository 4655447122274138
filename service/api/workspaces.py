"""Workspaces, their agents and their tokens: made with an installation token only."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from sqlalchemy import update

from service.api.answers import AgentView, RoleName, TokenView, WorkspaceView
from service.auth import issue_token
from service.db import Database
from service.errors import NotFound
from service.exchange import Answer, Exchange, answer_json
from service.settings import Settings
from service.workspaces import QuotaClass, Workspace, create_agent, create_workspace


class WorkspaceBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /api/workspaces/."""

    name: str
    quota_class: Annotated[str, msgspec.Meta(extra_json_schema={"enum": list(QuotaClass)})] = QuotaClass.DEFAULT


class WorkspacePatch(msgspec.Struct, forbid_unknown_fields=True):
    """Body of PATCH /api/workspaces/<id>/."""

    quota_class: QuotaClass


class AgentBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /api/workspaces/<id>/agents/."""

    name: str
    script: list[dict[str, Any]] | None = None
    model: dict[str, Any] | None = None
    max_steps: int | None = None
    max_tool_calls: int | None = None


class TokenBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /api/workspaces/<id>/tokens/."""

    role: RoleName
    expires_days: float | None = None


class Workspaces:
    """The endpoints on workspaces."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings

    async def create(self, exchange: Exchange[WorkspaceBody]) -> Answer[WorkspaceView]:
        """Make a workspace."""
        body = exchange.body
        with exchange.timed("db_ms"):
            async with self._database.begin() as connection:
                workspace_id = await create_workspace(connection, body.name, body.quota_class)
        return answer_json({"workspace_id": workspace_id, "name": body.name, "quota_class": body.quota_class})

    async def patch(self, exchange: Exchange[WorkspacePatch]) -> Answer[WorkspaceView]:
        """Put a workspace under another quota class; in force everywhere within a second."""
        workspace_id = exchange.path_id("workspace_id", "workspace")
        quota_class = exchange.body.quota_class
        with exchange.timed("db_ms"):
            async with self._database.begin() as connection:
                changed = await connection.execute(
                    update(Workspace)
                    .where(Workspace.workspace_id == workspace_id)
                    .values(quota_class=quota_class)
                    .returning(Workspace.name)
                )
                row = changed.first()
        if row is None:
            raise NotFound("no such workspace")
        return answer_json({"workspace_id": workspace_id, "name": row.name, "quota_class": quota_class})

    async def create_agent(self, exchange: Exchange[AgentBody]) -> Answer[AgentView]:
        """Make an agent: a script, or a model behind a chat-completions endpoint."""
        workspace_id = exchange.path_id("workspace_id", "workspace")
        body = exchange.body
        with exchange.timed("db_ms"):
            async with self._database.begin() as connection:
                agent_id = await create_agent(
                    connection,
                    workspace_id,
                    body.name,
                    body.script,
                    model=body.model,
                    max_steps=body.max_steps,
                    max_tool_calls=body.max_tool_calls,
                    settings=self._settings,
                )
        return answer_json({"agent_id": agent_id, "workspace_id": workspace_id, "name": body.name})

    async def create_token(self, exchange: Exchange[TokenBody]) -> Answer[TokenView]:
        """Make a token for the workspace; this answer is the only place where it stands in clear."""
        workspace_id = exchange.path_id("workspace_id", "workspace")
        body = exchange.body
        with exchange.timed("db_ms"):
            async with self._database.begin() as connection:
                issued = await issue_token(connection, workspace_id, body.role, body.expires_days)
        return answer_json({"token": issued.token, "role": issued.role.name, "expires_at": issued.expires_at})
