"""Group commit: the creates and spawns that wait in one turn of the loop go into one transaction.

States of a write: waiting -> decided -> committed (or refused, by its own error). Steps of a group:

1. lock the capped workspaces, in order of id, and count what they hold (`quota.caps`);
2. claim the idempotency keys (`idempotency`);
3. lock the parents, in order of (depth, run_id);
4. decide every write in turn, in Python, against what was locked: each is admitted or refused alone;
5. one statement writes all runs, steps, events and parents;
6. commit, announce, wake each waiting request.

Invariants: locks are taken in the order workspace -> key -> parent, everywhere; a refused write leaves nothing behind;
one write's failure never fails its neighbours: when the statement itself fails, the group is replayed one by one and
only the culprit sees its error (`Grouping`). A caller that goes away does not undo its write.
"""

from __future__ import annotations

import datetime as dt
import time
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import TextClause, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.announce import Announcer
from service.changes import GroupOptions, spawned
from service.db import Database, cannot_be_stored, is_outage, rows
from service.errors import ApiError, IllegalState, Invalid, NotFound, QuotaExceeded, Unavailable
from service.events import APPEND_EVENTS, INSTANT, EventType, NewEvent
from service.grouping import Grouping
from service.idempotency import IdempotencyKeys, KeyedWrite
from service.joins import Group
from service.ledger import GROUP_COLUMNS, RUN_COLUMNS, locking
from service.pen import NewStep, RunRow
from service.quota.caps import COUNT, LOCK, Held, lock_and_count
from service.quota.limits import Quota
from service.quota.refusals import count_refusal
from service.quota.shadow import ShadowTally
from service.runs import RunStatus, new_id
from service.telemetry import DB_WRITE_SECONDS, GROUP_SIZE


class Create(NamedTuple):
    """A run to be accepted. The caller was checked: it may, the agent is the workspace's."""

    workspace_id: uuid.UUID
    agent_id: uuid.UUID
    input_text: str
    channel: str
    metadata: msgspec.Raw  # a JSON object, as the caller wrote it
    expected_subruns: int
    max_wait_seconds: float
    quota: Quota
    idempotency_key: str | None = None
    body: bytes = b""  # as it was sent; read only when there is a key


class Spawn(NamedTuple):
    """A subrun to be accepted. Workspace and agent are the parent's, which never change."""

    parent_run_id: uuid.UUID
    workspace_id: uuid.UUID
    agent_id: uuid.UUID
    input_text: str
    metadata: msgspec.Raw
    group_id: str | None  # null: a group named after the child
    quota: Quota
    options: GroupOptions = GroupOptions()


class Accepted(NamedTuple):
    """A committed write, and where its time went."""

    run_id: uuid.UUID
    status: str
    correlation_id: uuid.UUID
    group_id: str | None
    db_ms: float  # the group's transaction
    publish_ms: float  # the group's announcement


LOCK_PARENTS = locking(f"""
    SELECT {", ".join(RUN_COLUMNS)} FROM runs WHERE run_id = ANY(CAST(:ids AS uuid[]))
    ORDER BY depth, run_id FOR NO KEY UPDATE
""")  # noqa: S608 - the columns are RunRow's own

READ_GROUPS = text(f"""
    SELECT {GROUP_COLUMNS} FROM json_to_recordset(CAST(:asked AS json)) AS w(run_id uuid, group_id text)
    JOIN subrun_groups g ON g.run_id = w.run_id AND g.group_id = w.group_id
""")  # noqa: S608 - the columns are Group's own
"""To be read after the parents were locked, as in `ledger`; a spawn needs no other group than its own."""

INSERT_RUNS = f"""
    INSERT INTO runs (run_id, workspace_id, agent_id, parent_run_id, depth, status, correlation_id, input_text,
                      channel, metadata, group_id, expected_subruns, max_wait_seconds, last_seq, next_tick_at,
                      step_due_at, created_at)
    SELECT run_id, workspace_id, agent_id, parent_run_id, depth, 'PENDING', correlation_id, input_text,
           channel, metadata, group_id, expected_subruns, max_wait_seconds, 1, {INSTANT}, {INSTANT}, {INSTANT}
    FROM json_to_recordset(CAST(:runs AS json))
        AS r(run_id uuid, workspace_id uuid, agent_id uuid, parent_run_id uuid, depth int, correlation_id uuid,
             input_text text, channel text, metadata json, group_id text, expected_subruns int,
             max_wait_seconds float8)
"""  # noqa: S608 - a constant

WRITE_GROUPS = """
    INSERT INTO subrun_groups AS g (run_id, group_id, join_policy, failure_policy, quorum, timeout_seconds,
                                    deadline_at, spawned, pending, failed, state, decided_at)
    SELECT run_id, group_id, join_policy, failure_policy, quorum, timeout_seconds,
           deadline_at, spawned, pending, failed, state, decided_at
    FROM json_to_recordset(CAST(:groups AS json))
        AS n(run_id uuid, group_id text, join_policy text, failure_policy text, quorum int,
             timeout_seconds float8, deadline_at timestamptz, spawned int, pending int, failed int, state text,
             decided_at timestamptz)
    ON CONFLICT (run_id, group_id) DO UPDATE SET
        deadline_at = excluded.deadline_at, spawned = excluded.spawned, pending = excluded.pending,
        failed = excluded.failed, state = excluded.state, decided_at = excluded.decided_at
"""

WRITE_CREATES = text(f"WITH r AS ({INSERT_RUNS}), e AS ({APPEND_EVENTS}) SELECT {INSTANT}")
WRITE_CREATES_AND_SPAWNS = text(f"""
    WITH r AS ({INSERT_RUNS}), e AS ({APPEND_EVENTS}),
    s AS (
        INSERT INTO steps (run_id, step_index, kind, payload, correlation_id, created_at)
        SELECT run_id, step_index, kind, payload, correlation_id, {INSTANT}
        FROM json_to_recordset(CAST(:steps AS json))
            AS s(run_id uuid, step_index int, kind text, payload jsonb, correlation_id uuid)
    ),
    p AS (
        UPDATE runs SET pending_subruns = n.pending_subruns, spawned_subruns = n.spawned_subruns,
                        step_count = n.step_count, last_seq = n.last_seq, next_tick_at = n.next_tick_at
        FROM json_to_recordset(CAST(:parents AS json))
            AS n(run_id uuid, pending_subruns int, spawned_subruns int, step_count int, last_seq int,
                 next_tick_at timestamptz)
        WHERE runs.run_id = n.run_id
    ), g AS ({WRITE_GROUPS})
    SELECT {INSTANT}
""")  # noqa: S608 - constants


NO_ROWS = "[]"
WARM_UP: list[tuple[TextClause, dict[str, Any]]] = [
    (WRITE_CREATES, {"runs": NO_ROWS, "events": NO_ROWS, "now": None}),
    (
        WRITE_CREATES_AND_SPAWNS,
        {"runs": NO_ROWS, "events": NO_ROWS, "steps": NO_ROWS, "parents": NO_ROWS, "groups": NO_ROWS, "now": None},
    ),
    (LOCK_PARENTS, {"ids": []}),
    (READ_GROUPS, {"asked": NO_ROWS}),
    (LOCK, {"ids": []}),
    (COUNT, {"ids": []}),
]
"""The statements of a group with nothing in it, to prepare them before the first request (`Database.warm`)."""


_CHANGED_BY_A_SPAWN = ("run_id", "pending_subruns", "spawned_subruns", "step_count", "last_seq", "next_tick_at")


class _Plan:
    """What one group will write, filled by deciding its writes in turn."""

    def __init__(self, held: dict[uuid.UUID, Held], parents: dict[uuid.UUID, RunRow], now: dt.datetime | None) -> None:
        self.held = held
        self.parents = parents
        self.now = now  # when the parents were locked; null without any
        self.changed_parents: set[uuid.UUID] = set()
        self.groups: dict[tuple[uuid.UUID, str], Group] = {}
        self.runs: list[dict[str, Any]] = []
        self.steps: list[NewStep] = []
        self.events: list[NewEvent] = []

    def create(self, write: Create, run_id: uuid.UUID) -> Accepted:
        """Admit a parent run; raises QuotaExceeded."""
        if write.workspace_id in self.held:
            self.held[write.workspace_id].admit_parent(write.quota)
        self._add_run(write, run_id, run_id, None, None)
        return Accepted(run_id, RunStatus.PENDING, run_id, None, 0.0, 0.0)

    def spawn(self, write: Spawn, run_id: uuid.UUID) -> Accepted:
        """Admit a subrun; raises IllegalState for a final parent, Invalid for other options, and QuotaExceeded."""
        parent = self.parents.get(write.parent_run_id)
        if parent is None or self.now is None:
            raise NotFound("no such run")
        if parent.is_final:
            raise IllegalState(f"the run is {parent.status}: a final run spawns nothing")
        group_id = write.group_id or f"group-{run_id}"
        outcome = spawned(parent, run_id, group_id, write.options, self.now)
        if write.workspace_id in self.held:
            self.held[write.workspace_id].admit_subrun(write.quota, parent.pending_subruns)
        self._add_run(write, run_id, parent.correlation_id, parent, group_id)
        self.parents[parent.run_id] = outcome.run
        self.changed_parents.add(parent.run_id)
        self.groups.update(((parent.run_id, group.group_id), group) for group in outcome.groups)
        self.steps += outcome.steps
        self.events += outcome.events
        return Accepted(run_id, RunStatus.PENDING, parent.correlation_id, group_id, 0.0, 0.0)

    def _add_run(
        self,
        write: Create | Spawn,
        run_id: uuid.UUID,
        correlation_id: uuid.UUID,
        parent: RunRow | None,
        group_id: str | None,
    ) -> None:
        parent_run_id = parent.run_id if parent else None
        self.runs.append(
            {
                "run_id": run_id,
                "workspace_id": write.workspace_id,
                "agent_id": write.agent_id,
                "parent_run_id": parent_run_id,
                "depth": parent.depth + 1 if parent else 0,
                "correlation_id": correlation_id,
                "input_text": write.input_text,
                "channel": write.channel if isinstance(write, Create) else "subrun",
                "metadata": write.metadata,
                "group_id": group_id,
                "expected_subruns": write.expected_subruns if isinstance(write, Create) else 0,
                "max_wait_seconds": write.max_wait_seconds if isinstance(write, Create) else 60.0,
            }
        )
        payload = {"agent_id": write.agent_id, "parent_run_id": parent_run_id}
        self.events.append(NewEvent(run_id, 1, EventType.RUN_CREATED, payload, correlation_id, write.workspace_id))

    async def write(self, connection: AsyncConnection) -> dt.datetime:
        """Write everything in one statement; returns the transaction's instant."""
        parameters = {"runs": rows(self.runs), "events": rows(self.events), "now": self.now}
        if not self.changed_parents:
            return await self._write(connection, WRITE_CREATES, parameters)
        parents = [
            {name: getattr(self.parents[run_id], name) for name in _CHANGED_BY_A_SPAWN}
            for run_id in self.changed_parents
        ]
        parameters |= {"steps": rows(self.steps), "parents": rows(parents), "groups": rows(self.groups.values())}
        return await self._write(connection, WRITE_CREATES_AND_SPAWNS, parameters)

    @staticmethod
    async def _write(connection: AsyncConnection, statement: TextClause, parameters: dict[str, Any]) -> dt.datetime:
        written_at: dt.datetime = (await connection.execute(statement, parameters)).scalar_one()
        return written_at


class Commits:
    """Accepts creates and spawns for one process."""

    def __init__(self, database: Database, announcer: Announcer, shadow: ShadowTally | None = None) -> None:
        self._database = database
        self._announcer = announcer
        self._shadow = shadow
        self._keys = IdempotencyKeys()
        self._grouping: Grouping[Create | Spawn, Accepted] = Grouping(
            self._commit, lanes=2, retry_alone=lambda fault: not is_outage(fault)
        )

    async def submit(self, write: Create | Spawn) -> Accepted:
        """Return when the write is committed and announced; raises the write's own ApiError.

        When the connection is lost while the commit is on its way, nobody knows whether it happened.
        """
        try:
            return await self._grouping.submit(write)
        except QuotaExceeded as refusal:
            count_refusal(refusal.limit, write.workspace_id)
            raise
        except Exception as fault:
            if is_outage(fault):
                raise Unavailable("the database does not answer; what was asked for may have been done") from fault
            if isinstance(fault, DBAPIError) and cannot_be_stored(fault):
                raise Invalid("body", "holds a value that cannot be stored") from fault
            raise

    async def drain(self) -> None:
        """Return when everything submitted is answered."""
        await self._grouping.drain()

    async def _commit(self, writes: Sequence[Create | Spawn]) -> Sequence[Accepted | Exception]:
        started = time.perf_counter()
        run_ids = [new_id() for _ in writes]
        async with self._database.begin() as connection:
            results, plan = await self._decide(connection, writes, run_ids)
            created_at = await plan.write(connection) if plan.runs else None
        committed = time.perf_counter()
        if self._shadow is not None:
            self._shadow.count(seen for held in plan.held.values() for seen in held.observed)
        GROUP_SIZE.observe(len(writes))
        DB_WRITE_SECONDS.labels("commits").observe(committed - started)
        if created_at is not None:
            await self._announcer.announce(plan.events, created_at, due=True)
        db_ms, publish_ms = (committed - started) * 1e3, (time.perf_counter() - committed) * 1e3
        return [r._replace(db_ms=db_ms, publish_ms=publish_ms) if isinstance(r, Accepted) else r for r in results]

    async def _decide(
        self, connection: AsyncConnection, writes: Sequence[Create | Spawn], run_ids: list[uuid.UUID]
    ) -> tuple[list[Accepted | Exception], _Plan]:
        """Lock what the group touches and decide each write; nothing but idempotency keys is written here."""
        capped = {write.workspace_id for write in writes if write.quota.has_caps}
        held = await lock_and_count(connection, capped)
        known = await self._keys.claim(
            connection,
            [
                KeyedWrite(write.workspace_id, write.idempotency_key, write.body, run_id)
                for write, run_id in zip(writes, run_ids, strict=True)
                if isinstance(write, Create) and write.idempotency_key is not None
            ],
        )
        parents, now = await _lock_parents(connection, [write for write in writes if isinstance(write, Spawn)])
        plan = _Plan(held, parents, now)
        results: list[Accepted | Exception] = []
        refused: list[uuid.UUID] = []
        for write, run_id in zip(writes, run_ids, strict=True):
            try:
                if run_id in known:
                    results.append(_first_answer(known[run_id]))
                elif isinstance(write, Create):
                    results.append(plan.create(write, run_id))
                else:
                    results.append(plan.spawn(write, run_id))
            except ApiError as refusal:
                results.append(refusal)
                if isinstance(write, Create) and write.idempotency_key is not None:
                    refused.append(run_id)
        if refused:  # a refused create may be tried again with the same key
            await self._keys.free(connection, refused)
        return results, plan


async def _lock_parents(
    connection: AsyncConnection, spawns: Sequence[Spawn]
) -> tuple[dict[uuid.UUID, RunRow], dt.datetime | None]:
    """Lock the parents and read the groups that are spawned into; returns them with the instant at which they were."""
    parents: dict[uuid.UUID, RunRow] = {}
    now: dt.datetime | None = None
    if spawns:
        ids = {"ids": sorted({spawn.parent_run_id for spawn in spawns})}
        for row in await connection.execute(LOCK_PARENTS, ids):
            parents[row.run_id], now = RunRow(*row[:-1]), row[-1]
    named = {(spawn.parent_run_id, spawn.group_id) for spawn in spawns if spawn.group_id is not None}
    if parents and named:
        asked = [{"run_id": run_id, "group_id": group_id} for run_id, group_id in named]
        for row in await connection.execute(READ_GROUPS, {"asked": rows(asked)}):
            group = Group(*row)
            parents[group.run_id].groups[group.group_id] = group
    return parents, now


def _first_answer(known: uuid.UUID | ApiError) -> Accepted | ApiError:
    """Answer a create whose key was claimed before as it was answered then."""
    if isinstance(known, ApiError):
        return known
    return Accepted(known, RunStatus.PENDING, known, None, 0.0, 0.0)
