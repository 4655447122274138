"""A real worker process that is killed or stopped while a tool runs: the tool is started once, its run goes on."""

from __future__ import annotations

import asyncio
import itertools
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from service.db import Database
from service.outside import INTERRUPTED
from service.toolcalls import UNKNOWN_END, create_definition
from tests.localserver import serving
from tests.tenants import Tenant, open_tenant

pytestmark = pytest.mark.acceptance

StartWorker = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start_worker(service_environment: dict[str, str]) -> Iterator[StartWorker]:
    """Return a function that starts a worker process; whatever still runs at the end of the test is ended."""
    started: list[subprocess.Popen[bytes]] = []

    def start(**environment: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "service", "worker"]
        process = subprocess.Popen(command, env={**service_environment, **environment})  # noqa: S603 - our own
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@dataclass
class Sink:
    """A server that counts how often it was asked for each path, and answers when it is let."""

    url: str
    asked: dict[str, int]
    answering: asyncio.Event


@pytest.fixture
async def sink() -> AsyncIterator[Sink]:
    """A place where a tool has its effect."""
    asked: dict[str, int] = {}
    answering = asyncio.Event()

    async def effect(request: Request) -> Response:
        asked[request.url.path] = asked.get(request.url.path, 0) + 1
        await answering.wait()
        return PlainTextResponse("done")

    async with serving(Starlette(routes=[Route("/{which}", effect)])) as url:
        yield Sink(url, asked, answering)
        answering.set()


@pytest.fixture
async def tenant(database_url: str, redis_url: str) -> AsyncIterator[Tenant]:
    """A workspace whose tool `effect` needs no approval."""
    database = Database(database_url)
    async with open_tenant(database, redis_url) as tenant:
        async with database.begin() as connection:
            await create_definition(connection, tenant.workspace_id, "effect", "http_get", "SAFE", timeout_seconds=30)
        yield tenant
    await database.close()


async def until_all_ended(tenant: Tenant) -> None:
    """Return when every run has ended; the test's own timeout bounds it."""
    for _ in itertools.count():
        if not await tenant.rows("SELECT run_id FROM runs WHERE ended_at IS NULL LIMIT 1"):
            return
        await asyncio.sleep(0.05)


async def until_asked(sink: Sink, count: int) -> None:
    """Return when so many effects have begun."""
    for _ in itertools.count():
        if len(sink.asked) >= count:
            return
        await asyncio.sleep(0.02)


async def ask_for_effects(tenant: Tenant, sink: Sink, count: int) -> None:
    """Accept runs that each have one effect of their own."""
    for n in range(count):
        call = {"kind": "TOOL_CALL", "tool": "effect", "arguments": {"url": f"{sink.url}/{n}"}}
        await tenant.run(await tenant.agent(call, {"kind": "MESSAGE"}))


async def test_a_worker_killed_while_tools_run_leaves_each_started_once(
    tenant: Tenant, sink: Sink, start_worker: StartWorker
) -> None:
    allowed = {"PLIMSOLL_HTTP_GET_ALLOW": urlsplit(sink.url).netloc, "PLIMSOLL_LEASE_S": "0.5"}
    await ask_for_effects(tenant, sink, 5)
    worker = start_worker(**allowed)
    await until_asked(sink, 5)

    worker.kill()
    assert worker.wait() == -signal.SIGKILL
    start_worker(**allowed)
    await until_all_ended(tenant)

    assert sorted(sink.asked.values()) == [1] * 5
    assert await tenant.rows("SELECT DISTINCT status, error FROM tool_calls") == [
        {"status": "FAILED", "error": UNKNOWN_END}
    ]
    assert await tenant.rows("SELECT DISTINCT status FROM runs") == [{"status": "COMPLETED"}]
    assert await tenant.faults() == []


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])
async def test_a_worker_told_to_stop_lets_a_tool_end(
    tenant: Tenant, sink: Sink, start_worker: StartWorker, signals: list[signal.Signals]
) -> None:
    await ask_for_effects(tenant, sink, 1)
    worker = start_worker(PLIMSOLL_HTTP_GET_ALLOW=urlsplit(sink.url).netloc)
    await until_asked(sink, 1)

    for number in signals:
        worker.send_signal(number)
    sink.answering.set()

    assert await asyncio.to_thread(worker.wait) == 0
    (call,) = await tenant.rows("SELECT status, result->>'body' AS body FROM tool_calls")
    assert call == {"status": "COMPLETED", "body": "done"}


async def test_a_worker_interrupted_again_leaves_its_tool_and_says_so(
    tenant: Tenant, sink: Sink, start_worker: StartWorker
) -> None:
    await ask_for_effects(tenant, sink, 1)
    worker = start_worker(PLIMSOLL_HTTP_GET_ALLOW=urlsplit(sink.url).netloc)
    await until_asked(sink, 1)

    for _ in itertools.count():
        if worker.poll() is not None:
            break
        worker.send_signal(signal.SIGINT)
        await asyncio.sleep(0.1)

    assert worker.returncode == 0
    (call,) = await tenant.rows("SELECT status, error FROM tool_calls")
    assert call == {"status": "FAILED", "error": INTERRUPTED}
