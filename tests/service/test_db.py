"""The schema is what the types say, whoever migrates it."""

from __future__ import annotations

import asyncio

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from service.archive import RunArchive
from service.db import Base, Database, is_outage, migrate

EVERY_TABLE = {
    "agents", "events", "idempotency_keys", "quota_changes", "quota_overrides", "quota_revisions",
    "quota_shadow_counts", "run_archives", "runs", "steps", "subrun_groups", "tokens", "tool_calls",
    "tool_definitions", "workspaces",
}  # fmt: skip


async def test_the_migrations_make_exactly_the_mapped_tables(database: Database) -> None:
    def differences(connection: Connection) -> object:
        return compare_metadata(MigrationContext.configure(connection), Base.metadata)

    assert RunArchive.__tablename__ in EVERY_TABLE
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
