"""Questions put to PostgreSQL by the driver itself, on a path where SQLAlchemy would cost more than the answer.

Only for single statements that read, written in the driver's own form (`$1`, arrays for batches), and only where a
measurement asks for it: for a group of polls it saves three quarters of the process's work (docs/performance.md). All
else goes through `db`.
"""

from __future__ import annotations

from typing import Any

import asyncpg

from service.db import POOL_TIMEOUT_S, Database, lost_the_thread


class Direct:
    """A few connections of one process, kept for such questions; each is opened when it is first needed."""

    def __init__(self, database: Database, connections: int) -> None:
        self._database = database
        self._connections = connections
        self._pool: asyncpg.Pool | None = None

    async def fetch(self, statement: str, *arguments: Any) -> list[Any]:
        """Return a statement's rows; raises what the driver raises (`db.is_outage` knows it)."""
        if self._pool is None:
            self._pool = await asyncpg.create_pool(
                **self._database.driver_arguments,
                min_size=0,
                max_size=self._connections,
                max_inactive_connection_lifetime=0,
                max_cached_statement_lifetime=0,  # prepared once, and kept
                reset=_leave,
            )
        async with self._pool.acquire(timeout=POOL_TIMEOUT_S) as connection:
            try:
                rows: list[Any] = await connection.fetch(statement, *arguments)
            except Exception as fault:
                if isinstance(fault, TimeoutError) or lost_the_thread(fault):
                    await self._give_up(connection)
                raise
            return rows

    async def _give_up(self, dead: Any) -> None:
        """Throw a connection away that does not answer, with all that rest, as `db` does.

        Given back as it is, the pool would wait for its consent for ever, and one lane with it.
        """
        dead.terminate()
        if self._pool is not None:
            await self._pool.expire_connections()

    async def close(self) -> None:
        """Close every connection."""
        if self._pool is not None:
            await self._pool.close()


async def _leave(_connection: Any) -> None:
    """Leave a connection that is given back as it is: a statement that reads changes nothing of it."""
