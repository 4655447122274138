"""Runs: create, list, read, spawn a subrun, cancel, pause, resume. The snapshot that clients poll: `snapshot`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, TypeAlias

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.announce import Announcer
from service.api.answers import Created, RunPage, RunView, Spawned
from service.api.paging import Listing, Lists, page_of
from service.api.sight import RunFacts, Sight
from service.api.wire import RUN_JSON
from service.changes import GroupOptions
from service.commits import Accepted, Commits, Create, Spawn
from service.control import pause_run, resume_run
from service.db import Database
from service.errors import ApiError, Invalid, Malformed, NotFound
from service.exchange import Answer, Exchange, answer_json, field_headers, refuse_nul
from service.families import cancel_run
from service.grouping import Grouping
from service.joins import FailurePolicy, JoinPolicy
from service.ledger import Written
from service.quota.gate import Gate
from service.quota.inforce import Quotas
from service.quota.limits import Limit, Quota
from service.runs import RunStatus
from service.workspaces import Agents, KnownAgent

MAX_KEY_CHARACTERS = 255
"""Longest Idempotency-Key."""

Control: TypeAlias = Callable[[AsyncConnection, uuid.UUID, str | None], Awaitable[Written]]
"""Something that a caller does to one run, inside a transaction."""

EMPTY_OBJECT = msgspec.Raw(b"{}")

Metadata = Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema={"type": "object"})]
"""A JSON object of the caller's own, passed on to the database as it was written."""


class CreateBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /api/runs/."""

    workspace_id: uuid.UUID
    agent_id: uuid.UUID
    input_text: str | None = None
    channel: str | None = None
    metadata: Metadata = msgspec.field(default_factory=lambda: EMPTY_OBJECT)
    expected_subruns: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 0
    max_wait_seconds: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 60.0


class SpawnOptions(msgspec.Struct, forbid_unknown_fields=True):
    """How a subrun joins its parent. What is left out is as the group has it, or the default when it has nobody yet."""

    join_policy: JoinPolicy | None = None
    quorum: Annotated[int, msgspec.Meta(ge=1, le=10_000)] | None = None
    timeout_seconds: Annotated[float, msgspec.Meta(gt=0, le=86_400)] | None = None
    failure_policy: FailurePolicy | None = None
    group_id: Annotated[str, msgspec.Meta(min_length=1, max_length=200)] | None = None
    metadata: Metadata = msgspec.field(default_factory=lambda: EMPTY_OBJECT)


class SpawnBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /api/runs/<id>/spawn_subrun/."""

    input_text: str | None = None
    options: SpawnOptions | None = None


class ReasonBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a control request."""

    reason: Annotated[str, msgspec.Meta(max_length=2000)] | None = None


ONE = text(f"SELECT {RUN_JSON}::text FROM runs r WHERE r.run_id = :run_id")  # noqa: S608 - constants
LISTING = Listing(
    "runs",
    RunStatus,
    "parent_run_id",
    page_of("runs", "r", "run_id", "parent_run_id", RUN_JSON, ("input_text", "channel", "metadata", "error_summary")),
)


class Runs:
    """The endpoints on runs."""

    def __init__(
        self,
        database: Database,
        commits: Commits,
        gate: Gate,
        quotas: Quotas,
        sight: Sight,
        announcer: Announcer,
        agents: Agents,
    ) -> None:
        self._database = database
        self._commits = commits
        self._gate = gate
        self._quotas = quotas
        self._sight = sight
        self._announcer = announcer
        self._agents = agents
        self._lists = Lists(database, quotas)
        self._agent_reads: Grouping[uuid.UUID, KnownAgent] = Grouping(self._read_agents, lanes=2)

    async def create(self, exchange: Exchange[CreateBody]) -> Answer[Created]:
        """Accept a run."""
        body = exchange.body
        quota = await self._admit(exchange)
        key = _idempotency_key(exchange)
        metadata = _metadata(body.metadata, "metadata")
        with exchange.timed("quota_ms"):
            fields = await self._gate.take(body.workspace_id, quota, Limit.RUN_CREATION)
        accepted = await self._commit(
            exchange,
            Create(
                body.workspace_id,
                body.agent_id,
                body.input_text or "",
                body.channel or "",
                metadata,
                body.expected_subruns,
                body.max_wait_seconds,
                quota,
                key,
                exchange.body_bytes if key is not None else b"",
            ),
        )
        self._sight.learn(accepted.run_id, RunFacts(body.workspace_id, body.agent_id))
        return answer_json(
            {
                "run_id": accepted.run_id,
                "status": accepted.status,
                "workspace_id": body.workspace_id,
                "agent_id": body.agent_id,
                "correlation_id": accepted.correlation_id,
            },
            field_headers(fields),
        )

    async def spawn(self, exchange: Exchange[SpawnBody]) -> Answer[Spawned]:
        """Accept a subrun of a run; it uses the parent's agent."""
        run_id = exchange.path_id("run_id", "run")
        options = exchange.body.options or SpawnOptions()
        metadata = _metadata(options.metadata, "options.metadata")
        with exchange.timed("db_ms"):
            facts = await self._sight.find(exchange.caller, run_id)
            quota = await self._quotas.of(facts.workspace_id)
        _require_reachable(options.quorum, quota)
        with exchange.timed("quota_ms"):
            fields = await self._gate.take(facts.workspace_id, quota, Limit.SUBRUN_SPAWN)
        accepted = await self._commit(
            exchange,
            Spawn(
                run_id,
                facts.workspace_id,
                facts.agent_id,
                exchange.body.input_text or "",
                metadata,
                options.group_id,
                quota,
                GroupOptions(options.join_policy, options.failure_policy, options.quorum, options.timeout_seconds),
            ),
        )
        self._sight.learn(accepted.run_id, facts)
        return answer_json(
            {
                "child_run_id": accepted.run_id,
                "status": accepted.status,
                "correlation_id": accepted.correlation_id,
                "group_id": accepted.group_id,
            },
            field_headers(fields),
        )

    async def get(self, exchange: Exchange[None]) -> Answer[RunView]:
        """Return one run."""
        run_id = exchange.path_id("run_id", "run")
        with exchange.timed("db_ms"):
            await self._sight.find(exchange.caller, run_id)
        return Answer((await self._read(exchange, run_id)).encode())

    async def cancel(self, exchange: Exchange[ReasonBody]) -> Answer[RunView]:
        """End a run and all its descendants."""
        return await self._control(exchange, cancel_run, "cancelled by a caller")

    async def pause(self, exchange: Exchange[ReasonBody]) -> Answer[RunView]:
        """Stop a run, and not its subruns."""
        return await self._control(exchange, pause_run, "paused by a caller")

    async def resume(self, exchange: Exchange[ReasonBody]) -> Answer[RunView]:
        """Let a paused run go on from where it was paused."""
        return await self._control(exchange, resume_run, "resumed by a caller")

    async def _control(self, exchange: Exchange[ReasonBody], control: Control, default_reason: str) -> Answer[RunView]:
        """Do what a caller wants with a run, announce it, and answer with the run."""
        run_id = exchange.path_id("run_id", "run")
        with exchange.timed("db_ms"):
            await self._sight.find(exchange.caller, run_id)
            async with self._database.begin() as connection:
                outcome = await control(connection, run_id, exchange.body.reason or default_reason)
        with exchange.timed("publish_ms"):
            await self._announcer.announce(outcome.events, outcome.created_at, due=outcome.due)
        return Answer((await self._read(exchange, run_id)).encode())

    async def list(self, exchange: Exchange[None]) -> Answer[RunPage]:
        """Return a page of runs, newest first, with a cursor for the next one."""
        return await self._lists.page(exchange, LISTING)

    async def _commit(self, exchange: Exchange[Any], write: Create | Spawn) -> Accepted:
        """Submit a write; of a refused one, all the time is the database's."""
        asked = time.perf_counter()
        try:
            accepted = await self._commits.submit(write)
        except ApiError:
            exchange.db_ms += (time.perf_counter() - asked) * 1e3
            raise
        exchange.db_ms += accepted.db_ms
        exchange.publish_ms += accepted.publish_ms
        return accepted

    async def _read(self, exchange: Exchange[Any], run_id: uuid.UUID) -> str:
        with exchange.timed("db_ms"):
            async with self._database.read() as connection:
                run: str | None = (await connection.execute(ONE, {"run_id": run_id})).scalar()
        if run is None:
            raise NotFound("no such run")
        return run

    async def _admit(self, exchange: Exchange[CreateBody]) -> Quota:
        """Return the workspace's quota; raises NotFound unless the caller may see it and the agent is its own.

        All of this comes before any quota is spent.
        """
        workspace_id, agent_id = exchange.body.workspace_id, exchange.body.agent_id
        if not exchange.caller.may_see(workspace_id):
            raise NotFound("no such workspace")
        quota, agent = self._quotas.known(workspace_id), self._agents.known(agent_id)
        if quota is None or agent is None:
            with exchange.timed("db_ms"):
                quota = await self._quotas.of(workspace_id)
                agent = agent or await self._agent_reads.submit(agent_id)
        if agent.workspace_id != workspace_id:
            raise NotFound("no such agent")
        return quota

    async def _read_agents(self, agent_ids: Sequence[uuid.UUID]) -> Sequence[KnownAgent | Exception]:
        async with self._database.read() as connection:
            found = await self._agents.find(connection, set(agent_ids))
        return [found.get(agent_id) or NotFound("no such agent") for agent_id in agent_ids]


def _metadata(raw: msgspec.Raw, field: str) -> msgspec.Raw:
    """Return the caller's metadata as it was written; raises Invalid unless it is an object that can be stored."""
    text_ = bytes(raw).strip()
    if text_ == b"null":
        return EMPTY_OBJECT
    if not text_.startswith(b"{"):
        raise Invalid(field, "expected an object")
    try:
        text_.decode()
    except UnicodeDecodeError:
        raise Invalid(field, "is not valid UTF-8") from None
    if b"\\u0000" in text_:
        try:
            refuse_nul(msgspec.json.decode(text_), field)
        except RecursionError:
            raise Malformed("the body is nested too deeply") from None
    return raw


def _require_reachable(quorum: int | None, quota: Quota) -> None:
    """Raise Invalid for a quorum of more subruns than a parent may have pending: it might never be met."""
    most = quota.pending_subruns
    if quorum is not None and most is not None and quorum > most:
        raise Invalid("options.quorum", f"give 1 to {most}: a run may have {most} pending subruns, not {quorum}")


def _idempotency_key(exchange: Exchange[Any]) -> str | None:
    """Return the request's Idempotency-Key; raises Invalid."""
    raw = exchange.header(b"idempotency-key")
    if raw is None:
        return None
    key = raw.decode("latin-1")
    if not 1 <= len(key) <= MAX_KEY_CHARACTERS or not key.isprintable():
        raise Invalid("Idempotency-Key", f"give 1 to {MAX_KEY_CHARACTERS} printable characters")
    return key
