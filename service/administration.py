"""Commands that make workspaces, agents and tokens: each is one transaction and one printed result.

They call what the API's endpoints call, so they refuse what those refuse; a refusal is told with the flag's name.
"""

from __future__ import annotations

import asyncio
import sys
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.auth import LONGEST_HEADER, is_known, issue_token, revoke_token
from service.db import STATEMENT_TIMEOUT_S, Database, is_outage, migrate
from service.errors import BadUsage, ConfigurationError, PlimsollError
from service.settings import Settings
from service.workspaces import create_agent, create_workspace

Json = TypeVar("Json")
Result = TypeVar("Result")

UNDEFINED_TABLE = "42P01"  # PostgreSQL manual, appendix A
REFUSED = ("28", "3D")  # the same: no such user or wrong password, no such database


class DatabaseDown(PlimsollError):
    """The database cannot be reached; nothing was changed."""


def bring_schema_up_to_date(settings: Settings) -> dict[str, Any]:
    """Run the migrations that are missing."""
    try:
        migrate(settings.database_url)
    except Exception as error:
        raise explained(error) from error
    return {"schema": "up to date"}


def make_workspace(settings: Settings, name: str, quota_class: str) -> dict[str, Any]:
    """Make a workspace; returns its id."""

    async def work(connection: AsyncConnection) -> dict[str, Any]:
        workspace_id = await create_workspace(connection, name, quota_class)
        return {"workspace_id": str(workspace_id), "name": name, "quota_class": quota_class}

    return in_one_transaction(settings, work)


def make_agent(
    settings: Settings,
    workspace_id: uuid.UUID,
    name: str,
    script: str | None,
    model: str | None = None,
    max_steps: int | None = None,
    max_tool_calls: int | None = None,
) -> dict[str, Any]:
    """Make an agent; `script` or `model` is JSON or the path of a file with JSON. Returns its id."""
    steps = None if script is None else _read_json(script, "--script", list[dict[str, Any]])
    spec = None if model is None else _read_json(model, "--model", dict[str, Any])

    async def work(connection: AsyncConnection) -> dict[str, Any]:
        agent_id = await create_agent(
            connection,
            workspace_id,
            name,
            steps,
            model=spec,
            max_steps=max_steps,
            max_tool_calls=max_tool_calls,
            settings=settings,
        )
        return {"agent_id": str(agent_id), "workspace_id": str(workspace_id), "name": name}

    return in_one_transaction(settings, work)


def make_token(
    settings: Settings, workspace_id: uuid.UUID | None, role: str, expires_days: float | None
) -> dict[str, Any]:
    """Make a token for a workspace, or for the installation when `workspace_id` is None; it is shown this once."""

    async def work(connection: AsyncConnection) -> dict[str, Any]:
        issued = await issue_token(connection, workspace_id, role, expires_days)
        return {
            "token": issued.token,
            "role": issued.role.name,
            "expires_at": issued.expires_at.isoformat() if issued.expires_at else None,
        }

    return in_one_transaction(settings, work)


def take_token_back(settings: Settings, token_or_prefix: str) -> dict[str, Any]:
    """Revoke a token; raises BadUsage when none is called so."""

    async def work(connection: AsyncConnection) -> dict[str, Any]:
        if not await revoke_token(connection, token_or_prefix):
            raise BadUsage("TOKEN_OR_PREFIX: no token in force is called so")
        return {"revoked": True}

    return in_one_transaction(settings, work)


def is_token_known(settings: Settings) -> dict[str, Any]:
    """Tell whether the token on standard input was made here, be it revoked or expired; raises BadUsage for none.

    Tokens are random, so one that is known to two databases means that both are the same, or copies.
    """
    token = sys.stdin.buffer.readline(LONGEST_HEADER).decode("ascii", "replace").strip()
    if not token:
        raise BadUsage("standard input holds no token: give one line")

    async def work(connection: AsyncConnection) -> dict[str, Any]:
        return {"known": await is_known(connection, token)}

    return in_one_transaction(settings, work)


def _read_json(text: str, flag: str, kind: type[Json]) -> Json:
    """Return what a flag gives as JSON or as the path of a file; what it means is checked where it is used."""
    if not text.lstrip().startswith(("[", "{")):
        try:
            text = Path(text).read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise BadUsage(f"{flag}: cannot read {text}: {reason}") from None
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.DecodeError as error:
        raise BadUsage(f"{flag}: {error}") from None
    except RecursionError:
        raise BadUsage(f"{flag}: it is nested too deeply") from None


def in_one_transaction(
    settings: Settings,
    work: Callable[[AsyncConnection], Awaitable[Result]],
    statement_timeout_s: float = STATEMENT_TIMEOUT_S,
) -> Result:
    """Run `work` in a transaction of its own on a connection of its own."""

    async def run() -> Result:
        database = Database(settings.database_url, pool_size=1, statement_timeout_s=statement_timeout_s)
        try:
            async with database.begin() as connection:
                return await work(connection)
        finally:
            await database.close()

    try:
        return asyncio.run(run())
    except Exception as error:
        raise explained(error) from error


def explained(error: Exception) -> Exception:
    """Return the error that says what to do about this one; the same one when nothing is known about it."""
    if isinstance(error, PlimsollError):
        return error
    if isinstance(error, ProgrammingError) and getattr(error.orig, "sqlstate", None) == UNDEFINED_TABLE:
        return ConfigurationError("the database has no schema yet: run `python -m service migrate`")
    if is_outage(error) or str(getattr(getattr(error, "orig", None), "sqlstate", None)).startswith(REFUSED):
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        return DatabaseDown(f"cannot reach the database that DATABASE_URL names: {reason}")
    return error
