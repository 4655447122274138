"""The schema is what the types say, whoever migrates it."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError, InternalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from service.archive import RunArchive
from service.db import Base, Database, is_outage, migrate
from service.embedded import Stack
from service.quota.recalibration_record import QuotaRecalibration
from tests.campaigns.faultproxy import Fault, FaultProxy, behind, socket_of

EVERY_TABLE = {
    "agents", "events", "idempotency_keys", "quota_changes", "quota_overrides", "quota_recalibrations",
    "quota_request_counts", "quota_revisions", "quota_shadow_counts", "run_archives", "runs", "steps",
    "subrun_groups", "tokens", "tool_calls", "tool_definitions", "workspaces",
}  # fmt: skip


async def test_the_migrations_make_exactly_the_mapped_tables(database: Database) -> None:
    def differences(connection: Connection) -> object:
        return compare_metadata(MigrationContext.configure(connection), Base.metadata)

    assert {RunArchive.__tablename__, QuotaRecalibration.__tablename__} < EVERY_TABLE
    assert set(Base.metadata.tables) == EVERY_TABLE
    async with database.begin() as connection:
        assert await connection.run_sync(differences) == []


async def test_several_processes_may_migrate_at_once(database_url: str) -> None:
    await asyncio.gather(*(asyncio.to_thread(migrate, database_url) for _ in range(3)))


async def test_connections_that_the_server_closed_while_they_rested_are_replaced(database: Database) -> None:
    await database.warm([(text("SELECT 1"), {})])
    async with database.read() as connection:
        await connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
    await asyncio.sleep(0.1)
    for _ in range(database.pool_size):
        async with database.read() as connection:
            assert (await connection.execute(text("SELECT 1"))).scalar_one() == 1


async def test_a_pool_that_is_exhausted_counts_as_an_outage(database_url: str) -> None:
    database = Database(database_url, pool_size=1)
    database.engine.sync_engine.pool._timeout = 0.05  # type: ignore[attr-defined]
    async with database.read() as connection:
        await connection.execute(text("SELECT 1"))
        with pytest.raises(PoolTimeout) as caught:
            async with database.begin():
                pass
    assert is_outage(caught.value)
    await database.close()


async def test_an_error_does_not_tell_the_parameters_of_its_statement(database: Database) -> None:
    async with database.read() as connection:
        with pytest.raises(DBAPIError) as caught:
            await connection.execute(text("SELECT 1 / 0, :secret"), {"secret": "plim_secret"})
    assert "plim_secret" not in str(caught.value)


async def test_after_one_dead_connection_the_others_cost_nobody_a_wait(stack: Stack, database_url: str) -> None:
    async with FaultProxy(socket_of(stack)) as proxy:
        database = Database(behind(proxy, database_url), pool_size=4, statement_timeout_s=0.1)
        await database.warm([(text("SELECT 1"), {})])
        proxy.switch(Fault.BLACKHOLE, new=False)

        with pytest.raises(TimeoutError) as caught:
            async with database.begin() as connection:
                await connection.execute(text("SELECT 1"))
        assert is_outage(caught.value)

        # Each of the others is as dead. None may be waited for, neither for an answer nor for its consent to end.
        for _ in range(database.pool_size):
            async with database.read() as connection:
                assert (await connection.execute(text("SELECT 1"))).scalar_one() == 1
        await database.close()


async def test_a_transaction_whose_client_is_gone_gives_its_locks_back(stack: Stack, database_url: str) -> None:
    direct = Database(database_url, pool_size=1)
    async with direct.begin() as connection:
        await connection.execute(text("CREATE TABLE held AS SELECT 1 AS row"))
    async with FaultProxy(socket_of(stack), forget_s=3600) as proxy:
        database = Database(behind(proxy, database_url), pool_size=1, statement_timeout_s=0.2)
        async with database.engine.connect() as connection:
            await connection.execute(text("SELECT * FROM held FOR UPDATE"))
            proxy.switch(Fault.BLACKHOLE)
            with pytest.raises(TimeoutError):
                await connection.execute(text("SELECT 1"))
        async with direct.begin() as connection:
            assert (await connection.execute(text("SELECT row FROM held FOR UPDATE"))).scalar_one() == 1
        await database.close()
    await direct.close()


async def test_a_statement_that_takes_too_long_is_an_outage_and_its_connection_lives(database_url: str) -> None:
    database = Database(database_url, pool_size=1, statement_timeout_s=0.1)
    pid = text("SELECT pg_backend_pid()")
    async with database.read() as connection:
        before = (await connection.execute(pid)).scalar_one()
        with pytest.raises(DBAPIError) as caught:
            await connection.execute(text("SELECT pg_sleep(3600)"))
    assert is_outage(caught.value)
    async with database.read() as connection:
        assert (await connection.execute(pid)).scalar_one() == before
    await database.close()


def test_a_statement_between_the_servers_farewell_and_its_end_is_an_outage() -> None:
    confused = asyncpg.InternalClientError("cannot switch to state 11; another operation (2) is in progress")
    translated = RuntimeError("as the dialect says it")
    translated.__cause__ = confused
    assert is_outage(confused)
    assert is_outage(InternalError("SELECT 1", {}, translated))
    assert not is_outage(InternalError("SELECT 1", {}, RuntimeError("a bug")))


async def test_a_transaction_in_the_middle_of_a_question_gives_its_locks_back(stack: Stack, database_url: str) -> None:
    """The server waits for the second half: it counts neither as idle nor as busy."""
    direct = Database(database_url, pool_size=1, statement_timeout_s=30)
    async with direct.begin() as connection:
        await connection.execute(text("CREATE TABLE held AS SELECT 1 AS row"))
    async with FaultProxy(socket_of(stack), forget_s=3600) as proxy:
        database = Database(behind(proxy, database_url), pool_size=1, statement_timeout_s=0.2)
        async with database.engine.connect() as connection:
            await connection.execute(text("SELECT * FROM held FOR UPDATE"))
            driver = (await connection.get_raw_connection()).driver_connection
            assert driver is not None
            proxy.switch(Fault.HALF_OPEN_TO_CLIENT)
            asking = asyncio.create_task(driver.prepare("SELECT 2", timeout=3600))
            async with direct.begin() as other:
                assert (await other.execute(text("SELECT row FROM held FOR UPDATE"))).scalar_one() == 1
            assert not asking.done()
            await connection.invalidate()
            await asyncio.gather(asking, return_exceptions=True)
        await database.close()
    await direct.close()
