"""The way to PostgreSQL: one engine, the base of all mapped types, and the migrations.

Hot paths send a whole batch as one statement: `rows` hands any number of rows to PostgreSQL as one bound JSON
document, which `json_to_recordset` unfolds there. Python's work per statement is what costs (docs/decisions/0002),
so a statement is shared by all rows of a batch. Nothing here knows what a run is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import asyncpg
import msgspec
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, ExceptionContext, MetaData, Text, TextClause, event, make_url, text
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
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


STATEMENT_TIMEOUT_S = 5.0
"""Longest that one statement of a request or a tick may take (most take milliseconds); PostgreSQL ends it then."""

PATIENT_STATEMENT_TIMEOUT_S = 30.0
"""The same for work in the background, which takes more rows at once."""

NETWORK_GRACE_S = 1.0
"""How much later than PostgreSQL's own answer should have come a connection is given up: it is dead, not slow."""

TRANSACTION_STATEMENTS = 2
"""How many times as long as a statement a whole transaction may take.

A server that waits for the second half of a question counts neither as idle nor as busy, so that neither of the two
bounds on statements ends it; this one does, where the server has it (PostgreSQL 17).
"""

KEEPALIVE = {
    "tcp_keepalives_idle": "10",  # seconds of silence before the server asks whether we live
    "tcp_keepalives_interval": "5",  # seconds between such questions
    "tcp_keepalives_count": "3",  # unanswered questions before it gives us up, with all our locks
    "tcp_user_timeout": "25000",  # the same, in milliseconds, for an answer of its own that nobody takes
}
"""What the server does about a client behind a network that fails without a word; a Unix socket needs none of it."""

CONNECT_TIMEOUT_S = 5.0
"""Longest wait for a new connection to the server."""

POOL_TIMEOUT_S = 10.0
"""Longest wait for a connection of a pool, seconds: longer than a new one may take to open."""


class Database:
    """A pool of connections to one PostgreSQL database."""

    def __init__(
        self, database_url: str, pool_size: int = 8, statement_timeout_s: float | None = STATEMENT_TIMEOUT_S
    ) -> None:
        self.pool_size = pool_size
        longest_ms = "0" if statement_timeout_s is None else str(round(statement_timeout_s * 1000))
        settings: dict[str, Any] = {
            "timeout": CONNECT_TIMEOUT_S,
            "command_timeout": None if statement_timeout_s is None else statement_timeout_s + NETWORK_GRACE_S,
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
                "statement_timeout": longest_ms,
                # A transaction whose client is silent holds locks that others wait for. After this long it is undone,
                # however little the network tells of the client's end.
                "idle_in_transaction_session_timeout": longest_ms,
                **KEEPALIVE,
            },
        }
        self.engine: AsyncEngine = create_async_engine(
            make_url(sqlalchemy_url(database_url)).set(drivername=f"postgresql+{_DRIVER}"),
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=POOL_TIMEOUT_S,
            hide_parameters=True,  # errors are logged; what callers sent and the hashes of tokens are not
            connect_args=settings,
        )
        address = self.engine.dialect.create_connect_args(self.engine.url)[1]
        self.driver_arguments: dict[str, Any] = {**address, **settings}  # for a connection without SQLAlchemy
        if statement_timeout_s is not None:
            longest_s = TRANSACTION_STATEMENTS * statement_timeout_s
            event.listen(self.engine.sync_engine, "connect", partial(_bound_transactions, longest_s))
        event.listen(self.engine.sync_engine, "checkout", _refuse_closed)
        event.listen(self.engine.sync_engine, "handle_error", _give_up_dead)

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


def _bound_transactions(longest_s: float, connection: Any, _record: Any) -> None:
    """Have the server end the session of a transaction that takes too long, if it knows how to."""
    if connection.driver_connection.get_server_version() >= (17,):
        connection.run_async(lambda driver: driver.execute(f"SET transaction_timeout = {round(longest_s * 1000)}"))


def _give_up_dead(context: ExceptionContext) -> None:
    """Have a connection thrown away that did not answer in time, or whose driver no longer knows where it stands.

    To roll back on it would take as long again. What befell one connection has mostly befallen all of them, so the pool
    replaces every one that rests: each would otherwise cost somebody the whole wait.
    """
    if isinstance(context.original_exception, TimeoutError) or lost_the_thread(context.original_exception):
        context.is_disconnect = context.invalidate_pool_on_disconnect = True


_DRIVER = "plimsoll"


class Dialect(PGDialect_asyncpg):
    """SQLAlchemy's own for this driver, but that a connection which is thrown away is not asked to agree.

    It would be waited for, two seconds each, one after the other: those are thrown away that do not answer.
    """

    driver = _DRIVER
    supports_statement_cache = True

    def do_terminate(self, dbapi_connection: Any) -> None:
        """End a connection at once."""
        dbapi_connection.driver_connection.terminate()


registry.register(f"postgresql.{_DRIVER}", __name__, Dialect.__name__)


def rows(batch: Iterable[Any]) -> str:
    """Encode rows (dicts or structs) as the one JSON parameter of a set statement."""
    return msgspec.json.encode(list(batch)).decode()


_OUTAGE_CLASSES = ("08", "53", "57", "25P03", "25P04")
"""SQLSTATE beginnings: connection exceptions, insufficient resources, shutting down, starting up or out of time, and a
transaction ended because its client was silent or because it took too long (appendix A)."""


def is_outage(error: BaseException) -> bool:
    """Tell whether an error means that the database cannot be reached, rather than that a statement is wrong."""
    if isinstance(error, DBAPIError) and (
        error.connection_invalidated or str(getattr(error.orig, "sqlstate", None)).startswith(_OUTAGE_CLASSES)
    ):
        return True
    if isinstance(error, asyncpg.PostgresError):
        return str(error.sqlstate).startswith(_OUTAGE_CLASSES)
    # A database that hangs shows first as a pool in which no connection comes back.
    known = (InterfaceError, OperationalError, PoolTimeout, asyncpg.InterfaceError, OSError)
    return isinstance(error, known) or lost_the_thread(error)


def lost_the_thread(error: BaseException) -> bool:
    """Tell whether the driver calls a statement an internal error of its own.

    It does so between the farewell of a server that was killed and the end of its connection.
    """
    cause = error.orig if isinstance(error, DBAPIError) else error
    return isinstance(cause, asyncpg.InternalClientError) or isinstance(
        getattr(cause, "__cause__", None), asyncpg.InternalClientError
    )


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
        database = Database(database_url, pool_size=1, statement_timeout_s=None)
        try:
            async with database.begin() as connection:
                await connection.run_sync(upgrade)
        finally:
            await database.close()

    asyncio.run(run())
