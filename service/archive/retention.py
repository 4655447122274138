"""What may be deleted because a bundle holds it: a run's verbose events, or the whole run.

Both work in batches under row locks that pass over what others hold, and both read and check the bundle in the very
transaction that deletes. A run whose bundle is missing or damaged keeps everything, and is archived again.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import TextClause, text
from sqlalchemy.engine import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from service.archive.bundle import PARTS, Damaged
from service.archive.checkpoint import START, Cursor, select_in_order
from service.archive.folder import At, Folder, unwatched
from service.archive.records import Stored
from service.db import Database
from service.events import EventType

BATCH = 64
"""Most runs in one transaction."""

VERBOSE = (EventType.STEP_CREATED,)
"""What compaction deletes when no types are given: the step that such an event announces stays in the database."""


class Deleted(NamedTuple):
    """What one transaction deleted."""

    run_ids: list[uuid.UUID]  # compacted or purged
    event_count: int  # events deleted by compaction; 0 for a purge
    damaged: list[str]  # a sentence for each bundle that could not be relied on
    cursor: Cursor | None  # where to look next; None when nothing was left to look at


NOTHING = Deleted([], 0, [], None)
"""There was nothing to look at."""


def parse_event_types(names: str) -> tuple[EventType, ...]:
    """Return the event types of a comma-separated list, each once; raises ValueError naming one that is none."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in set(EventType)]:
        raise ValueError(f"{unknown[0]!r} is no event type; give some of {', '.join(EventType)}")
    return tuple(EventType(name) for name in dict.fromkeys(wanted))


_COVERED = """
    SELECT r.run_id, r.ended_at, a.archive_id, a.path, a.sha256, a.size_bytes FROM runs r
    JOIN run_archives a ON a.run_id = r.run_id AND a.last_seq = r.last_seq
    WHERE r.ended_at <= now() - make_interval(secs => :older_than_s) AND r.archived_seq = r.last_seq
      AND (r.ended_at, r.run_id) > (:after_at, :after_id)
"""
"""Final runs with a bundle of exactly what they are now."""

_COMPACTABLE = text(f"""{_COVERED}
      AND NOT a.compacted_types @> CAST(:types AS text[])
    ORDER BY r.ended_at, r.run_id LIMIT :most FOR NO KEY UPDATE OF r SKIP LOCKED
""")

_COMPACT = text("""
    WITH deleted AS (
        DELETE FROM events e USING run_archives a
        WHERE a.archive_id = ANY(CAST(:archive_ids AS uuid[])) AND e.run_id = a.run_id AND e.seq <= a.last_seq
          AND e.event_type = ANY(CAST(:types AS text[]))
        RETURNING e.run_id, e.seq
    ), highest AS (
        SELECT run_id, max(seq) AS seq FROM deleted GROUP BY run_id
    ), remembered AS (
        UPDATE runs SET compacted_through_seq = greatest(compacted_through_seq, highest.seq)
        FROM highest WHERE runs.run_id = highest.run_id
    ), told AS (
        UPDATE run_archives SET compacted_types =
            ARRAY(SELECT DISTINCT unnest(compacted_types || CAST(:types AS text[])) ORDER BY 1)
        WHERE archive_id = ANY(CAST(:archive_ids AS uuid[]))
    )
    SELECT count(*) FROM deleted
""")

_PURGEABLE = text(f"""{_COVERED}
      AND NOT EXISTS (SELECT FROM runs c WHERE c.parent_run_id = r.run_id)
      AND NOT EXISTS (SELECT FROM runs p WHERE p.run_id = r.parent_run_id
                      AND (p.ended_at IS NULL OR p.archived_seq < p.last_seq))
    ORDER BY r.ended_at, r.run_id LIMIT :most FOR UPDATE OF r SKIP LOCKED
""")  # noqa: S608 - constants

_PURGE = [
    text(f"DELETE FROM {table} WHERE run_id = ANY(CAST(:run_ids AS uuid[]))")  # noqa: S608 - constants
    for table in (*(part.table for part in reversed(PARTS)), "runs")
]

_ARCHIVE_AGAIN = text("UPDATE runs SET archived_seq = 0 WHERE run_id = ANY(CAST(:run_ids AS uuid[]))")


async def compact_events(
    database: Database,
    folder: Folder,
    types: Collection[EventType],
    older_than_s: float,
    *,
    most: int = BATCH,
    after: Cursor = START,
    at: At = unwatched,
) -> Deleted:
    """Delete the events of these types of the next runs that ended at least so long ago; no types delete nothing.

    A run must have a bundle of what it is now, which is checked first. Raises FolderFault.
    """
    if not types:
        return NOTHING
    async with database.begin() as connection:
        found = await _lock(connection, _COMPACTABLE, older_than_s, most, after, types=sorted(types))
        if not found:
            return NOTHING
        whole, damaged = await _checked(connection, folder, found)
        at("bundles checked")
        parameters = {"archive_ids": [row.archive_id for row in whole], "types": sorted(types)}
        event_count = (await connection.execute(_COMPACT, parameters)).scalar_one()
        at("events deleted")
    at("compacted")
    return Deleted([row.run_id for row in whole], event_count, damaged, _next(found))


async def purge(
    database: Database,
    folder: Folder,
    older_than_s: float,
    *,
    most: int = BATCH,
    after: Cursor = START,
    at: At = unwatched,
) -> Deleted:
    """Delete the next runs that ended at least so long ago, with all their rows; their bundles stay.

    A run must have a bundle of what it is now, which is checked first, and no child that is left; its parent must have
    ended and be archived. So a family goes in several passes, the youngest first. Raises FolderFault.
    """
    async with database.begin() as connection:
        found = await _lock(connection, _PURGEABLE, older_than_s, most, after)
        if not found:
            return NOTHING
        whole, damaged = await _checked(connection, folder, found)
        at("bundles checked")
        run_ids = [row.run_id for row in whole]
        for statement in _PURGE:
            await connection.execute(statement, {"run_ids": run_ids})
        at("run deleted")
    at("purged")
    return Deleted(run_ids, 0, damaged, _next(found))


async def _lock(
    connection: AsyncConnection,
    statement: TextClause,
    older_than_s: float,
    most: int,
    after: Cursor,
    **more: Iterable[str],
) -> Sequence[Row[Any]]:
    parameters = {
        "older_than_s": older_than_s,
        "after_at": after.ended_at,
        "after_id": after.run_id,
        "most": most,
        **more,
    }
    return await select_in_order(connection, statement, parameters)


async def _checked(
    connection: AsyncConnection, folder: Folder, found: Sequence[Row[Any]]
) -> tuple[list[Row[Any]], list[str]]:
    """Return the runs whose bundle is whole; each of the others is told of, and is to be archived again."""

    def check(row: Row[Any]) -> str | None:
        try:
            folder.verify(Stored(row.archive_id, row.run_id, row.path, row.sha256, row.size_bytes))
        except Damaged as reason:
            return f"bundle {row.path}: {reason}; run {row.run_id} keeps its rows and is archived again"
        return None

    verdicts = [await asyncio.to_thread(check, row) for row in found]
    again = [row.run_id for row, verdict in zip(found, verdicts, strict=True) if verdict]
    if again:
        await connection.execute(_ARCHIVE_AGAIN, {"run_ids": again})
    whole = [row for row, verdict in zip(found, verdicts, strict=True) if not verdict]
    return whole, [verdict for verdict in verdicts if verdict]


def _next(found: Sequence[Row[Any]]) -> Cursor:
    return Cursor(found[-1].ended_at, found[-1].run_id)
