"""A worker's looks at the recalibration that is under way: one at a time, in the background of its ticks.

Any number of workers may look at the same time: a turn is one transaction under the lock of all revisions, and whoever
comes second finds that it was taken (`recalibration_record`).
"""

from __future__ import annotations

import asyncio

import structlog

from service.db import PATIENT_STATEMENT_TIMEOUT_S, Database, is_outage
from service.quota.recalibration_record import forget_counts, look

log = structlog.get_logger()

CANCEL_S = 0.8
"""How long a look that is given up may take to let go: a database that hangs need not answer its farewell."""


class Looks:
    """Looks, one at a time."""

    def __init__(self, database_url: str) -> None:
        self._database_url = database_url
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    def ring(self) -> None:
        """Look unless a look is going on; to be called in the loop's own thread."""
        if not self._stopping and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._look(), name="look after recalibration")

    def stop(self) -> None:
        """Begin nothing more."""
        self._stopping = True

    async def idle(self) -> None:
        """Return when no look is going on."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def drain(self, patience_s: float) -> None:
        """Stop and wait for the look at hand; after that long it is given up, which undoes it."""
        self.stop()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=patience_s)
            self._task.cancel()
            await asyncio.wait([self._task], timeout=CANCEL_S)

    async def _look(self) -> None:
        """Take turns until none is due, on a connection of its own, which no tick waits for."""
        database = Database(self._database_url, pool_size=1, statement_timeout_s=PATIENT_STATEMENT_TIMEOUT_S)
        try:
            while not self._stopping and await look(database) is not None:
                continue
            await forget_counts(database)
        except Exception as fault:
            message = "a recalibration was not looked after; the next look finds it as it is"
            if is_outage(fault):
                log.warning(message, fault=str(getattr(fault, "orig", fault)))
            else:
                log.error(message, exc_info=fault)
        finally:
            await database.close()
