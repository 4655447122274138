"""What streams read from the database: events after a `seq`, the live runs of a workspace, where each run stands.

Reads that wait in one turn of the loop share a query, so a thousand clients that reconnect at once are a few queries.
"""

from __future__ import annotations

import datetime as dt
import time
import uuid
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import RowMapping, text

from service.db import Database, rows
from service.grouping import Grouping
from service.runs import RunStatus
from service.stream.frames import Happened, instant

PAGE = 500
"""Events of one run that one read returns."""

RECENT_S = 60
"""How far back a look searches for runs that came and went unnoticed: longer than any transaction may take."""

EVENTS = text("""
    SELECT q.n, r.workspace_id, e.seq, e.event_type, e.payload::text AS payload, e.created_at,
           CASE WHEN r.compacted_through_seq > q.since_seq THEN r.compacted_through_seq END AS compacted_through_seq
    FROM json_to_recordset(CAST(:asked AS json)) AS q(n int, run_id uuid, since_seq int)
    JOIN runs r ON r.run_id = q.run_id
    LEFT JOIN LATERAL (
        SELECT * FROM events WHERE events.run_id = q.run_id AND seq > q.since_seq
            AND r.compacted_through_seq <= q.since_seq
        ORDER BY seq LIMIT :page
    ) e ON true
    ORDER BY q.n, e.seq
""")

_SUMMARY = """run_id, workspace_id, agent_id, parent_run_id, group_id, correlation_id, status, error_summary, last_seq,
    created_at, started_at, ended_at"""

RUNS = text(f"SELECT {_SUMMARY} FROM runs WHERE run_id = ANY(:ids)")  # noqa: S608 - constants

LIVE = text(f"""
    SELECT {_SUMMARY} FROM runs WHERE workspace_id = :workspace_id AND ended_at IS NULL ORDER BY run_id
""")  # noqa: S608 - constants

STANDING = text("""
    SELECT run_id, workspace_id, last_seq FROM runs WHERE run_id = ANY(:run_ids)
    UNION SELECT run_id, workspace_id, last_seq FROM runs
    WHERE workspace_id = ANY(:workspace_ids) AND ended_at IS NULL
    UNION SELECT run_id, workspace_id, last_seq FROM runs
    WHERE workspace_id = ANY(:workspace_ids) AND run_id > :recent
""")

Asked = tuple[uuid.UUID, int]
"""A run and the sequence number after which events are wanted."""


class Compacted(Exception):
    """Some of the events that were asked for are in an archive only; `through_seq` is the number from which to ask."""

    def __init__(self, through_seq: int) -> None:
        super().__init__(through_seq)
        self.through_seq = through_seq


class Standing(NamedTuple):
    """How far a run has come."""

    run_id: uuid.UUID
    workspace_id: uuid.UUID
    last_seq: int


class Listing(NamedTuple):
    """The live runs of a workspace at one instant."""

    at: dt.datetime
    summaries: list[dict[str, Any]]


class History:
    """Reads for one process's streams."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._events: Grouping[Asked, list[Happened]] = Grouping(self._read_events, lanes=2)
        self._runs: Grouping[uuid.UUID, dict[str, Any] | None] = Grouping(self._read_runs, lanes=2)

    async def events(self, run_id: uuid.UUID, since_seq: int) -> list[Happened]:
        """Return the next events of a run, in order and without a gap, at most `PAGE`; raises Compacted."""
        return await self._events.submit((run_id, since_seq))

    async def summary(self, run_id: uuid.UUID) -> dict[str, Any] | None:
        """Return a run's summary as it stands now, or None when there is no such run (any more)."""
        return await self._runs.submit(run_id)

    async def live(self, workspace_id: uuid.UUID) -> Listing:
        """Return the workspace's live runs, oldest first."""
        async with self._database.begin() as connection:
            # Read committed: the instant is read first, and what is committed before it is in the list.
            at = (await connection.execute(text("SELECT clock_timestamp()"))).scalar_one()
            found = await connection.execute(LIVE, {"workspace_id": workspace_id})
            return Listing(at, [_summary(row) for row in found.mappings()])

    async def standing(
        self, run_ids: Iterable[uuid.UUID], workspace_ids: Collection[uuid.UUID], blind_s: float
    ) -> list[Standing]:
        """Return how far these runs have come, and all runs of these workspaces that are live or recent.

        `blind_s` is how long ago the last look was.
        """
        recent = _first_id(time.time() - RECENT_S - blind_s)
        parameters = {"run_ids": list(run_ids), "workspace_ids": list(workspace_ids), "recent": recent}
        async with self._database.read() as connection:
            return [Standing(*row) for row in await connection.execute(STANDING, parameters)]

    async def _read_events(self, asked: Sequence[Asked]) -> Sequence[list[Happened] | Exception]:
        distinct = list(dict.fromkeys(asked))
        wanted = [{"n": n, "run_id": run_id, "since_seq": since} for n, (run_id, since) in enumerate(distinct)]
        found: list[list[Happened]] = [[] for _ in distinct]
        compacted: dict[int, Exception] = {}
        async with self._database.read() as connection:
            for row in await connection.execute(EVENTS, {"asked": rows(wanted), "page": PAGE}):
                if row.compacted_through_seq is not None:
                    compacted[row.n] = Compacted(row.compacted_through_seq)
                if row.seq is None:
                    continue
                payload = msgspec.json.decode(row.payload)
                found[row.n].append(
                    Happened(row.workspace_id, distinct[row.n][0], row.seq, row.event_type, payload, row.created_at)
                )
        number = {each: n for n, each in enumerate(distinct)}
        return [compacted.get(number[each]) or found[number[each]] for each in asked]

    async def _read_runs(self, run_ids: Sequence[uuid.UUID]) -> Sequence[dict[str, Any] | None]:
        async with self._database.read() as connection:
            read = await connection.execute(RUNS, {"ids": list(set(run_ids))})
            found = {row["run_id"]: _summary(row) for row in read.mappings()}
        return [dict(found[run_id]) if run_id in found else None for run_id in run_ids]


def _summary(row: RowMapping) -> dict[str, Any]:
    """Return a run's row as the summary that goes over the wire."""
    return {name: instant(value) if isinstance(value, dt.datetime) else value for name, value in row.items()}


def rewind(summary: dict[str, Any]) -> dict[str, Any]:
    """Return a run's summary as it stood before its first event."""
    return {
        **summary,
        "status": RunStatus.PENDING,
        "error_summary": None,
        "last_seq": 0,
        "started_at": None,
        "ended_at": None,
    }


def _first_id(at_s: float) -> uuid.UUID:
    """Return the smallest run id of an instant (RFC 9562, version 7: the first 48 bits are milliseconds)."""
    return uuid.UUID(int=int(at_s * 1000) << 80)
