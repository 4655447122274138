"""Idempotency keys: the promise that a create with one key happens once, however often it is sent.

A key is claimed inside the transaction that makes its run, and given back when the create is refused. Who sends it
again gets the first answer; with another body, a refusal. Keys are kept for a day.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import time
import uuid
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import ForeignKey, LargeBinary, text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import Mapped, mapped_column

from service.db import Base, rows
from service.errors import ApiError, InFlight, Invalid
from service.runs import Instant

KEPT_FOR = dt.timedelta(days=1)
"""How long a key is remembered."""

SWEEP_EVERY_S = 60.0
"""How often a process that claims keys forgets the old ones."""

MOST_SWEPT = 10_000
"""Keys forgotten in one sweep, so that no create waits long for it."""


class IdempotencyKey(Base, kw_only=True):
    """A create that has happened."""

    __tablename__ = "idempotency_keys"

    workspace_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("workspaces.workspace_id"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    body_hash: Mapped[bytes] = mapped_column(LargeBinary)
    """SHA-256 of the request's body: the same key with another body is refused."""
    run_id: Mapped[uuid.UUID] = mapped_column(index=True)
    created_at: Mapped[dt.datetime] = mapped_column(Instant, index=True)


class KeyedWrite(NamedTuple):
    """A create that carries a key, and the run that it will make."""

    workspace_id: uuid.UUID
    key: str
    body: bytes
    run_id: uuid.UUID


CLAIM = text("""
    INSERT INTO idempotency_keys (workspace_id, key, body_hash, run_id, created_at)
    SELECT workspace_id, key, decode(body_hash, 'hex'), run_id, now()
    FROM json_to_recordset(CAST(:keys AS json)) AS k(workspace_id uuid, key text, body_hash text, run_id uuid)
    ORDER BY workspace_id, key
    ON CONFLICT DO NOTHING RETURNING run_id
""")
READ = text("""
    SELECT k.workspace_id, k.key, k.body_hash, k.run_id
    FROM json_to_recordset(CAST(:keys AS json)) AS w(workspace_id uuid, key text)
    JOIN idempotency_keys k ON k.workspace_id = w.workspace_id AND k.key = w.key
""")
FREE = text("DELETE FROM idempotency_keys WHERE run_id = ANY(:ids)")
SWEEP = text("""
    DELETE FROM idempotency_keys WHERE (workspace_id, key) IN (
        SELECT workspace_id, key FROM idempotency_keys WHERE created_at < now() - CAST(:kept_for AS interval)
        ORDER BY created_at LIMIT :most FOR UPDATE SKIP LOCKED)
""")


class IdempotencyKeys:
    """Claims keys for one process's groups of writes."""

    def __init__(self) -> None:
        self._sweep_at = float("-inf")

    async def claim(
        self, connection: AsyncConnection, writes: Sequence[KeyedWrite]
    ) -> dict[uuid.UUID, uuid.UUID | ApiError]:
        """Claim the keys; returns, by the run they would make, those that were claimed before.

        A value is the run that a key has made, or the refusal. A key that another transaction is just claiming is
        waited for: it is short.
        """
        known: dict[uuid.UUID, uuid.UUID | ApiError] = {}
        first: dict[tuple[uuid.UUID, str], KeyedWrite] = {}
        for write in writes:
            if first.setdefault((write.workspace_id, write.key), write) is not write:
                known[write.run_id] = InFlight("a request with this Idempotency-Key is being worked on; try again")
        if not first:
            return known
        await self._sweep(connection)
        wanted = rows(
            {"workspace_id": w.workspace_id, "key": w.key, "body_hash": _hash(w.body).hex(), "run_id": w.run_id}
            for w in first.values()
        )
        claimed = set((await connection.execute(CLAIM, {"keys": wanted})).scalars())
        if len(claimed) < len(first):
            for row in await connection.execute(READ, {"keys": wanted}):
                write = first[row.workspace_id, row.key]
                if write.run_id in claimed:
                    continue
                same = row.body_hash == _hash(write.body)
                known[write.run_id] = row.run_id if same else _used()
        return known

    async def free(self, connection: AsyncConnection, run_ids: list[uuid.UUID]) -> None:
        """Give back the keys of creates that were refused: they may be tried again."""
        await connection.execute(FREE, {"ids": run_ids})

    async def _sweep(self, connection: AsyncConnection) -> None:
        if time.monotonic() >= self._sweep_at:
            self._sweep_at = time.monotonic() + SWEEP_EVERY_S
            await connection.execute(SWEEP, {"kept_for": KEPT_FOR, "most": MOST_SWEPT})


def _hash(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()


def _used() -> Invalid:
    return Invalid("Idempotency-Key", "was used with another body; choose a new key")
