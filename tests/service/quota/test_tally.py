"""Gathering: what is counted reaches the table once, also when its process is stopped at an awkward moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.db import Database
from service.quota.limits import Limit
from service.quota.tally import Tally

MAKE = text("CREATE TABLE tallied (revision int, limit_name text, asked bigint, late bigint)")
ADD = text("""
    INSERT INTO tallied SELECT * FROM json_to_recordset(CAST(:counts AS json))
        AS n(revision int, limit_name text, asked bigint, late bigint)
""")


class Slow(Database):
    """A database that lets nobody begin before the gate is open."""

    def __init__(self, url: str) -> None:
        super().__init__(url, pool_size=1)
        self.asked = asyncio.Event()
        self.gate = asyncio.Event()

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        self.asked.set()
        await self.gate.wait()
        async with super().begin() as connection:
            yield connection


@pytest.fixture
async def slow(database: Database, database_url: str) -> AsyncIterator[Slow]:
    async with database.begin() as connection:
        await connection.execute(MAKE)
    opened = Slow(database_url)
    yield opened
    await opened.close()
    async with database.begin() as connection:
        await connection.execute(text("DROP TABLE tallied"))


async def written(database: Database) -> list[tuple[int, str, int, int]]:
    async with database.read() as connection:
        return [tuple(row) for row in await connection.execute(text("SELECT * FROM tallied ORDER BY asked DESC"))]


async def test_what_is_being_written_when_the_process_stops_is_written_once_and_so_is_what_came_meanwhile(
    database: Database, slow: Slow
) -> None:
    tally = Tally(slow, ADD, ("asked", "late"), add_every_s=0)
    tally.add(2, Limit.TICK, 3, 1)
    tally.add(2, Limit.TICK, 2, 0)
    await slow.asked.wait()
    tally.add(2, Limit.TICK, 1, 0)
    closed = asyncio.create_task(tally.close())
    await asyncio.sleep(0)
    slow.gate.set()
    await closed
    assert await written(database) == [(2, "tick", 5, 1), (2, "tick", 1, 0)]


async def test_a_process_that_stops_does_not_wait_for_its_next_turn_to_write(database: Database, slow: Slow) -> None:
    slow.gate.set()
    tally = Tally(slow, ADD, ("asked", "late"), add_every_s=3600)
    tally.add(1, Limit.RUN_CREATION, 1, 1)
    await tally.close()
    assert await written(database) == [(1, "run_creation", 1, 1)]


async def test_amounts_that_do_not_fit_the_columns_are_a_bug(slow: Slow) -> None:
    tally = Tally(slow, ADD, ("asked", "late"), add_every_s=0)
    with pytest.raises(ValueError, match="zip"):
        tally.add(1, Limit.TICK, 1)
