"""The way to PostgreSQL: one engine, the base of all mapped types, and the migrations.

Hot paths send a whole batch as one statement: `rows` hands any number of rows to PostgreSQL as one bound JSON
document, which `json_to_recordset` unfolds there. Python's work per statement is what costs (docs/decisions/0002),
so a statement is shared by all rows of a batch. Nothing here knows what a run is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import asyncpg
import msgspec
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, MetaData, Text, TextClause, event, text
from sqlalchemy.exc import DBAPIError, DisconnectionError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, MappedAsDataclass

from service.settings import sqlalchemy_url


class Base(MappedAsDataclass, DeclarativeBase):
    """Base of the mapped types; each is defined beside the rules that govern it."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {str: Text}  # PostgreSQL's text is as fast as varchar(n)
    metadata = MetaData(
        naming_convention={
            "pk": "%(table_name)s_pkey",
            "fk": "%(table_name)s_%(column_0_name)s_fkey",
            "ix": "%(table_name)s_%(column_0_N_name)s_idx",
            "uq": "%(table_name)s_%(column_0_N_name)s_key",
            "ck": "%(table_name)s_%(constraint_name)s_check",
        }
    )


COMMAND_TIMEOUT_S = 30.0
"""Longest wait for one statement of a request or a tick; a hung server must not hold them for ever."""

POOL_TIMEOUT_S = 10.0
"""Longest wait for a connection of a pool."""


class Database:
    """A pool of connections to one PostgreSQL database."""

    def __init__(
        self, database_url: str, pool_size: int = 8, command_timeout_s: float | None = COMMAND_TIMEOUT_S
    ) -> None:
        self.pool_size = pool_size
        settings: dict[str, Any] = {
            "timeout": 5,
            "command_timeout": command_timeout_s,
            "server_settings": {
                "timezone": "UTC",
                "application_name": "plimsoll",
                "jit": "off",
                # Every statement reads by an index. Plans are kept, and one made while a table was small would
                # go on scanning it when it has grown.
                "enable_seqscan": "off",
                # One plan for any number of rows in a batch. Made anew for each small batch, a plan costs more than
                # the statement.
                "plan_cache_mode": "force_generic_plan",
            },
        }
        self.engine: AsyncEngine = create_async_engine(
            sqlalchemy_url(database_url),
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=POOL_TIMEOUT_S,
            hide_parameters=True,  # errors are logged; what callers sent and the hashes of tokens are not
            connect_args=settings,
        )
        address = self.engine.dialect.create_connect_args(self.engine.url)[1]
        self.driver_arguments: dict[str, Any] = {**address, **settings}  # for a connection without SQLAlchemy
        event.listen(self.engine.sync_engine, "checkout", _refuse_closed)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction; it commits at the end of the block and rolls back on an error."""
        async with self.engine.begin() as connection:
            yield connection

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction that sees the database as it stood at its first statement, plus what itself writes.

        A row that was changed since cannot be locked or written: PostgreSQL refuses with SQLSTATE 40001.
        """
        async with self.engine.connect() as connection:
            await connection.execution_options(isolation_level="REPEATABLE READ")
            async with connection.begin():
                yield connection

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """Open a connection for single statements, each its own transaction (no BEGIN and COMMIT on the wire)."""
        async with self.engine.connect() as connection:
            yield await connection.execution_options(isolation_level="AUTOCOMMIT")

    async def warm(self, statements: Sequence[tuple[TextClause, dict[str, Any]]]) -> None:
        """Open every connection of the pool and let each prepare these statements, so that no caller waits for it.

        The statements are executed: give parameters with which they change nothing.
        """

        async def warm_one(everyone_has_one: asyncio.Barrier) -> None:
            async with self.engine.begin() as connection:
                await everyone_has_one.wait()  # a connection given back early would be handed out again
                for statement, parameters in statements:
                    await connection.execute(statement, parameters)

        async with asyncio.TaskGroup() as group:
            barrier = asyncio.Barrier(self.pool_size)
            for _ in range(self.pool_size):
                group.create_task(warm_one(barrier))

    async def close(self) -> None:
        """Close every connection."""
        await self.engine.dispose()


def _refuse_closed(_connection: Any, record: Any, _proxy: Any) -> None:
    """Have the pool replace a connection that the server has closed meanwhile: the driver knows without asking it.

    A restart of PostgreSQL leaves every resting connection closed; each would fail one request, long after.
    """
    if record.driver_connection.is_closed():
        raise DisconnectionError("the server closed this connection while it rested")


def rows(batch: Iterable[Any]) -> str:
    """Encode rows (dicts or structs) as the one JSON parameter of a set statement."""
    return msgspec.json.encode(list(batch)).decode()


_OUTAGE_CLASSES = ("08", "53", "57P")
"""SQLSTATE beginnings: connection exceptions, insufficient resources, shutting down or starting up (appendix A)."""


def is_outage(error: BaseException) -> bool:
    """Tell whether an error means that the database cannot be reached, rather than that a statement is wrong."""
    if isinstance(error, DBAPIError) and (
        error.connection_invalidated or str(getattr(error.orig, "sqlstate", None)).startswith(_OUTAGE_CLASSES)
    ):
        return True
    if isinstance(error, asyncpg.PostgresError):
        return str(error.sqlstate).startswith(_OUTAGE_CLASSES)
    # A database that hangs shows first as a pool in which no connection comes back.
    return isinstance(error, (InterfaceError, OperationalError, PoolTimeout, asyncpg.InterfaceError, OSError))


def cannot_be_stored(error: DBAPIError) -> bool:
    """Tell whether PostgreSQL refused the values themselves.

    Source: PostgreSQL manual, appendix A: class 22 is "data exception", class 54 "program limit exceeded".
    """
    return str(getattr(error.orig, "sqlstate", None))[:2] in ("22", "54")


def migrate(database_url: str) -> None:
    """Bring the schema up to date. Safe when several processes do it at once: an advisory lock orders them."""

    def upgrade(connection: Connection) -> None:
        connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('plimsoll.migrate'))"))
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")

    async def run() -> None:
        # A migration may build an index for hours, or wait until another process has built it.
        database = Database(database_url, pool_size=1, command_timeout_s=None)
        try:
            async with database.begin() as connection:
                await connection.run_sync(upgrade)
        finally:
            await database.close()

    asyncio.run(run())
