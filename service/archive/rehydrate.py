"""From a bundle back to rows: into the place of a purged run, or into another database.

Names of columns come from a file, so each is looked up among the columns of the mapped types; values go to PostgreSQL
as one bound JSON parameter. A column that the bundle does not know yet gets its default.

Only who can reach the database and the archive folder may rehydrate: there is a command and no endpoint, and a run
comes back into the workspace that it was of. So a file cannot carry a run, or a part of it, to another tenant.
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import Sequence
from pathlib import Path

import msgspec
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.archive.bundle import OWNERS, PARTS, Bundle, Damaged, Row
from service.archive.folder import Folder, read_anywhere
from service.db import Base, Database, cannot_be_stored
from service.errors import IllegalState, NotFound

_ALONE = text("SELECT pg_advisory_xact_lock(hashtextextended('plimsoll.rehydrate.' || CAST(:run_id AS text), 0))")
"""Of several that restore one run at once, the others wait and then find it there: its row cannot be locked yet."""

_STATE = text("""
    SELECT EXISTS (SELECT FROM runs WHERE run_id = :run_id) AS present,
           (SELECT max(last_seq) FROM run_archives WHERE run_id = :run_id) AS newest_seq,
           (SELECT sha256 FROM run_archives WHERE archive_id = :archive_id) AS sha256,
           (SELECT min(name) FROM (
                SELECT 'agent' AS name, workspace_id FROM agents WHERE agent_id = :agent_id UNION ALL
                SELECT 'parent', workspace_id FROM runs WHERE run_id = :parent_run_id UNION ALL
                SELECT 'recorded bundle', workspace_id FROM run_archives WHERE run_id = :run_id
            ) AS kin WHERE workspace_id <> :workspace_id) AS elsewhere,
           CAST(:parent_run_id AS uuid) IS NULL OR EXISTS (SELECT FROM runs WHERE run_id = :parent_run_id) AS has_parent
""")

_RECORD = text("""
    INSERT INTO run_archives (archive_id, run_id, workspace_id, path, sha256, size_bytes, schema_version, last_seq,
                              compacted_through_seq, created_at)
    VALUES (:archive_id, :run_id, :workspace_id, :path, :sha256, :size_bytes, :schema_version, :last_seq,
            :compacted_through_seq, :created_at)
    ON CONFLICT (archive_id) DO UPDATE SET compacted_types = '{}'
""")


async def rehydrate(database: Database, folder: Folder, file: Path) -> uuid.UUID:
    """Restore the run whose bundle is in `file` and return its id; all of it or nothing.

    Restored are the run, its rows and, where they are absent, its workspace, its agent and the bundle's own row, with
    the file in its place in the archive folder. Raises Damaged, FolderFault, NotFound for an absent parent, and
    IllegalState when the run is there already or a newer bundle of it is known.
    """
    content, bundle = await asyncio.to_thread(read_anywhere, file)
    header, head = bundle.header, bundle.head
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        async with database.begin() as connection:
            await _require_room(connection, bundle, sha256)
            await asyncio.to_thread(folder.put, head.run_id, header.path, content)
            for owner in OWNERS:
                await _insert(connection, owner.table, [bundle.owners[owner.name]], absent_only=True)
            await _insert(connection, "runs", [bundle.run])
            for part in PARTS:
                await _insert(connection, part.table, bundle.parts.get(part.table, []))
            await connection.execute(
                _RECORD,
                {
                    "archive_id": header.archive_id,
                    "run_id": head.run_id,
                    "workspace_id": head.workspace_id,
                    "path": header.path,
                    "sha256": sha256,
                    "size_bytes": len(content),
                    "schema_version": bundle.schema_version,
                    "last_seq": header.last_seq,
                    "compacted_through_seq": head.compacted_through_seq,
                    "created_at": header.created_at,
                },
            )
    except DBAPIError as fault:
        if isinstance(fault, IntegrityError) or cannot_be_stored(fault):
            raise Damaged(f"{file} holds what the database refuses: {_first_line(fault)}") from None
        raise
    return head.run_id


async def _require_room(connection: AsyncConnection, bundle: Bundle, sha256: str) -> None:
    """Raise unless the run can come back as it was: absent, all of its kin here in its own workspace, its parent
    present, and no newer bundle known.
    """
    head = bundle.head
    asked = {
        "run_id": head.run_id,
        "archive_id": bundle.header.archive_id,
        "parent_run_id": head.parent_run_id,
        "agent_id": head.agent_id,
        "workspace_id": head.workspace_id,
    }
    await connection.execute(_ALONE, {"run_id": str(head.run_id)})
    state = (await connection.execute(_STATE, asked)).one()
    if state.present:
        raise IllegalState(f"run {head.run_id} is in the database: only a run that is not can be rehydrated")
    if state.newest_seq is not None and state.newest_seq > head.last_seq:
        raise IllegalState(f"run {head.run_id} has a newer bundle, with events up to {state.newest_seq}: take that one")
    if state.sha256 is not None and state.sha256 != sha256:
        raise Damaged(f"bundle {bundle.header.archive_id} does not have the recorded hash")
    if state.elsewhere is not None:
        raise Damaged(f"the run is said to be of workspace {head.workspace_id}, and its {state.elsewhere} is another's")
    if not state.has_parent:
        raise NotFound(f"the run that spawned it is not in the database: rehydrate {head.parent_run_id} first")


async def _insert(connection: AsyncConnection, table: str, rows: Sequence[Row], *, absent_only: bool = False) -> None:
    """Insert rows as a bundle holds them; raises Damaged for a column that the table does not have."""
    if not rows:
        return
    columns = list(rows[0])
    if any(list(row) != columns for row in rows):
        raise Damaged(f"{table}: its rows do not have the same columns")
    if unknown := set(columns) - {column.name for column in Base.metadata.tables[table].columns}:
        raise Damaged(f"{table}: the database has no column {min(unknown)!r}; migrate it to the bundle's version")
    names = ", ".join(f'"{name}"' for name in columns)
    conflict = "ON CONFLICT DO NOTHING" if absent_only else ""
    statement = text(
        f"INSERT INTO {table} ({names}) SELECT {names}"  # noqa: S608 - names of mapped tables and columns
        f" FROM json_populate_recordset(CAST(NULL AS {table}), CAST(:rows AS json)) {conflict}"
    )
    await connection.execute(statement, {"rows": msgspec.json.encode(rows).decode()})


def _first_line(fault: DBAPIError) -> str:
    return str(fault.orig).strip().splitlines()[0]
