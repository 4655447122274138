"""Checkpoints: bundles of final runs, a batch in one transaction that sees one snapshot of the database.

The order of events is in the package's opening page. A batch is bounded in runs and in rows; a longer run comes alone.
Documents are fetched a few at a time, so memory is bounded by the largest runs and not by their number.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import TextClause, text
from sqlalchemy.engine import Row
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.archive.bundle import READ, SCHEMA_VERSION, Damaged
from service.archive.folder import At, Folder, unwatched
from service.archive.records import path_of
from service.db import Database, rows
from service.errors import IllegalState, NotFound
from service.events import APPEND_EVENTS, EventType, NewEvent
from service.runs import new_id

BATCH = 64
"""Most runs in one transaction: more would hold row locks for longer and gain no speed (docs/archives.md)."""

MOST_ROWS = 4_000
"""Most steps and events in one batch, unless its first run alone has more."""

AT_ONCE = 8
"""Documents in memory at the same time."""

SERIALIZATION_FAILURE = "40001"  # PostgreSQL manual, appendix A

MOST_RETRIES = 20
"""How often a batch starts anew because another archiver had committed one of its runs meanwhile."""


class Cursor(NamedTuple):
    """Where in the order of their ends the runs are looked at next; each is looked at once a round."""

    ended_at: dt.datetime
    run_id: uuid.UUID


START = Cursor(dt.datetime(1970, 1, 1, tzinfo=dt.UTC), uuid.UUID(int=0))
"""Before every run."""


class Made(NamedTuple):
    """A committed bundle."""

    archive_id: uuid.UUID
    run_id: uuid.UUID
    path: str  # relative to the archive folder
    sha256: str
    size_bytes: int
    last_seq: int
    swept: list[str]  # files of killed archivers that were removed


class Batch(NamedTuple):
    """What one transaction did."""

    made: list[Made]
    events: list[NewEvent]  # to announce
    created_at: dt.datetime | None  # of all of it; None when there was nothing to do
    cursor: Cursor  # where to look next


class Unbundled(Damaged):
    """One run has no bundle that could be read back; the transaction was undone."""

    def __init__(self, run_id: uuid.UUID, reason: str) -> None:
        super().__init__(f"run {run_id} cannot be archived: {reason}")
        self.run_id = run_id


_COLUMNS = """
    r.run_id, r.workspace_id, r.correlation_id, r.status, r.ended_at, r.step_count, r.last_seq, r.archived_seq,
    r.compacted_through_seq"""
_KNOWN = "ARRAY(SELECT a.path FROM run_archives a WHERE a.run_id = r.run_id) AS known"

_WITHOUT_SORT, _WITH_SORT = text("SET LOCAL enable_sort = off"), text("SET LOCAL enable_sort TO DEFAULT")

_DUE = text(f"""
    SELECT {_COLUMNS}, {_KNOWN}, clock_timestamp() AS now FROM runs r
    WHERE r.ended_at <= now() - make_interval(secs => :older_than_s) AND r.archived_seq < r.last_seq
      AND (r.ended_at, r.run_id) > (:after_at, :after_id) AND r.run_id <> ALL(CAST(:skipped AS uuid[]))
    ORDER BY r.ended_at, r.run_id LIMIT :most FOR NO KEY UPDATE OF r SKIP LOCKED
""")  # noqa: S608 - constants

_ONE = text(f"""
    SELECT {_COLUMNS}, {_KNOWN}, clock_timestamp() AS now FROM runs r WHERE r.run_id = :run_id
    FOR NO KEY UPDATE OF r
""")  # noqa: S608 - constants
"""The instant is read after the snapshot was taken: it lies behind whatever the bundle holds."""

_NUMBER = text(f"""
    WITH numbered AS (
        UPDATE runs SET last_seq = new.seq, archived_seq = new.seq
        FROM json_to_recordset(CAST(:events AS json)) AS new(run_id uuid, seq int) WHERE runs.run_id = new.run_id
    )
    {APPEND_EVENTS}
""")  # noqa: S608 - constants

_RECORD = text("""
    INSERT INTO run_archives (archive_id, run_id, workspace_id, path, sha256, size_bytes, schema_version, last_seq,
                              compacted_through_seq, created_at)
    SELECT archive_id, run_id, workspace_id, path, sha256, size_bytes, schema_version, last_seq,
           compacted_through_seq, CAST(:created_at AS timestamptz)
    FROM json_to_recordset(CAST(:archives AS json))
        AS a(archive_id uuid, run_id uuid, workspace_id uuid, path text, sha256 text, size_bytes int,
             schema_version int, last_seq int, compacted_through_seq int)
""")


async def create_checkpoints(
    database: Database,
    folder: Folder,
    older_than_s: float,
    *,
    most: int = BATCH,
    after: Cursor = START,
    skipped: Collection[uuid.UUID] = (),
    at: At = unwatched,
) -> Batch:
    """Bundle the next final runs that ended at least so long ago and have no bundle of what they are now.

    Raises FolderFault, and Unbundled for a run to be skipped; nothing was written about any run of the batch then.
    """
    parameters = {
        "older_than_s": older_than_s,
        "after_at": after.ended_at,
        "after_id": after.run_id,
        "skipped": list(skipped),
        "most": most,
    }
    for attempt in range(MOST_RETRIES + 1):
        try:
            async with database.snapshot() as connection:
                found = await select_in_order(connection, _DUE, parameters)
                batch = await _bundle(connection, folder, _bounded(found), after, at)
            break
        except DBAPIError as fault:  # another archiver committed one of these runs after this snapshot was taken
            if getattr(fault.orig, "sqlstate", None) != SERIALIZATION_FAILURE or attempt == MOST_RETRIES:
                raise
    if batch.made:
        at("committed")
    return batch


async def create_checkpoint(database: Database, folder: Folder, run_id: uuid.UUID, *, at: At = unwatched) -> Batch:
    """Bundle one final run, whenever it ended; an empty batch when it has a bundle of what it is now.

    Raises NotFound, IllegalState for a run that has not ended, FolderFault and Unbundled.
    """
    async with database.snapshot() as connection:
        row = (await connection.execute(_ONE, {"run_id": run_id})).first()
        if row is None:
            raise NotFound("no such run")
        if row.ended_at is None:
            raise IllegalState(f"the run is {row.status}: only a run that has ended can be archived")
        batch = await _bundle(connection, folder, [row] if row.archived_seq < row.last_seq else [], START, at)
    if batch.made:
        at("committed")
    return batch


async def select_in_order(
    connection: AsyncConnection, statement: TextClause, parameters: Mapping[str, Any]
) -> Sequence[Row[Any]]:
    """Select runs by walking the index on their ends, up to the statement's limit.

    PostgreSQL guesses that few runs are archived, and would rather join and sort all that are left, for each batch.
    """
    await connection.execute(_WITHOUT_SORT)
    found = (await connection.execute(statement, parameters)).all()
    await connection.execute(_WITH_SORT)
    return found


def _bounded(found: Sequence[Row[Any]]) -> list[Row[Any]]:
    """Return the first rows that are not too many together; the others are only unlocked again."""
    taken: list[Row[Any]] = []
    row_count = 0
    for row in found:
        row_count += row.last_seq + row.step_count
        if taken and row_count > MOST_ROWS:
            break
        taken.append(row)
    return taken


async def _bundle(connection: AsyncConnection, folder: Folder, due: Sequence[Row[Any]], after: Cursor, at: At) -> Batch:
    """Number, bundle and record some locked runs, inside the caller's transaction."""
    if not due:
        return Batch([], [], None, after)
    at("claimed")
    created_at: dt.datetime = due[0].now
    paths = {row.run_id: path_of(row.run_id, created_at) for row in due}
    archive_ids = {row.run_id: new_id() for row in due}
    events = [
        NewEvent(
            row.run_id,
            row.last_seq + 1,
            EventType.RUN_ARCHIVED,
            {"archive_id": archive_ids[row.run_id], "path": paths[row.run_id]},
            row.correlation_id,
            row.workspace_id,
        )
        for row in due
    ]
    await connection.execute(_NUMBER, {"events": rows(events), "now": created_at})
    at("numbered")
    await asyncio.to_thread(folder.prepare)
    written = await _write_documents(connection, folder, due, archive_ids, paths, at)
    await asyncio.to_thread(folder.sync)
    made, recorded = [], []
    for row in due:
        file = written[row.run_id]
        each = Made(
            archive_ids[row.run_id],
            row.run_id,
            paths[row.run_id],
            file.sha256,
            file.size_bytes,
            row.last_seq + 1,
            file.swept,
        )
        made.append(each)
        recorded.append(
            {
                **each._asdict(),
                "workspace_id": row.workspace_id,
                "schema_version": SCHEMA_VERSION,
                "compacted_through_seq": row.compacted_through_seq,
            }
        )
    await connection.execute(_RECORD, {"archives": rows(recorded), "created_at": created_at})
    at("recorded")
    return Batch(made, events, created_at, Cursor(due[-1].ended_at, due[-1].run_id))


class _File(NamedTuple):
    """What the transaction needs to know of a bundle's file; the bundle itself is not kept in memory."""

    sha256: str
    size_bytes: int
    swept: list[str]


async def _write_documents(
    connection: AsyncConnection,
    folder: Folder,
    due: Sequence[Row[Any]],
    archive_ids: dict[uuid.UUID, uuid.UUID],
    paths: dict[uuid.UUID, str],
    at: At,
) -> dict[uuid.UUID, _File]:
    """Fetch the documents of the runs, a few at a time, and write and check their files in threads."""
    known = {row.run_id: set(row.known) for row in due}
    asked = [{"run_id": run_id, "archive_id": archive_ids[run_id], "path": path} for run_id, path in paths.items()]

    def write(run_id: uuid.UUID, document: str) -> _File:
        try:
            file = folder.write(run_id, paths[run_id], document.encode(), at)
        except Damaged as reason:
            raise Unbundled(run_id, str(reason)) from None
        return _File(file.sha256, file.size_bytes, folder.sweep(file.bundle, known[run_id]))

    written: dict[uuid.UUID, _File] = {}
    asking = {"archives": rows(asked), "created_at": due[0].now}
    documents = await connection.stream(READ, asking, execution_options={"yield_per": AT_ONCE})
    async for few in documents.partitions():
        # All of them are awaited, whichever fails: no thread may go on writing when the row locks are gone.
        files = await asyncio.gather(*(asyncio.to_thread(write, *row) for row in few), return_exceptions=True)
        for row, file in zip(few, files, strict=True):
            if isinstance(file, BaseException):
                raise file
            written[row.run_id] = file
    return written
