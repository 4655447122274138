"""Workspaces (the tenants) and their agents: made by an installation token or by a command, then never changed.

An agent is a script: the steps that a run executes, one a tick, each with an optional simulated latency.
"""

from __future__ import annotations

import datetime as dt
import enum
import uuid
from typing import Any

import msgspec
from sqlalchemy import ForeignKey, insert, select, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import Mapped, mapped_column

from service.db import Base
from service.errors import Invalid, NotFound
from service.runs import Instant, StepKind, new_id

MAX_SCRIPT_STEPS = 1000
"""Longest script: bounds what one run may ask of the workers."""

MAX_LATENCY_MS = 3_600_000
"""Longest simulated latency of one step: an hour."""

MAX_NAME_CHARACTERS = 200


class QuotaClass(enum.StrEnum):
    """Which set of rates and caps a workspace is under."""

    DEFAULT = "default"  # the values of `quota.limits`
    CALIBRATION = "calibration"  # lifted, so that the system itself can be measured


class ScriptStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One step of a scripted agent."""

    kind: StepKind  # SUBRUN_SPAWN is not allowed: subruns are spawned by the API
    latency_ms: float = 0.0  # how long after the step before it becomes due; no worker waits
    error: str | None = None  # when set, the step fails the run with this summary


DEFAULT_SCRIPT = (ScriptStep(StepKind.MODEL_CALL), ScriptStep(StepKind.OBSERVATION))
"""What an agent without a script does."""


class Workspace(Base, kw_only=True):
    """A tenant: what it owns is invisible to all others."""

    __tablename__ = "workspaces"

    workspace_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    name: Mapped[str]
    quota_class: Mapped[str] = mapped_column(default=QuotaClass.DEFAULT)
    """A QuotaClass."""
    created_at: Mapped[dt.datetime] = mapped_column(Instant)


class Agent(Base, kw_only=True):
    """Something that can be run. Immutable, so any process may remember it for ever."""

    __tablename__ = "agents"

    agent_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    workspace_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("workspaces.workspace_id"), index=True)
    name: Mapped[str]
    script: Mapped[list[dict[str, Any]]] = mapped_column(JSONB)
    """A list of ScriptStep."""
    created_at: Mapped[dt.datetime] = mapped_column(Instant)


async def create_workspace(connection: AsyncConnection, name: str, quota_class: str = QuotaClass.DEFAULT) -> uuid.UUID:
    """Make a workspace and return its id; raises Invalid naming the field."""
    _require_name(name)
    try:
        known = QuotaClass(quota_class)
    except ValueError:
        raise Invalid("quota_class", f"give {' or '.join(QuotaClass)}, not {quota_class!r}") from None
    workspace_id = new_id()
    await connection.execute(
        insert(Workspace).values(
            workspace_id=workspace_id, name=name, quota_class=known, created_at=dt.datetime.now(dt.UTC)
        )
    )
    return workspace_id


async def create_agent(
    connection: AsyncConnection, workspace_id: uuid.UUID, name: str, script: list[dict[str, Any]] | None = None
) -> uuid.UUID:
    """Make an agent and return its id; raises NotFound for the workspace and Invalid naming the field."""
    _require_name(name)
    steps = DEFAULT_SCRIPT if script is None else parse_script(script)
    exists = await connection.execute(select(Workspace.name).where(Workspace.workspace_id == workspace_id))
    if exists.first() is None:
        raise NotFound("no such workspace")
    agent_id = new_id()
    await connection.execute(
        insert(Agent).values(
            agent_id=agent_id,
            workspace_id=workspace_id,
            name=name,
            script=msgspec.to_builtins(steps),
            created_at=dt.datetime.now(dt.UTC),
        )
    )
    return agent_id


def parse_script(script: object) -> tuple[ScriptStep, ...]:
    """Turn a script's JSON into steps; raises Invalid naming the step that is wrong."""
    try:
        steps = msgspec.convert(script, tuple[ScriptStep, ...])
    except msgspec.ValidationError as wrong:
        raise Invalid("script", str(wrong)) from None
    if not 1 <= len(steps) <= MAX_SCRIPT_STEPS:
        raise Invalid("script", f"give 1 to {MAX_SCRIPT_STEPS} steps, not {len(steps)}")
    for index, step in enumerate(steps):
        if step.kind is StepKind.SUBRUN_SPAWN:
            raise Invalid(f"script[{index}].kind", "subruns are spawned by the API, not by a script")
        if not 0 <= step.latency_ms <= MAX_LATENCY_MS:
            raise Invalid(f"script[{index}].latency_ms", f"give 0 to {MAX_LATENCY_MS} milliseconds")
        if step.error is not None and "\x00" in step.error:
            raise Invalid(f"script[{index}].error", "must not contain the character U+0000")
    return steps


READ_AGENTS = text("SELECT agent_id, workspace_id, script FROM agents WHERE agent_id = ANY(:ids)")


KnownAgent = tuple[uuid.UUID, tuple[ScriptStep, ...]]
"""What never changes of an agent: its workspace and its script."""


class Agents:
    """Agents that this process has met, by id. They never change, so what was read once stays true."""

    MOST = 10_000
    """How many are kept; past that the oldest is forgotten and read again when needed."""

    def __init__(self) -> None:
        self._known: dict[uuid.UUID, KnownAgent] = {}

    async def find(self, connection: AsyncConnection, agent_ids: set[uuid.UUID]) -> dict[uuid.UUID, KnownAgent]:
        """Return (workspace_id, script) for each agent that exists."""
        unknown = agent_ids - self._known.keys()
        if unknown:
            found = await connection.execute(READ_AGENTS, {"ids": list(unknown)})
            for agent_id, workspace_id, script in found:
                self._known[agent_id] = workspace_id, msgspec.convert(script, tuple[ScriptStep, ...])
        result = {agent_id: self._known[agent_id] for agent_id in agent_ids if agent_id in self._known}
        while len(self._known) > self.MOST:
            del self._known[next(iter(self._known))]
        return result

    def known(self, agent_id: uuid.UUID) -> KnownAgent | None:
        """Return what is remembered of an agent, without asking the database."""
        return self._known.get(agent_id)


def _require_name(name: str) -> None:
    if not name.strip() or len(name) > MAX_NAME_CHARACTERS or "\x00" in name:
        raise Invalid("name", f"give 1 to {MAX_NAME_CHARACTERS} characters, without U+0000")
