"""Workspaces (the tenants) and their agents: made by an installation token or by a command, then never changed.

An agent is either a script, the steps that a run executes, one a tick, each with an optional simulated latency; or a
model behind a chat-completions endpoint that the installation allows (`agents` asks it). Both are bounded: a run that
needs more than `max_steps` steps or `max_tool_calls` tool calls fails.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
from sqlalchemy import ForeignKey, insert, select, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import Mapped, mapped_column

from service.allowlist import may_connect
from service.db import Base
from service.errors import Invalid, NotFound
from service.runs import Instant, StepKind, new_id
from service.settings import Settings
from service.toolcalls import Definition, Definitions

MAX_SCRIPT_STEPS = 1000
"""Longest script: bounds what one run may ask of the workers."""

MAX_LATENCY_MS = 3_600_000
"""Longest simulated latency of one step: an hour."""

MAX_NAME_CHARACTERS = 200

DEFAULT_MAX_STEPS, DEFAULT_MAX_TOOL_CALLS = 50, 20
"""Bounds of a run when its agent does not say; a script gets at least as many as it needs."""

MOST_STEPS, MOST_TOOL_CALLS = 2 * MAX_SCRIPT_STEPS, MAX_SCRIPT_STEPS
"""The highest bounds that an agent may have: each tool call of a script is answered by one step more."""


class QuotaClass(enum.StrEnum):
    """Which set of rates and caps a workspace is under."""

    DEFAULT = "default"  # the active revision's values for tenants
    CALIBRATION = "calibration"  # lifted in revision 1, so that the system itself can be measured


class ScriptStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One step of a scripted agent."""

    kind: StepKind  # SUBRUN_SPAWN is not allowed: subruns are spawned by the API
    latency_ms: float = 0.0  # how long after the step before it becomes due; no worker waits
    error: str | None = None  # when set, the step fails the run with this summary
    tool: str | None = None  # of a TOOL_CALL: the definition to call; without it the step only says that it was there
    arguments: dict[str, Any] = {}  # what that tool is called with


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A model behind an OpenAI-compatible chat-completions endpoint, and how it is asked."""

    model: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    base_url: Annotated[str, msgspec.Meta(max_length=2000)] | None = None  # null: PLIMSOLL_MODEL_BASE_URL
    system_prompt: Annotated[str, msgspec.Meta(max_length=100_000)] | None = None
    tools: Annotated[tuple[str, ...], msgspec.Meta(max_length=128)] = ()  # names of definitions that it may call
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None


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
    """A list of ScriptStep; empty for a model."""
    model: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True), default=None)
    """A ModelSpec; null for a script."""
    max_steps: Mapped[int] = mapped_column(default=DEFAULT_MAX_STEPS)
    """Most steps of its own that a run may take; steps that record a spawn do not count."""
    max_tool_calls: Mapped[int] = mapped_column(default=DEFAULT_MAX_TOOL_CALLS)
    """Most tool calls that a run may request."""
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
    connection: AsyncConnection,
    workspace_id: uuid.UUID,
    name: str,
    script: list[dict[str, Any]] | None = None,
    *,
    model: object = None,
    max_steps: int | None = None,
    max_tool_calls: int | None = None,
    settings: Settings | None = None,
) -> uuid.UUID:
    """Make an agent and return its id; raises NotFound for the workspace and Invalid naming the field.

    `model` is the JSON of a ModelSpec; which endpoints it may name stands in `settings`.
    """
    _require_name(name)
    if script is not None and model is not None:
        raise Invalid("model", "an agent has a script or a model: leave one of them out")
    spec = None if model is None else parse_model(model, settings)
    steps = () if spec is not None else DEFAULT_SCRIPT if script is None else parse_script(script)
    bounds = _bounds(steps, max_steps, max_tool_calls)
    exists = await connection.execute(select(Workspace.name).where(Workspace.workspace_id == workspace_id))
    if exists.first() is None:
        raise NotFound("no such workspace")
    named = {step.tool for step in steps if step.tool is not None} | set(spec.tools if spec is not None else ())
    if named:
        known = await Definitions().find(connection, workspace_id, named)
        await asyncio.to_thread(_require_tools, steps, spec, known)  # a thousand steps take a while
    agent_id = new_id()
    await connection.execute(
        insert(Agent).values(
            agent_id=agent_id,
            workspace_id=workspace_id,
            name=name,
            script=msgspec.to_builtins(steps),
            model=None if spec is None else msgspec.to_builtins(spec),
            max_steps=bounds[0],
            max_tool_calls=bounds[1],
            created_at=dt.datetime.now(dt.UTC),
        )
    )
    return agent_id


def parse_model(model: object, settings: Settings | None) -> ModelSpec:
    """Turn a model's JSON into its spec; raises Invalid naming the field that is wrong, or not allowed."""
    try:
        spec = msgspec.convert(model, ModelSpec)
    except msgspec.ValidationError as wrong:
        raise Invalid("model", str(wrong)) from None
    if any("\x00" in text_ for text_ in (spec.model, spec.base_url or "", spec.system_prompt or "", *spec.tools)):
        raise Invalid("model", "must not contain the character U+0000")
    if settings is None or endpoint_of(spec, settings) is None:
        if spec.base_url is None:
            raise Invalid("model.base_url", "give one: the installation has no endpoint of its own")
        raise Invalid("model.base_url", "is not on the installation's list of endpoints (PLIMSOLL_MODEL_ALLOW)")
    return spec


def endpoint_of(spec: ModelSpec, settings: Settings) -> str | None:
    """Return the base URL under which a model is asked; None unless the installation allows it."""
    if spec.base_url is None:
        return settings.model_base_url
    url = spec.base_url.rstrip("/")
    allow = list(settings.model_allow)
    if settings.model_base_url is not None:
        parts = urlsplit(settings.model_base_url)
        allow.append(f"{parts.scheme}://{parts.netloc}")
    return url if may_connect(url, allow) and not set("?#") & set(url) else None


def _bounds(steps: tuple[ScriptStep, ...], max_steps: int | None, max_tool_calls: int | None) -> tuple[int, int]:
    """Return the bounds of an agent's runs; one that is not given is the default, or what the script needs."""
    calls = sum(step.tool is not None for step in steps)
    if max_steps is None:
        max_steps = max(DEFAULT_MAX_STEPS, len(steps) + calls)
    if max_tool_calls is None:
        max_tool_calls = max(DEFAULT_MAX_TOOL_CALLS, calls)
    if not 1 <= max_steps <= MOST_STEPS:
        raise Invalid("max_steps", f"give a whole number from 1 to {MOST_STEPS}")
    if not 0 <= max_tool_calls <= MOST_TOOL_CALLS:
        raise Invalid("max_tool_calls", f"give a whole number from 0 to {MOST_TOOL_CALLS}")
    return max_steps, max_tool_calls


def _require_tools(steps: tuple[ScriptStep, ...], spec: ModelSpec | None, known: Mapping[str, Definition]) -> None:
    """Raise Invalid for a tool that the workspace does not have, or arguments that do not fit."""
    for index, name in enumerate(spec.tools if spec is not None else ()):
        if name not in known:
            raise Invalid(f"model.tools[{index}]", f"the workspace has no tool {name[:100]!r}")
    for index, step in enumerate(steps):
        if step.tool is None:
            continue
        if step.tool not in known:
            raise Invalid(f"script[{index}].tool", f"the workspace has no tool {step.tool[:100]!r}")
        if "\\u0000" in msgspec.json.encode(step.arguments).decode():
            raise Invalid(f"script[{index}].arguments", "must not contain the character U+0000")
        wrong = known[step.tool].explain_arguments(step.arguments)
        if wrong is not None:
            raise Invalid(f"script[{index}].arguments", wrong)


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
        if step.tool is None and step.arguments:
            raise Invalid(f"script[{index}].arguments", "belong to a `tool`, which the step does not name")
        if step.tool is not None and (step.kind is not StepKind.TOOL_CALL or step.error is not None):
            raise Invalid(f"script[{index}].tool", "belongs to a TOOL_CALL step without `error`")
    return steps


READ_AGENTS = text("""
    SELECT agent_id, workspace_id, script, model, max_steps, max_tool_calls FROM agents WHERE agent_id = ANY(:ids)
""")


@dataclass(frozen=True)
class KnownAgent:
    """What never changes of an agent."""

    workspace_id: uuid.UUID
    script: tuple[ScriptStep, ...] = DEFAULT_SCRIPT
    model: ModelSpec | None = None
    max_steps: int = DEFAULT_MAX_STEPS
    max_tool_calls: int = DEFAULT_MAX_TOOL_CALLS

    @cached_property
    def needs_means(self) -> bool:
        """Whether its turns need more than its script; a script without tools never breaks its bounds but by itself."""
        return self.model is not None or bool(self.tool_names) or len(self.script) > self.max_steps

    @cached_property
    def tool_names(self) -> set[str]:
        """The definitions that its runs may call."""
        named = {step.tool for step in self.script if step.tool is not None}
        return named | set(self.model.tools) if self.model is not None else named


class Agents:
    """Agents that this process has met, by id. They never change, so what was read once stays true."""

    MOST = 10_000
    """How many are kept; past that the oldest is forgotten and read again when needed."""

    def __init__(self) -> None:
        self._known: dict[uuid.UUID, KnownAgent] = {}

    async def find(self, connection: AsyncConnection, agent_ids: set[uuid.UUID]) -> dict[uuid.UUID, KnownAgent]:
        """Return what is known of each agent that exists."""
        unknown = agent_ids - self._known.keys()
        if unknown:
            found = await connection.execute(READ_AGENTS, {"ids": list(unknown)})
            for row in found:
                self._known[row.agent_id] = KnownAgent(
                    row.workspace_id,
                    msgspec.convert(row.script, tuple[ScriptStep, ...]),
                    None if row.model is None else msgspec.convert(row.model, ModelSpec),
                    row.max_steps,
                    row.max_tool_calls,
                )
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
