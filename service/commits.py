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
from sqlalchemy import Row, TextClause, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.announce import Announcer
from service.db import Database, cannot_be_stored, is_outage, rows
from service.errors import ApiError, IllegalState, Invalid, NotFound, Unavailable
from service.events import APPEND_EVENTS, EventType, NewEvent
from service.grouping import Grouping
from service.idempotency import IdempotencyKeys, KeyedWrite
from service.quota.caps import COUNT, LOCK, Held, lock_and_count
from service.quota.limits import Quota
from service.runs import FINAL, RunStatus, StepKind, new_id
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


class Accepted(NamedTuple):
    """A committed write, and where its time went."""

    run_id: uuid.UUID
    status: str
    correlation_id: uuid.UUID
    group_id: str | None
    db_ms: float  # the group's transaction
    publish_ms: float  # the group's announcement


class _Parent:
    """A locked parent, as a group of writes goes on changing it."""

    def __init__(self, row: Row[Any]) -> None:
        self.run_id: uuid.UUID = row.run_id
        self.depth: int = row.depth
        self.status = RunStatus(row.status)
        self.correlation_id: uuid.UUID = row.correlation_id
        self.pending_subruns: int = row.pending_subruns
        self.spawned_subruns: int = row.spawned_subruns
        self.step_count: int = row.step_count
        self.last_seq: int = row.last_seq


LOCK_PARENTS = text("""
    SELECT run_id, depth, status, correlation_id, pending_subruns, spawned_subruns, step_count, last_seq
    FROM runs WHERE run_id = ANY(:ids) ORDER BY depth, run_id FOR NO KEY UPDATE
""")

INSERT_RUNS = """
    INSERT INTO runs (run_id, workspace_id, agent_id, parent_run_id, depth, status, correlation_id, input_text,
                      channel, metadata, group_id, expected_subruns, max_wait_seconds, last_seq, next_tick_at,
                      created_at)
    SELECT run_id, workspace_id, agent_id, parent_run_id, depth, 'PENDING', correlation_id, input_text,
           channel, metadata, group_id, expected_subruns, max_wait_seconds, 1, now(), now()
    FROM json_to_recordset(CAST(:runs AS json))
        AS r(run_id uuid, workspace_id uuid, agent_id uuid, parent_run_id uuid, depth int, correlation_id uuid,
             input_text text, channel text, metadata json, group_id text, expected_subruns int,
             max_wait_seconds float8)
"""

WRITE_CREATES = text(f"WITH r AS ({INSERT_RUNS}), e AS ({APPEND_EVENTS}) SELECT now()")
WRITE_CREATES_AND_SPAWNS = text(f"""
    WITH r AS ({INSERT_RUNS}), e AS ({APPEND_EVENTS}),
    s AS (
        INSERT INTO steps (run_id, step_index, kind, payload, correlation_id, created_at)
        SELECT run_id, step_index, kind, payload, correlation_id, now()
        FROM json_to_recordset(CAST(:steps AS json))
            AS s(run_id uuid, step_index int, kind text, payload jsonb, correlation_id uuid)
    ),
    p AS (
        UPDATE runs SET pending_subruns = n.pending_subruns, spawned_subruns = n.spawned_subruns,
                        step_count = n.step_count, last_seq = n.last_seq
        FROM json_to_recordset(CAST(:parents AS json))
            AS n(run_id uuid, pending_subruns int, spawned_subruns int, step_count int, last_seq int)
        WHERE runs.run_id = n.run_id
    )
    SELECT now()
""")  # noqa: S608 - constants


NO_ROWS = "[]"
WARM_UP: list[tuple[TextClause, dict[str, Any]]] = [
    (WRITE_CREATES, {"runs": NO_ROWS, "events": NO_ROWS}),
    (WRITE_CREATES_AND_SPAWNS, {"runs": NO_ROWS, "events": NO_ROWS, "steps": NO_ROWS, "parents": NO_ROWS}),
    (LOCK_PARENTS, {"ids": []}),
    (LOCK, {"ids": []}),
    (COUNT, {"ids": []}),
]
"""The statements of a group with nothing in it, to prepare them before the first request (`Database.warm`)."""


class _Plan:
    """What one group will write, filled by deciding its writes in turn."""

    def __init__(self, held: dict[uuid.UUID, Held], parents: dict[uuid.UUID, _Parent]) -> None:
        self.held = held
        self.parents = parents
        self.changed_parents: dict[uuid.UUID, _Parent] = {}
        self.runs: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        self.events: list[NewEvent] = []

    def create(self, write: Create, run_id: uuid.UUID) -> Accepted:
        """Admit a parent run; raises QuotaExceeded."""
        if write.workspace_id in self.held:
            self.held[write.workspace_id].admit_parent(write.quota)
        self._add_run(write, run_id, run_id, None, None)
        return Accepted(run_id, RunStatus.PENDING, run_id, None, 0.0, 0.0)

    def spawn(self, write: Spawn, run_id: uuid.UUID) -> Accepted:
        """Admit a subrun; raises IllegalState for a final parent, and QuotaExceeded."""
        parent = self.parents.get(write.parent_run_id)
        if parent is None:
            raise NotFound("no such run")
        if parent.status in FINAL:
            raise IllegalState(f"the run is {parent.status}: a final run spawns nothing")
        if write.workspace_id in self.held:
            self.held[write.workspace_id].admit_subrun(write.quota, parent.pending_subruns)
        group_id = write.group_id or f"group-{run_id}"
        self._add_run(write, run_id, parent.correlation_id, parent, group_id)
        parent.pending_subruns += 1
        parent.spawned_subruns += 1
        parent.step_count += 1
        spawned = {"child_run_id": run_id, "group_id": group_id}
        self.steps.append(
            {
                "run_id": parent.run_id,
                "step_index": parent.step_count,
                "kind": StepKind.SUBRUN_SPAWN,
                "payload": spawned,
                "correlation_id": parent.correlation_id,
            }
        )
        step = {"step_index": parent.step_count, "kind": StepKind.SUBRUN_SPAWN}
        for event_type, payload in ((EventType.STEP_CREATED, step), (EventType.SUBRUN_SPAWNED, spawned)):
            parent.last_seq += 1
            self.events.append(
                NewEvent(parent.run_id, parent.last_seq, event_type, payload, parent.correlation_id, write.workspace_id)
            )
        self.changed_parents[parent.run_id] = parent
        return Accepted(run_id, RunStatus.PENDING, parent.correlation_id, group_id, 0.0, 0.0)

    def _add_run(
        self,
        write: Create | Spawn,
        run_id: uuid.UUID,
        correlation_id: uuid.UUID,
        parent: _Parent | None,
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
        parameters = {"runs": rows(self.runs), "events": rows(self.events)}
        if not self.changed_parents:
            return await self._write(connection, WRITE_CREATES, parameters)
        parents = [
            {
                name: getattr(p, name)
                for name in ("run_id", "pending_subruns", "spawned_subruns", "step_count", "last_seq")
            }
            for p in self.changed_parents.values()
        ]
        parameters |= {"steps": rows(self.steps), "parents": rows(parents)}
        return await self._write(connection, WRITE_CREATES_AND_SPAWNS, parameters)

    @staticmethod
    async def _write(connection: AsyncConnection, statement: TextClause, parameters: dict[str, str]) -> dt.datetime:
        written_at: dt.datetime = (await connection.execute(statement, parameters)).scalar_one()
        return written_at


class Commits:
    """Accepts creates and spawns for one process."""

    def __init__(self, database: Database, announcer: Announcer) -> None:
        self._database = database
        self._announcer = announcer
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
        parent_ids = {write.parent_run_id for write in writes if isinstance(write, Spawn)}
        parents: dict[uuid.UUID, _Parent] = {}
        if parent_ids:
            found = await connection.execute(LOCK_PARENTS, {"ids": sorted(parent_ids)})
            parents = {row.run_id: _Parent(row) for row in found}
        plan = _Plan(held, parents)
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


def _first_answer(known: uuid.UUID | ApiError) -> Accepted | ApiError:
    """Answer a create whose key was claimed before as it was answered then."""
    if isinstance(known, ApiError):
        return known
    return Accepted(known, RunStatus.PENDING, known, None, 0.0, 0.0)
