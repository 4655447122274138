"""Questions put to PostgreSQL by the driver itself, on a path where SQLAlchemy would cost more than the answer.

Only for single statements that read, written in the driver's own form (`$1`, arrays for batches), and only where a
measurement asks for it: for a group of polls it saves most of the process's work, and a statement that stays prepared
on a connection that is simply kept costs half of what the driver's own pool and cache do (docs/performance.md). All
else goes through `db`.
"""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg

from service.db import POOL_TIMEOUT_S, Database, lost_the_thread


class _Line:
    """One connection, and the statements that are prepared on it."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self._prepared: dict[str, Any] = {}

    async def ask(self, statement: str, arguments: tuple[Any, ...]) -> list[Any]:
        prepared = self._prepared.get(statement)
        if prepared is None:
            prepared = self._prepared[statement] = await self.connection.prepare(statement)
        rows: list[Any] = await prepared.fetch(*arguments)
        return rows


class Direct:
    """A few connections of one process, kept for such questions; each is opened when it is first needed."""

    def __init__(self, database: Database, connections: int) -> None:
        self._database = database
        self._free = asyncio.Semaphore(connections)
        self._resting: list[_Line] = []
        self._asking: set[_Line] = set()

    async def fetch(self, statement: str, *arguments: Any) -> list[Any]:
        """Return a statement's rows; raises what the driver raises (`db.is_outage` knows it)."""
        if self._free.locked():
            async with asyncio.timeout(POOL_TIMEOUT_S):
                await self._free.acquire()
        else:
            await self._free.acquire()
        try:
            line = await self._take()
            self._asking.add(line)
            try:
                rows = await line.ask(statement, arguments)
            except Exception as fault:
                if isinstance(fault, TimeoutError) or lost_the_thread(fault):
                    self._give_up()
                if not _is_answer(fault):
                    line.connection.terminate()
                raise
            except BaseException:  # whoever asked has gone; the answer would be taken for that of the next question
                line.connection.terminate()
                raise
            finally:
                self._asking.discard(line)
                if not line.connection.is_closed():
                    self._resting.append(line)
            return rows
        finally:
            self._free.release()

    async def _take(self) -> _Line:
        """Return a connection that rests and lives, or a new one."""
        while self._resting:
            line = self._resting.pop()
            if not line.connection.is_closed():
                return line
        return _Line(await asyncpg.connect(**self._database.driver_arguments))

    def _give_up(self) -> None:
        """Throw away all that rest, as `db` does, after one that did not answer: they go the same dead way."""
        while self._resting:
            self._resting.pop().connection.terminate()

    async def close(self) -> None:
        """Close every connection; a question that is still asked is ended."""
        for line in self._asking:
            line.connection.terminate()
        resting, self._resting = self._resting, []
        for line in resting:
            await line.connection.close()


def _is_answer(fault: Exception) -> bool:
    """Tell whether the server itself said this, so that the connection goes on.

    Not if it said that a plan is out of date: what is prepared on the connection would be refused again.
    """
    return isinstance(fault, asyncpg.PostgresError) and not isinstance(fault, asyncpg.InvalidCachedStatementError)
