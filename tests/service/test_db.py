"""The schema is what the types say, whoever migrates it."""

from __future__ import annotations

import asyncio

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection

from service.db import Base, Database, migrate

EVERY_TABLE = {
    "agents",
    "events",
    "idempotency_keys",
    "runs",
    "steps",
    "subrun_groups",
    "tokens",
    "tool_calls",
    "tool_definitions",
    "workspaces",
}


async def test_the_migrations_make_exactly_the_mapped_tables(database: Database) -> None:
    def differences(connection: Connection) -> object:
        return compare_metadata(MigrationContext.configure(connection), Base.metadata)

    assert set(Base.metadata.tables) == EVERY_TABLE
    async with database.begin() as connection:
        assert await connection.run_sync(differences) == []


async def test_several_processes_may_migrate_at_once(database_url: str) -> None:
    await asyncio.gather(*(asyncio.to_thread(migrate, database_url) for _ in range(3)))
