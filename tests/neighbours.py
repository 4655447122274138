"""Tenants side by side, each with an object of every kind, and what may not be seen or changed across the fence.

Everything that a tenant's objects hold is told apart from everybody else's: texts bear the tenant's label, ids are
unique. So a leak is a substring of an answer, and a side effect is a change of the fingerprint of a table.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import text

from service.announce import Announcer
from service.archive import Folder, create_checkpoint
from service.auth import IssuedToken, Role, issue_token, revoke_token
from service.control import pause_run
from service.db import Base, Database
from service.doorbell import Doorbell
from service.families import cancel_run
from service.guarded import connect_redis
from service.runs import new_id
from service.settings import Settings
from service.tallies import Tallies
from service.tick import Ticker
from service.toolcalls import create_definition
from service.workspaces import Agents, create_agent, create_workspace
from tests.surface import Entry, Kind, Place, State, Unknown
from tests.tenants import Tenant, drain

HOUR_MS = 3_600_000

VARIANTS = {"/api/runs/{run_id}/resume/": "paused", "/api/toolcalls/": "asking"}
"""Operations that need a run of a certain kind to have something to do, or to tell: paused, or with a tool call."""


class Caller(NamedTuple):
    """Somebody who sends requests, as the test knows them."""

    name: str
    header: str | None  # Authorization
    role: Role | None = None  # null: nobody, whatever the header says
    is_installation: bool = False

    def may(self, entry: Entry) -> bool:
        """Tell whether the caller may ask for the operation at all."""
        role = entry.operation.role
        if role is None:
            return True
        return (
            self.role is not None and self.role >= role and (self.is_installation or not entry.operation.installation)
        )

    @property
    def headers(self) -> dict[str, str]:
        """What identifies the caller."""
        return {} if self.header is None else {"authorization": self.header}

    @property
    def bearer(self) -> str | None:
        """What the caller sends as a bearer token, when opening a socket."""
        return None if self.header is None else self.header.removeprefix("Bearer ")


class Side:
    """One tenant with an object of each kind, made when first asked for."""

    def __init__(self, neighbourhood: Neighbourhood, label: str, tenant: Tenant, agents: dict[str, uuid.UUID]) -> None:
        self.label = label
        self.tenant = tenant
        self._neighbourhood = neighbourhood
        self._agents = agents
        self._made: dict[tuple[Kind, str], uuid.UUID] = {}

    async def id_of(self, kind: Kind, variant: str = "") -> uuid.UUID:
        """Return the id of the tenant's object of a kind; `variant` says which, where there are several."""
        if kind is Kind.WORKSPACE:
            return self.tenant.workspace_id
        if kind is Kind.AGENT:
            return self.tenant.agent_id
        if (kind, variant) not in self._made:
            self._made[kind, variant] = await self._make(kind, variant)
        return self._made[kind, variant]

    def spend(self) -> None:
        """Make new objects from now on: the ones so far may not be what they were."""
        self._made.clear()

    async def run(self, agent: str = "slow") -> uuid.UUID:
        """Accept a run that holds the label wherever a caller may write something."""
        run_id = await self.tenant.run(self._agents[agent])
        await self.tenant.write(
            "UPDATE runs SET input_text = :label, channel = :label, metadata = CAST(:metadata AS json)"
            " WHERE run_id = :run_id",
            run_id=run_id,
            label=self.label,
            metadata=json.dumps({self.label: self.label}),
        )
        return run_id

    async def _make(self, kind: Kind, variant: str) -> uuid.UUID:
        database = self.tenant.database
        if kind is Kind.RUN:
            run_id = await self.run("guarded" if variant == "asking" else "slow")
            if variant == "asking":
                await drain(self._neighbourhood.ticker)
            elif variant == "paused":
                async with database.begin() as connection:
                    await pause_run(connection, run_id, self.label)
            else:
                await self.tenant.spawn(run_id, group_id=self.label)
            return run_id
        if kind is Kind.TOOL_CALL:
            run_id = await self.run(variant)
            await drain(self._neighbourhood.ticker)
            (call,) = await self.tenant.rows("SELECT tool_call_id FROM tool_calls WHERE run_id = :id", id=run_id)
            return uuid.UUID(str(call["tool_call_id"]))
        if kind is Kind.ARCHIVE:
            run_id = await self.run()
            async with database.begin() as connection:
                await cancel_run(connection, run_id, self.label)
            return (await create_checkpoint(database, self._neighbourhood.folder, run_id)).made[0].archive_id
        raise Unknown(f"{kind}: say in tests/neighbours.py how to make one")

    async def marks(self) -> set[str]:
        """Return everything that is this tenant's alone: its label, and each id and digest in its rows."""
        found = {self.label}
        for table, scope in SCOPES.items():
            rows = await self.tenant.rows(
                f"SELECT to_jsonb({table})::text AS row FROM {table} WHERE {scope}",  # noqa: S608 - mapped tables
                workspace_id=self.tenant.workspace_id,
            )
            for row in rows:
                found |= set(_strings(json.loads(row["row"])))
        return found


def _strings(value: Any) -> list[str]:
    """Return each text in a value that is an id or a digest."""
    if isinstance(value, dict):
        return [each for inner in value.values() for each in _strings(inner)]
    if isinstance(value, list):
        return [each for inner in value for each in _strings(inner)]
    is_mark = isinstance(value, str) and (len(value) == 64 or (len(value) == 36 and value.count("-") == 4))
    return [value] if is_mark else []


NOBODYS = frozenset(
    {"quota_revisions", "quota_changes", "quota_shadow_counts", "quota_recalibrations", "quota_request_counts"}
)
"""Tables of the installation, in which no row is a tenant's."""

LATE = frozenset({"quota_request_counts"})
"""Sums to which the service adds an earlier request up to a second later: a change says nothing of the one at hand."""


def _scope(table: str) -> str:
    if table in NOBODYS:
        return "false"
    columns = Base.metadata.tables[table].columns
    if "workspace_id" in columns:
        return f"{table}.workspace_id = :workspace_id"
    if "run_id" in columns:
        return f"{table}.run_id IN (SELECT run_id FROM runs WHERE workspace_id = :workspace_id)"  # noqa: S608 - a mapped table
    raise Unknown(f"the table {table}: say in tests/neighbours.py whose its rows are")


SCOPES = {table: _scope(table) for table in sorted(Base.metadata.tables)}
"""Which rows of each table are one workspace's."""


class Neighbourhood:
    """The tenants, those who call, and the state of everything."""

    def __init__(self, database: Database, redis_url: str, folder: Folder) -> None:
        self.database = database
        self.folder = folder
        self.redis = connect_redis(redis_url)
        self.announcer = Announcer(self.redis, Doorbell(redis_url))
        self.ticker = Ticker(database, self.announcer, Agents(), Tallies(), Settings.lease_s)
        self.own: Side
        """The tenant whose tokens are used."""
        self.neighbour: Side
        """Another tenant, under the default quota, of which nothing may ever be seen or changed."""
        self.second: Side
        """A tenant beside the own one, for installation tokens, which may act on both."""
        self.callers: list[Caller] = []
        self.neighbours_owner: Caller

    def caller(self, name: str) -> Caller:
        """Return a caller by name."""
        return next(caller for caller in self.callers if caller.name == name)

    async def settle_in(self) -> None:
        """Make the tenants and the callers."""
        self.own = await self._side("calibration")
        self.neighbour = await self._side("default")
        self.second = await self._side("calibration")
        for kind, variant in (
            (Kind.RUN, ""),
            (Kind.RUN, "paused"),
            (Kind.RUN, "asking"),
            (Kind.TOOL_CALL, "guarded"),
            (Kind.ARCHIVE, ""),
        ):
            await self.neighbour.id_of(kind, variant)
        own = self.own.tenant.workspace_id
        issued = {role: await self._token(own, role) for role in Role}
        expired, revoked = await self._token(own, Role.OWNER), await self._token(own, Role.OWNER)
        async with self.database.begin() as connection:
            await revoke_token(connection, revoked.token)
            await connection.execute(
                text("UPDATE tokens SET expires_at = now() WHERE prefix = :prefix"), {"prefix": expired.token[:13]}
            )
        theirs = await self._token(self.neighbour.tenant.workspace_id, Role.OWNER)
        self.neighbours_owner = Caller("the neighbour", f"Bearer {theirs.token}", Role.OWNER)
        installation = {role: await self._token(None, role) for role in (Role.VIEWER, Role.OWNER)}
        self.callers = [
            *(Caller(role.name, f"Bearer {each.token}", role) for role, each in issued.items()),
            *(Caller(f"installation {r.name}", f"Bearer {i.token}", r, True) for r, i in installation.items()),
            Caller("without a token", None),
            Caller("unknown token", f"Bearer plim_{'x' * 43}"),
            Caller("expired token", f"Bearer {expired.token}"),
            Caller("revoked token", f"Bearer {revoked.token}"),
            Caller("another scheme", f"Basic {issued[Role.OWNER].token}"),
        ]

    async def fill(self, entry: Entry, caller: Caller, filling: tuple[State, ...]) -> dict[Place, str]:
        """Return an id for each place that is not left out."""
        return {
            place: await self.id_for(place.kind, state, caller, entry.path)
            for place, state in zip(entry.places, filling, strict=True)
            if state is not State.LEFT_OUT
        }

    async def id_for(self, kind: Kind, state: State, caller: Caller, path: str) -> str:
        """Return an id in a state, of an object with which the operation would succeed."""
        variant = VARIANTS.get(path, "")
        if kind is Kind.TOOL_CALL:  # the neighbour's is dangerous: a role that is looked at too early would show
            variant = "guarded" if state in (State.GUARDED, State.FOREIGN, State.ABSENT) else "elevated"
        foreign = self.second if caller.is_installation else self.neighbour
        if state is State.MALFORMED:
            return "no-uuid-" + "z" * 28
        if state in (State.OWN, State.GUARDED):
            return str(await self.own.id_of(kind, variant))
        id_ = str(await foreign.id_of(kind, variant))
        # Made at the same instant, so that as a cursor it stands at the same place.
        return id_ if state is State.FOREIGN else id_[:24] + uuid.uuid4().hex[:12]

    def spend(self) -> None:
        """Use new objects from now on, but for the neighbour's."""
        self.own.spend()
        self.second.spend()

    async def fingerprint(self, *, apart_from: Side | None = None) -> list[tuple[str, str]]:
        """Return a digest of every table but the LATE ones, without one tenant's part if told."""
        left_out = new_id() if apart_from is None else apart_from.tenant.workspace_id
        parts = []
        for table, scope in SCOPES.items():
            if table in LATE:
                continue
            rows = f"SELECT md5({table}::text) AS row FROM {table} WHERE ({scope}) IS NOT TRUE"  # noqa: S608 - mapped tables
            parts.append(f"SELECT '{table}', md5(coalesce(string_agg(row, '' ORDER BY row), '')) FROM ({rows}) r")  # noqa: S608 - mapped tables
        async with self.database.read() as connection:
            found = await connection.execute(text(" UNION ALL ".join(parts)), {"workspace_id": left_out})
            return [(name, digest) for name, digest in found]

    async def _side(self, quota_class: str) -> Side:
        label = f"secret-{uuid.uuid4().hex}"
        async with self.database.begin() as connection:
            workspace_id = await create_workspace(connection, label, quota_class)
            script: list[dict[str, Any]] = [{"kind": "MODEL_CALL", "latency_ms": HOUR_MS}, {"kind": "OBSERVATION"}]
            agents = {"slow": await create_agent(connection, workspace_id, label, script)}
            for name, risk in (("elevated", "ELEVATED"), ("guarded", "DANGEROUS")):
                tool = f"{name}-{label[:20]}"
                await create_definition(connection, workspace_id, tool, "echo", risk, {"title": label})
                step: dict[str, Any] = {"kind": "TOOL_CALL", "tool": tool, "arguments": {"say": label}}
                agents[name] = await create_agent(connection, workspace_id, label, [step])
        tenant = Tenant(self.database, self.announcer, workspace_id, agents["slow"])
        return Side(self, label, tenant, agents)

    async def _token(self, workspace_id: uuid.UUID | None, role: Role) -> IssuedToken:
        async with self.database.begin() as connection:
            return await issue_token(connection, workspace_id, role.name)


@asynccontextmanager
async def open_neighbourhood(database: Database, redis_url: str, archive_dir: Path) -> AsyncIterator[Neighbourhood]:
    """Make the tenants and the callers."""
    opened = Neighbourhood(database, redis_url, Folder(archive_dir))
    await opened.settle_in()
    yield opened
    await opened.ticker.close()
    await opened.redis.aclose()
