"""A tally: what one process counted for each limit of a revision, gathered and added to the database's sums in turns.

Counts are figures to judge by. No request waits for them or suffers for them: while the database is away they are kept,
a few numbers for each limit, and a process that is killed loses those of its last moment. What is counted, and into
which table it goes, is the kind's: `shadow.ShadowTally`, `recalibration_counts.RequestTally`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import structlog
from sqlalchemy import TextClause

from service.db import Database, rows
from service.quota.limits import Limit

log = structlog.get_logger()


class Tally:
    """Gathers one process's counts and adds them to the database's sums."""

    def __init__(self, database: Database, statement: TextClause, columns: Sequence[str], add_every_s: float) -> None:
        """Take the statement that adds `:counts`, rows of revision, limit_name and these columns, as JSON."""
        self._database = database
        self._statement = statement
        self._columns = columns
        self._add_every_s = add_every_s
        self._amounts: dict[tuple[int, Limit], list[int]] = {}
        self._task: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def add(self, revision: int, limit: Limit, *amounts: int) -> None:
        """Take one request's amounts, in the columns' order; they are in the database soon."""
        sums = self._amounts.setdefault((revision, limit), [0] * len(self._columns))
        sums[:] = [one + other for one, other in zip(sums, amounts, strict=True)]
        if self._task is None:
            name = f"add {type(self).__name__}"
            self._task = asyncio.get_running_loop().create_task(self._write_soon(), name=name)

    async def close(self) -> None:
        """Write what is left, once; what is being written is waited for."""
        self._closing.set()
        if self._task is not None:
            await self._task

    async def _write_soon(self) -> None:
        while self._amounts:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), self._add_every_s)
            last = self._closing.is_set()
            await self._write()
            if last:
                break
        self._task = None

    async def _write(self) -> None:
        taken, self._amounts = self._amounts, {}
        counts = [
            {"revision": revision, "limit_name": limit, **dict(zip(self._columns, amounts, strict=True))}
            for (revision, limit), amounts in taken.items()
        ]
        try:
            async with self._database.begin() as connection:
                await connection.execute(self._statement, {"counts": rows(counts)})
        except Exception as fault:  # a figure to judge by; no request may suffer for it
            log.warning("counts are added later", tally=type(self).__name__, fault=str(getattr(fault, "orig", fault)))
            for key, amounts in taken.items():
                kept = self._amounts.setdefault(key, [0] * len(amounts))
                kept[:] = [one + other for one, other in zip(kept, amounts, strict=True)]
