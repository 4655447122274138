"""Questions put by the driver itself meet a database that comes and goes like any other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest
from sqlalchemy import text

from service.db import Database, is_outage
from service.direct import Direct
from service.embedded import Stack
from tests.campaigns.faultproxy import Fault, FaultProxy, behind, socket_of

CUT = text("""
    SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
    WHERE datname = current_database() AND query LIKE :query AND pid <> pg_backend_pid()
""")


@pytest.fixture
async def direct(database: Database) -> AsyncIterator[Direct]:
    opened = Direct(database, 2)
    yield opened
    await opened.close()


async def cut(database: Database, query: str) -> None:
    """End the connection whose last query is like that, as soon as there is one."""
    async with database.read() as connection:
        for _ in range(1_000):
            if (await connection.execute(CUT, {"query": query})).scalar_one():
                return
            await asyncio.sleep(0.01)
    pytest.fail("nobody asked that")


async def asking(database: Database, query: str) -> None:
    """Return when a query like that is being worked on."""
    under_way = text("SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE :query")
    async with database.read() as connection:
        for _ in range(1_000):
            if (await connection.execute(under_way, {"query": query})).scalar_one():
                return
            await asyncio.sleep(0.01)
    pytest.fail("nobody asked that")


async def test_more_questions_than_connections_are_all_answered(direct: Direct) -> None:
    answers = await asyncio.gather(*(direct.fetch("SELECT $1::int AS n, pg_sleep(0.01)", n) for n in range(9)))
    assert [[row["n"] for row in rows] for rows in answers] == [[n] for n in range(9)]


async def test_a_connection_has_the_settings_of_all_others(direct: Direct) -> None:
    rows = await direct.fetch("SELECT current_setting('TimeZone'), current_setting('application_name')")
    assert [tuple(row) for row in rows] == [("UTC", "plimsoll")]


async def test_a_connection_that_the_server_closed_while_it_rested_is_replaced(
    direct: Direct, database: Database
) -> None:
    ((before,),) = await direct.fetch("SELECT pg_backend_pid() AS resting")
    await cut(database, "%AS resting%")
    await asyncio.sleep(0.1)
    ((after,),) = await direct.fetch("SELECT pg_backend_pid() AS resting")
    assert after != before


async def test_a_question_whose_connection_is_cut_is_an_outage_and_the_next_one_is_answered(
    direct: Direct, database: Database
) -> None:
    question = asyncio.create_task(direct.fetch("SELECT pg_sleep(60)"))
    await cut(database, "%pg_sleep(60)%")
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError)) as caught:
        await question
    assert is_outage(caught.value)
    assert [tuple(row) for row in await direct.fetch("SELECT 1")] == [(1,)]


async def test_a_question_that_is_given_up_leaves_no_answer_for_the_next_one(database: Database) -> None:
    direct = Direct(database, 1)
    question = asyncio.create_task(direct.fetch("SELECT 1 FROM pg_sleep(60)"))
    await asking(database, "%FROM pg_sleep(60)%")
    question.cancel()
    assert [tuple(row) for row in await direct.fetch("SELECT 2")] == [(2,)]
    with pytest.raises(asyncio.CancelledError):
        await question
    await direct.close()


async def test_a_statement_is_prepared_anew_when_what_it_reads_was_changed(direct: Direct, database: Database) -> None:
    async def change(statement: str) -> None:
        async with database.begin() as connection:
            await connection.execute(text(statement))

    await change("CREATE TABLE changing AS SELECT 1 AS n")
    assert [tuple(row) for row in await direct.fetch("SELECT * FROM changing")] == [(1,)]
    await change("ALTER TABLE changing ALTER n TYPE text")
    with pytest.raises(asyncpg.PostgresError):
        await direct.fetch("SELECT * FROM changing")
    assert [tuple(row) for row in await direct.fetch("SELECT * FROM changing")] == [("1",)]
    await change("DROP TABLE changing")


async def test_closing_ends_a_question_that_is_still_asked(direct: Direct, database: Database) -> None:
    question = asyncio.create_task(direct.fetch("SELECT 3 FROM pg_sleep(60)"))
    await asking(database, "%3 FROM pg_sleep(60)%")
    await direct.close()
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await question


async def test_a_statement_that_is_wrong_is_no_outage(direct: Direct) -> None:
    with pytest.raises(asyncpg.PostgresError) as caught:
        await direct.fetch("SELECT 1 / 0")
    assert not is_outage(caught.value)


async def test_after_one_dead_connection_the_others_cost_nobody_a_wait(stack: Stack, database_url: str) -> None:
    async with FaultProxy(socket_of(stack)) as proxy:
        database = Database(behind(proxy, database_url), statement_timeout_s=0.2)
        direct = Direct(database, 2)
        await asyncio.gather(*(direct.fetch("SELECT pg_sleep(0.05)") for _ in range(2)))
        proxy.switch(Fault.BLACKHOLE, new=False)

        with pytest.raises(TimeoutError) as caught:
            await direct.fetch("SELECT 1")
        assert is_outage(caught.value)

        answers = await asyncio.gather(*(direct.fetch("SELECT $1::int AS n", n) for n in range(4)))
        assert [rows[0]["n"] for rows in answers] == [0, 1, 2, 3]
        await direct.close()
        await database.close()
