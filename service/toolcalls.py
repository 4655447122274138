"""Tool calls: what may be called, what a call is, and who decides on it.

A definition allows one workspace to call one installed tool under a name, with a risk. Definitions never change and
never go, so any process may remember them. The built-in tools are defined in every workspace without being made.

A tool call is a row. It goes PENDING -> APPROVED -> RUNNING -> COMPLETED or FAILED; one that needs no approval begins
APPROVED; one that a person refuses ends REJECTED; one whose run ends first ends CANCELED. Its row changes only under
its run's row lock, with one exception: whoever set it RUNNING records its end (`outside`). It turns RUNNING once, so
its tool is started once at most. What each change does to the run is decided by `advance`; decisions of people are
in `approvals`.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
import re
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from sqlalchemy import CheckConstraint, ForeignKey, Index, insert, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import Mapped, mapped_column

from service.db import Base
from service.errors import IllegalState, Invalid, NotFound
from service.runs import Instant
from service.schemas import explain, require_schema
from service.tools import BUILT_IN, registry

DEFAULT_TIMEOUT_S = 30.0
"""How long a tool may run when its definition does not say."""

MAX_TIMEOUT_S = 3600.0

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
"""What a definition may be called: what chat-completions endpoints take as a function's name."""


class Risk(enum.StrEnum):
    """How much harm a call may do: who may allow it."""

    SAFE = "SAFE"  # needs no approval unless its definition asks for one; then an OPERATOR's
    ELEVATED = "ELEVATED"  # needs an OPERATOR's approval unless its definition does not
    DANGEROUS = "DANGEROUS"  # needs an ADMIN's approval unless its definition does not


class ToolCallStatus(enum.StrEnum):
    """Where a tool call stands. The last four are final."""

    PENDING = "PENDING"  # waits for a person
    APPROVED = "APPROVED"  # may be executed, and was not started
    RUNNING = "RUNNING"  # a worker has started its tool
    COMPLETED = "COMPLETED"  # the tool returned a result
    FAILED = "FAILED"  # the tool failed, took too long, or its end is unknown
    REJECTED = "REJECTED"  # a person refused it; its tool was never started
    CANCELED = "CANCELED"  # its run ended first


OPEN = frozenset({ToolCallStatus.PENDING, ToolCallStatus.APPROVED, ToolCallStatus.RUNNING})
"""Statuses in which a run still waits for the call."""

UNKNOWN_END = "started but its end is unknown"
"""The error of a call whose worker died: it is never started again, since nobody knows how far it came."""


class ToolDefinition(Base, kw_only=True):
    """A tool that a workspace's runs may call."""

    __tablename__ = "tool_definitions"

    workspace_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("workspaces.workspace_id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    """What scripts and models call it."""
    tool: Mapped[str]
    """The installed tool that is executed (`tools.registry`)."""
    risk: Mapped[str]
    """A Risk."""
    needs_approval: Mapped[bool]
    arguments_schema: Mapped[dict[str, Any]] = mapped_column(JSONB)
    """JSON Schema (2020-12) that the arguments must meet, beside the tool's own."""
    timeout_seconds: Mapped[float]
    created_at: Mapped[dt.datetime] = mapped_column(Instant)


class ToolCall(Base, kw_only=True):
    """One request of a run to execute a tool, and what became of it."""

    __tablename__ = "tool_calls"
    __table_args__ = (
        CheckConstraint("(ended_at IS NULL) = (status IN ('PENDING','APPROVED','RUNNING'))", name="ended"),
        CheckConstraint("started_at IS NOT NULL OR status NOT IN ('RUNNING','COMPLETED')", name="started"),
        # Two at a time in one run would make a second start possible.
        Index(
            "tool_calls_open_idx",
            "run_id",
            unique=True,
            postgresql_where=text("status IN ('PENDING','APPROVED','RUNNING')"),
        ),
        Index("tool_calls_pending_idx", "workspace_id", postgresql_where=text("status = 'PENDING'")),
        Index("tool_calls_newest_idx", "workspace_id", text("tool_call_id DESC")),
        Index("tool_calls_run_idx", "run_id"),
    )

    tool_call_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    # The workspace has no foreign key: checking it would lock the workspace's row after the run's, against the order.
    workspace_id: Mapped[uuid.UUID]
    run_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("runs.run_id"))
    step_index: Mapped[int]
    """The TOOL_CALL step that asked for it."""
    tool: Mapped[str]
    """The definition's name."""
    implementation: Mapped[str]
    """The installed tool, as the definition named it."""
    arguments: Mapped[dict[str, Any]] = mapped_column(JSONB)
    risk: Mapped[str]
    """A Risk, the definition's."""
    timeout_seconds: Mapped[float]
    model_call_id: Mapped[str | None] = mapped_column(default=None)
    """The model's own name for the call; null for a script's."""
    status: Mapped[str]
    """A ToolCallStatus."""
    result: Mapped[Any | None] = mapped_column(JSONB(none_as_null=True), default=None)
    error: Mapped[str | None] = mapped_column(default=None)
    reason: Mapped[str | None] = mapped_column(default=None)
    """Why somebody approved or rejected it, in their words."""
    decided_by: Mapped[uuid.UUID | None] = mapped_column(default=None)
    """The token that approved or rejected it; null when no approval was needed."""
    created_at: Mapped[dt.datetime] = mapped_column(Instant)
    decided_at: Mapped[dt.datetime | None] = mapped_column(Instant, default=None)
    started_at: Mapped[dt.datetime | None] = mapped_column(Instant, default=None)
    """When a worker started the tool; set once, in a transaction that found the run's epoch to be the claimed one."""
    epoch: Mapped[int | None] = mapped_column(default=None)
    """The run's epoch at the start."""
    lease_until: Mapped[dt.datetime | None] = mapped_column(Instant, default=None)
    """Renewed while the tool runs. When it has passed, whoever started the tool is gone."""
    ended_at: Mapped[dt.datetime | None] = mapped_column(Instant, default=None)


class Call(msgspec.Struct, frozen=True):
    """The columns of a tool call that the engine reads and writes, named and explained in ToolCall."""

    tool_call_id: uuid.UUID
    workspace_id: uuid.UUID
    run_id: uuid.UUID
    step_index: int
    tool: str
    implementation: str
    arguments: dict[str, Any]
    risk: str
    timeout_seconds: float
    model_call_id: str | None
    status: str
    result: Any
    error: str | None
    reason: str | None
    decided_by: uuid.UUID | None
    created_at: dt.datetime
    decided_at: dt.datetime | None
    started_at: dt.datetime | None
    epoch: int | None
    lease_until: dt.datetime | None
    ended_at: dt.datetime | None

    @property
    def is_open(self) -> bool:
        """Whether its run still waits for it."""
        return self.status in OPEN

    def told(self, **more: Any) -> dict[str, Any]:
        """Return the payload of an event or a step about it."""
        named = {"model_call_id": self.model_call_id} if self.model_call_id is not None else {}
        return {"tool_call_id": self.tool_call_id, "tool": self.tool, "risk": self.risk, **named, **more}


class Definition(msgspec.Struct, frozen=True):
    """A tool that a workspace may call, as the engine knows it; ToolDefinition explains the fields."""

    name: str
    tool: str
    risk: Risk
    needs_approval: bool
    arguments_schema: dict[str, Any]
    timeout_seconds: float

    @property
    def schemas(self) -> list[Mapping[str, Any]]:
        """What arguments must meet: the definition's own schema and the tool's."""
        tool = registry().get(self.tool)
        return [self.arguments_schema, *([tool.schema] if tool is not None else [])]

    def explain_arguments(self, arguments: Any) -> str | None:
        """Say in one line what is wrong with a call's arguments; None when nothing is."""
        return next((wrong for schema in self.schemas if (wrong := explain(schema, arguments)) is not None), None)


DEFAULTS: Mapping[str, Definition] = {
    name: Definition(
        name=name,
        tool=name,
        risk=Risk.ELEVATED if name == "http_get" else Risk.SAFE,
        needs_approval=name == "http_get",
        arguments_schema={"type": "object"},
        timeout_seconds=DEFAULT_TIMEOUT_S,
    )
    for name in BUILT_IN
}
"""The definitions that every workspace has without being made."""


_WORKSPACE = text("SELECT 1 FROM workspaces WHERE workspace_id = :workspace_id")


async def create_definition(
    connection: AsyncConnection,
    workspace_id: uuid.UUID,
    name: str,
    tool: str,
    risk: str,
    schema: dict[str, Any] | None = None,
    needs_approval: bool | None = None,
    timeout_seconds: float = DEFAULT_TIMEOUT_S,
) -> Definition:
    """Make a definition; raises Invalid naming the field, NotFound for the workspace, IllegalState for a taken name."""
    if NAME.fullmatch(name) is None:
        raise Invalid("name", "give 1 to 64 letters, digits, hyphens and underscores")
    if tool not in registry():
        raise Invalid("tool", f"give one of {', '.join(sorted(registry()))}, not {tool[:100]!r}")
    if risk not in Risk.__members__:
        raise Invalid("risk", f"give one of {', '.join(Risk)}, not {risk[:100]!r}")
    if not 0 < timeout_seconds <= MAX_TIMEOUT_S:
        raise Invalid("timeout_seconds", f"give a number above 0, at most {MAX_TIMEOUT_S:g}")
    await asyncio.to_thread(require_schema, schema or {}, "schema")  # a large one takes a while
    if (await connection.execute(_WORKSPACE, {"workspace_id": workspace_id})).first() is None:
        raise NotFound("no such workspace")
    definition = Definition(
        name=name,
        tool=tool,
        risk=Risk(risk),
        needs_approval=risk != Risk.SAFE if needs_approval is None else needs_approval,
        arguments_schema=schema or {"type": "object"},
        timeout_seconds=timeout_seconds,
    )
    taken = IllegalState(f"the workspace has a tool {name!r} already; definitions never change: choose another name")
    if name in DEFAULTS:
        raise taken
    values = msgspec.structs.asdict(definition)
    try:
        await connection.execute(
            insert(ToolDefinition).values(workspace_id=workspace_id, created_at=dt.datetime.now(dt.UTC), **values)
        )
    except IntegrityError:
        raise taken from None
    return definition


_FIELDS = ", ".join(Definition.__struct_fields__)
READ_ALL = text(f"SELECT {_FIELDS} FROM tool_definitions WHERE workspace_id = :workspace_id ORDER BY name")  # noqa: S608 - Definition's own fields


async def list_definitions(connection: AsyncConnection, workspace_id: uuid.UUID) -> list[Definition]:
    """Return every tool that a workspace may call, the built-in ones first."""
    found = await connection.execute(READ_ALL, {"workspace_id": workspace_id})
    return [*DEFAULTS.values(), *(msgspec.convert(dict(row), Definition) for row in found.mappings())]


class Definitions:
    """Definitions that this process has met. They never change, so what was found once stays true."""

    MOST = 10_000
    """How many workspaces are kept; past that the oldest is forgotten and read again when needed."""

    def __init__(self) -> None:
        self._known: dict[uuid.UUID, Mapping[str, Definition]] = {}

    def known(self, workspace_id: uuid.UUID, names: Iterable[str]) -> dict[str, Definition] | None:
        """Return the definitions of these names if all of them are remembered, without asking the database."""
        known = self._known.get(workspace_id, DEFAULTS)
        wanted = set(names)
        return {name: known[name] for name in wanted} if wanted <= known.keys() else None

    async def find(
        self, connection: AsyncConnection, workspace_id: uuid.UUID, names: Iterable[str]
    ) -> dict[str, Definition]:
        """Return the definitions of these names, but for those that do not exist."""
        wanted = set(names)
        known = self._known.get(workspace_id, DEFAULTS)
        if wanted - known.keys():
            known = {each.name: each for each in await list_definitions(connection, workspace_id)}
            self._known[workspace_id] = known
            while len(self._known) > self.MOST:
                del self._known[next(iter(self._known))]
        return {name: known[name] for name in wanted if name in known}
