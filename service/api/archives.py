"""Archives: which bundles a run has, and the bundles themselves.

A purged run is absent everywhere else, and its bundles are still listed and downloaded here. A bundle whose file is
missing or not what was recorded is 410 (asking again will not help); an archive folder that is not there is 503.
"""

from __future__ import annotations

import asyncio
import base64
import uuid
from collections.abc import AsyncIterator
from typing import Any, BinaryIO

from sqlalchemy import text

from service.api.answers import ArchivePage
from service.archive import Damaged, Folder, FolderFault, Stored
from service.archive.folder import PIECE_BYTES
from service.db import Database
from service.errors import Gone, NotFound, Unavailable
from service.exchange import Answer, Exchange, Pieces

# A run is known by its row or, when it was purged, by its bundles; its own row comes first.
LIST = text("""
    SELECT coalesce((SELECT workspace_id FROM runs WHERE run_id = :run_id),
                    (SELECT workspace_id FROM run_archives WHERE run_id = :run_id LIMIT 1)) AS workspace_id,
           (SELECT json_build_object('archives', coalesce(json_agg(json_build_object(
                'archive_id', a.archive_id, 'run_id', a.run_id, 'created_at', a.created_at, 'last_seq', a.last_seq,
                'compacted_through_seq', a.compacted_through_seq, 'schema_version', a.schema_version,
                'sha256', a.sha256, 'size_bytes', a.size_bytes, 'path', a.path,
                'download', '/api/archives/' || a.archive_id || '/download/') ORDER BY a.last_seq DESC), '[]'))
            FROM run_archives a WHERE a.run_id = :run_id)::text AS body
""")

ONE = text("""
    SELECT archive_id, run_id, workspace_id, path, sha256, size_bytes FROM run_archives WHERE archive_id = :archive_id
""")


def download_path(archive_id: uuid.UUID) -> str:
    """Return where a bundle is downloaded."""
    return f"/api/archives/{archive_id}/download/"


def events_gone(compacted_through_seq: int, archive_id: uuid.UUID | None) -> Gone:
    """Return the answer to whoever asks for events of which some were compacted."""
    return Gone(
        f"events up to {compacted_through_seq} are archived: take them from the bundle, or ask with"
        f" since_seq={compacted_through_seq} or more",
        None if archive_id is None else download_path(archive_id),
        compacted_through_seq=compacted_through_seq,
    )


class Archives:
    """The endpoints."""

    def __init__(self, database: Database, folder: Folder) -> None:
        self._database = database
        self._folder = folder

    async def list(self, exchange: Exchange[None]) -> Answer[ArchivePage]:
        """Return a run's bundles, newest first."""
        run_id = exchange.path_id("run_id", "run")
        row = await self._read(exchange, LIST, run_id=run_id)
        if row is None or row.workspace_id is None or not exchange.caller.may_see(row.workspace_id):
            raise NotFound("no such run")
        return Answer(row.body.encode())

    async def download(self, exchange: Exchange[None]) -> Answer[bytes]:
        """Return a bundle's zip, or 304 when the caller has it."""
        archive_id = exchange.path_id("archive_id", "archive")
        row = await self._read(exchange, ONE, archive_id=archive_id)
        if row is None or not exchange.caller.may_see(row.workspace_id):
            raise NotFound("no such archive")
        headers = (
            (b"etag", f'"{row.sha256}"'.encode()),
            (b"cache-control", b"private, no-cache"),
            (b"repr-digest", b"sha-256=:" + base64.b64encode(bytes.fromhex(row.sha256)) + b":"),  # RFC 9530
            (b"content-disposition", f'attachment; filename="{row.path.rpartition("/")[2]}"'.encode()),
        )
        if exchange.has_representation(headers[0][1]):
            return Answer(b"", 304, headers=headers)
        stored = Stored(row.archive_id, row.run_id, row.path, row.sha256, row.size_bytes)
        try:
            file = await asyncio.to_thread(self._folder.open_unharmed, stored)
        except Damaged as reason:
            raise Gone(f"the bundle cannot be given: {reason}") from None
        except FolderFault as fault:
            raise Unavailable("the archives cannot be reached; try again", retry_after_s=60) from fault
        return Answer(content_type=b"application/zip", headers=headers, pieces=Pieces(stored.size_bytes, _pieces(file)))

    async def _read(self, exchange: Exchange[None], statement: Any, **parameters: uuid.UUID) -> Any:
        """Return the first row, or None."""
        with exchange.timed("db_ms"):
            async with self._database.read() as connection:
                return (await connection.execute(statement, parameters)).first()


async def _pieces(file: BinaryIO) -> AsyncIterator[bytes]:
    """Read a file piece by piece, away from the loop, and close it."""
    with file:
        while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
            yield piece
