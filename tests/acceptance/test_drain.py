"""A process that is told to stop, with everything in flight that can be: each is ended in the way that was promised."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, closing, suppress
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from service.auth import issue_token
from service.db import Database
from service.serve import address_of, listen
from tests.sockets import Client, open_socket
from tests.strictclient import Reply, StrictClient
from tests.tenants import Tenant, open_tenant

pytestmark = pytest.mark.acceptance

HUNG = {"kind": "MODEL_CALL", "latency_ms": 3_600_000}


class Service:
    """One HTTP process; nobody else holds its listening socket."""

    def __init__(self, environment: dict[str, str]) -> None:
        with listen("127.0.0.1", 0) as listener:
            number = listener.fileno()
            self.url = address_of(listener)
            self.process = subprocess.Popen(  # noqa: S603 - our own
                [sys.executable, "-m", "service", "serve", "--fd", str(number)], env=environment, pass_fds=[number]
            )

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        """Return its exit code once it has ended."""
        return await asyncio.to_thread(self.process.wait, 30)


@pytest.fixture
def service(service_environment: dict[str, str]) -> Iterator[Service]:
    started = Service(service_environment)
    yield started
    started.process.kill()
    started.process.wait()


@pytest.fixture
async def tenant(database_url: str, redis_url: str) -> AsyncIterator[Tenant]:
    """A workspace without limits."""
    database = Database(database_url)
    async with open_tenant(database, redis_url) as tenant:
        yield tenant
    await database.close()


@pytest.fixture
async def token(tenant: Tenant) -> str:
    """An operator's token."""
    async with tenant.database.begin() as connection:
        return (await issue_token(connection, tenant.workspace_id, "OPERATOR")).token


class Clients(AsyncExitStack):
    """Clients of one service, closed together."""

    def __init__(self, service: Service, token: str) -> None:
        super().__init__()
        self._service, self._token = service, token

    async def connected(self) -> StrictClient:
        """Return one whose connection was used and is open."""
        client = self.enter_context(closing(StrictClient(self._service.url, self._token)))
        assert (await client.send("GET", "/livez")).status == 200
        return client


async def until_locked(tenant: Tenant, waiting: int) -> None:
    """Return when so many statements of the service wait for a lock."""
    for _ in itertools.count():
        found = await tenant.rows("SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        if len(found) == waiting:
            return
        await asyncio.sleep(0.01)


def outcome(reply: Reply) -> tuple[int, bool]:
    """Return what matters of an answer: its status, and whether it says goodbye."""
    return reply.status, reply.is_last


async def test_all_that_is_in_flight_is_answered_and_the_process_ends_with_0_within_ten_seconds(
    service: Service, tenant: Tenant, token: str
) -> None:
    hung = await tenant.agent(HUNG)
    held, other, watched = await tenant.runs(3, hung)
    body = {"workspace_id": str(tenant.workspace_id), "agent_id": str(hung), "input_text": "uploaded slowly"}
    content = json.dumps(body).encode()
    async with Clients(service, token) as clients:
        idle, poll, upload, half, cancel = [await clients.connected() for _ in range(5)]
        viewer = await clients.enter_async_context(open_socket(service.url, f"/ws/runs/{watched}/", token))
        commander = await clients.enter_async_context(open_socket(service.url, f"/ws/runs/{held}/", token))
        assert [(await each.frame())["seq"] for each in (viewer, commander)] == [1, 1]

        await upload.begin("POST", "/api/runs/", len(content))
        upload.write(content[:20])
        half.write(b"GET /livez HTT")
        await poll.begin("GET", f"/api/runs/{watched}/snapshot/?since_seq=1&wait=30", 0)
        async with tenant.database.begin() as connection:
            ids = [held, other]
            await connection.exec_driver_sql("SELECT 1 FROM runs WHERE run_id = ANY($1) FOR UPDATE", (ids,))
            await commander.send({"type": "cmd", "cmd": "cancel_run", "run_id": str(held)})
            await cancel.begin("POST", f"/api/runs/{other}/cancel/", 2)
            cancel.write(b"{}")
            await until_locked(tenant, 2)
            asked_s = time.monotonic()
            service.signal(signal.SIGTERM)
            assert outcome(await poll.reply()) == (200, True)
            assert (await viewer.closed())[0] == 1012
        assert outcome(await cancel.reply()) == (200, True)
        assert "cancel_run_ack" in [frame["type"] for frame in await until_restart(commander)]
        assert outcome(await idle.send("GET", "/livez")) == (200, True)
        half.write(b"P/1.1\r\nhost: here\r\n\r\n")
        assert outcome(await half.reply()) == (200, True)
        upload.write(content[20:])
        uploaded = await upload.reply()
        assert outcome(uploaded) == (200, True)
    assert await service.ended() == 0
    took_s = time.monotonic() - asked_s

    assert took_s < 10
    assert (await tenant.row(uploaded.json["run_id"]))["input_text"] == "uploaded slowly"
    assert await tenant.statuses(held, other, watched) == ["CANCELED", "CANCELED", "PENDING"]


async def until_restart(client: Client) -> list[dict[str, Any]]:
    """Return a socket's frames until it is closed with 1012."""
    frames: list[dict[str, Any]] = []
    with suppress(ConnectionClosed):
        while True:
            frames.append(await client.frame())
    assert client.connection.close_code == 1012
    return frames


async def test_an_upload_that_never_ends_is_refused_in_words_and_holds_nobody_up_beyond_ten_seconds(
    service: Service, tenant: Tenant, token: str
) -> None:
    async with Clients(service, token) as clients:
        upload, silent = await clients.connected(), await clients.connected()
        await upload.begin("POST", "/api/runs/", 1000)
        upload.write(b"{")
        asked_s = time.monotonic()
        service.signal(signal.SIGTERM)
        reply = await upload.reply()
        with pytest.raises(EOFError):  # a connection on which nothing is asked is closed without a word
            await silent.reply()
    assert await service.ended() == 0
    took_s = time.monotonic() - asked_s

    assert took_s < 10
    assert (reply.status, reply.is_last, reply.fields["retry-after"]) == (503, True, "1")
    assert reply.json["error"] == (
        "the service restarts, and the request had not arrived by then; nothing was done, send it again"
    )
    assert await tenant.rows("SELECT run_id FROM runs") == []


async def test_connections_that_nobody_has_accepted_yet_are_answered(service: Service, token: str) -> None:
    async with Clients(service, token) as clients:
        await clients.connected()
        service.signal(signal.SIGSTOP)
        waiting = [clients.enter_context(closing(StrictClient(service.url))) for _ in range(30)]
        for client in waiting:
            await client.begin("GET", "/livez", 0)
        service.signal(signal.SIGTERM)
        service.signal(signal.SIGCONT)
        assert [outcome(await client.reply())[0] for client in waiting] == [200] * 30
    assert await service.ended() == 0


async def test_sigterm_may_come_again_and_a_second_sigint_ends_at_once(
    service: Service, tenant: Tenant, token: str
) -> None:
    async with Clients(service, token) as clients:
        upload, first, second = [await clients.connected() for _ in range(3)]
        await upload.begin("POST", "/api/runs/", 1000)
        upload.write(b"{")
        for client in (first, second):
            service.signal(signal.SIGTERM)
            assert outcome(await client.send("GET", "/livez"))[0] == 200
        service.signal(signal.SIGINT)
        with pytest.raises((EOFError, ConnectionResetError)):  # it was cut off, not refused
            await upload.reply()
    assert await service.ended() == 0
    assert await tenant.rows("SELECT run_id FROM runs") == []
