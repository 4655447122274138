"""A tenant on a real database of the test's own."""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import redis.asyncio
import structlog
from starlette.applications import Starlette
from starlette.routing import Route
from structlog.testing import LogCapture
from structlog.typing import EventDict

from service.__main__ import main
from service.db import Database
from service.guarded import connect_redis
from service.settings import Settings
from service.tallies import Tallies
from service.tick import Ticker
from service.toolcalls import create_definition
from service.workspaces import Agents
from tests.localserver import serving
from tests.modelendpoint import Endpoint
from tests.tenants import Tenant, open_tenant
from tests.tickhands import Hands
from tests.toolcalls import GUARDED, LAST

Command = Callable[..., tuple[int, str, str]]
"""Runs `python -m service` with these arguments; returns its exit code, standard output and standard error."""


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Run a command in this process; where it logs to is forgotten afterwards, since that is the test's own."""
    before = structlog.get_config()

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        said = capfd.readouterr()
        return code, said.out, said.err

    yield run
    structlog.configure(**before)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A migrated database of the test's own."""
    opened = Database(database_url)
    yield opened
    await opened.close()


@pytest.fixture
async def tenant(database: Database, redis_url: str) -> AsyncIterator[Tenant]:
    """A workspace without limits and its default agent."""
    async with open_tenant(database, redis_url) as opened:
        yield opened


@pytest.fixture
def ticker(tenant: Tenant) -> Ticker:
    """A worker's hands, without the worker."""
    return Ticker(tenant.database, tenant.announcer, Agents(), Tallies(), Settings.lease_s)


@pytest.fixture
def logged() -> Iterator[list[EventDict]]:
    """What the service logs during the test, at any level; none of it is printed."""
    before, capture = structlog.get_config(), LogCapture()
    structlog.configure(processors=[capture], wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET))
    yield capture.entries
    structlog.configure(**before)


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    """A worker's client."""
    async with connect_redis(redis_url) as opened:
        yield opened


@pytest.fixture
async def hands(tenant: Tenant, client: redis.asyncio.Redis) -> Hands:
    """A worker's hands."""
    return Hands(tenant, client)


@pytest.fixture
async def guarded(tenant: Tenant) -> uuid.UUID:
    """An agent whose first step calls a tool that needs an operator's approval."""
    async with tenant.database.begin() as connection:
        await create_definition(connection, tenant.workspace_id, "guarded", "echo", "ELEVATED")
    return await tenant.agent(GUARDED, LAST)


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    """A local endpoint."""
    made = Endpoint()
    async with serving(Starlette(routes=[Route("/v1/chat/completions", made.answer, methods=["POST"])])) as url:
        made.url = url
        yield made
