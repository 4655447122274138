"""Real processes and open sockets: told to stop, killed, and with a Redis that goes and comes back."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from websockets.exceptions import ConnectionClosed

from service.auth import issue_token
from service.db import Database
from service.embedded.place import find_place
from service.embedded.redis import Redis
from service.serve import address_of, listen
from service.workspaces import create_agent, create_workspace
from tests.sockets import Client, faults_of, open_socket, open_writer

pytestmark = pytest.mark.acceptance

FILLER = {"filler": "x" * 2000}

SERVER = """
import sys
from service.app import create_app
from service.serve import inherited, run_server
from service.settings import Settings
from service.stream.protocol import SocketProtocol
from service.stream.timing import Timing
SocketProtocol.parting_s = 0.5
timing = Timing(lease_s=1.0, renew_every_s=0.2, send_patience_s=0.5)
sys.exit(run_server(create_app(Settings.from_environment(), timing), inherited(int(sys.argv[1]))))
"""
"""The service with little patience."""


@dataclass
class Service:
    """One HTTP process."""

    process: subprocess.Popen[bytes]
    url: str


StartService = Callable[..., Service]


@pytest.fixture
def start_service(service_environment: dict[str, str]) -> Iterator[StartService]:
    """Return a function that starts an HTTP process and waits until it answers."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*command: str, **environment: str) -> Service:
        with listen("127.0.0.1", 0) as listener:
            number = str(listener.fileno())
            process = subprocess.Popen(  # noqa: S603 - our own
                [sys.executable, *(command or ("-m", "service", "serve", "--fd")), number],
                env={**service_environment, **environment},
                pass_fds=[listener.fileno()],
            )
            started.append(process)
            url = address_of(listener)
        assert httpx.get(f"{url}/livez", timeout=30).status_code == 200
        return Service(process, url)

    yield start
    for process in started:
        process.kill()
        process.wait()


@dataclass
class Tenant:
    """A workspace under the default quota, and its tokens."""

    workspace_id: uuid.UUID
    agent_id: uuid.UUID
    tokens: list[str]

    async def create(self, service: Service) -> str:
        """Create a run."""
        body = {"workspace_id": str(self.workspace_id), "agent_id": str(self.agent_id)}
        header = {"authorization": f"Bearer {self.tokens[0]}"}
        async with httpx.AsyncClient(timeout=30) as client:
            answer = await client.post(f"{service.url}/api/runs/", json=body, headers=header)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["run_id"])


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    opened = Database(database_url)
    yield opened
    await opened.close()


@pytest.fixture
async def tenant(database: Database) -> Tenant:
    """A workspace with four tokens: enough for twenty sockets."""
    async with database.begin() as connection:
        workspace_id = await create_workspace(connection, "tenant", "default")
        agent_id = await create_agent(connection, workspace_id, "agent")
        tokens = [(await issue_token(connection, workspace_id, "OPERATOR")).token for _ in range(4)]
    return Tenant(workspace_id, agent_id, tokens)


async def open_twenty(stack: AsyncExitStack, service: Service, tenant: Tenant, path: str) -> list[Client]:
    """Open as many sockets as a workspace may have, and see that each is served."""
    clients = [await stack.enter_async_context(open_socket(service.url, path, tenant.tokens[n % 4])) for n in range(20)]
    for client in clients:
        assert (await client.frame())["seq"] == 1
    return clients


async def test_told_to_stop_with_open_sockets_and_long_polls_it_ends_within_five_seconds_with_0(
    start_service: StartService, tenant: Tenant, database: Database, redis_url: str
) -> None:
    service = start_service()
    run_id = await tenant.create(service)
    header = {"authorization": f"Bearer {tenant.tokens[0]}"}
    async with AsyncExitStack() as stack, httpx.AsyncClient(headers=header, timeout=30) as http:
        clients = await open_twenty(stack, service, tenant, f"/ws/runs/{run_id}/")
        stalled = clients.pop()
        stalled.connection.transport.pause_reading()
        writer = await stack.enter_async_context(open_writer(database, redis_url))
        last = await writer.append(run_id, 1000, payload=FILLER)  # more than the kernel takes for the one that stalls
        seen = await asyncio.gather(*(client.until_seq(last) for client in clients))
        assert [faults_of(each, 2, last) for each in seen] == [[]] * 19
        snapshot = f"{service.url}/api/runs/{run_id}/snapshot/?since_seq={last}"
        polls = [asyncio.create_task(http.get(f"{snapshot}&wait=30")) for _ in range(5)]
        for _ in range(5):  # by then the polls have been read and wait
            assert (await http.get(snapshot)).status_code == 200
        asked = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        answers = await asyncio.gather(*polls)
        codes = [(await client.closed())[0] for client in clients]
        code = await asyncio.to_thread(service.process.wait)
        took_s = time.monotonic() - asked
        stalled.connection.transport.abort()
    assert [answer.status_code for answer in answers] == [200] * 5
    assert codes == [1012] * 19
    assert (code, took_s < 5) == (0, True), took_s


async def test_a_client_that_never_reads_again_leaves_no_connection_behind(
    start_service: StartService, tenant: Tenant, database: Database, redis_url: str
) -> None:
    service = start_service("-c", SERVER)
    run_id = await tenant.create(service)
    async with (
        open_writer(database, redis_url) as writer,
        open_socket(service.url, f"/ws/runs/{run_id}/", tenant.tokens[0]) as stalled,
    ):
        assert (await stalled.frame())["seq"] == 1
        stalled.connection.transport.pause_reading()
        _, port = stalled.connection.local_address
        assert port in ports_of_clients(service)
        await writer.append(run_id, 1000, payload=FILLER)
        while port in ports_of_clients(service):
            await asyncio.to_thread(lambda: None)
        stalled.connection.transport.abort()


def ports_of_clients(service: Service) -> set[int]:
    """Return the ports of all clients to which the process holds a connection."""
    connections = psutil.Process(service.process.pid).net_connections("tcp")
    return {each.raddr.port for each in connections if each.status == psutil.CONN_ESTABLISHED}


async def test_the_places_of_a_killed_process_are_free_when_their_lease_ends(
    start_service: StartService, tenant: Tenant
) -> None:
    doomed, other = start_service("-c", SERVER), start_service("-c", SERVER)
    path = f"/ws/runs/{await tenant.create(doomed)}/"
    async with AsyncExitStack() as stack:
        await open_twenty(stack, doomed, tenant, path)
        assert await opens(other, path, tenant.tokens[0]) == 4429
        doomed.process.kill()
        killed = time.monotonic()
        while await opens(other, path, tenant.tokens[0]) == 4429:
            pass
        waited_s = time.monotonic() - killed
        await open_twenty(stack, other, tenant, path)
        assert await opens(other, path, tenant.tokens[0]) == 4429
    assert waited_s < 1.0 + 5.0, waited_s  # the lease, and generous room for a busy machine


async def opens(service: Service, path: str, token: str) -> int:
    """Open a socket and close it at once: 0, or the code with which it was refused."""
    async with open_socket(service.url, path, token) as client:
        try:
            await client.frame()
        except ConnectionClosed as end:
            return end.rcvd.code if end.rcvd else 0
    return 0


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[Redis]:
    """A Redis of the test's own, which may go and come back."""
    (tmp_path / "stack").mkdir()
    server = Redis(find_place(tmp_path / "stack"))
    server.start()
    server.wait_until_ready()
    yield server
    server.stop()


async def test_while_redis_is_away_streams_go_on_and_new_ones_are_refused(
    start_service: StartService, tenant: Tenant, database: Database, own_redis: Redis
) -> None:
    service = start_service("-c", SERVER, REDIS_URL=own_redis.url)
    run_id = await tenant.create(service)
    path = f"/ws/runs/{run_id}/"
    async with (
        open_writer(database, own_redis.url) as writer,
        open_socket(service.url, path, tenant.tokens[0]) as client,
        open_socket(service.url, f"/ws/workspaces/{tenant.workspace_id}/", tenant.tokens[0]) as watcher,
    ):
        assert [(await watcher.frame())["event"] for _ in range(2)] == ["run_listed", "runs_listed"]
        last = await writer.append(run_id, 2)
        seen, watched = await client.until_seq(last), await watcher.until_seq(last)
        own_redis.stop()
        last = await writer.append(run_id, 3, publish=False)
        seen, watched = seen + await client.until_seq(last), watched + await watcher.until_seq(last)
        assert await opens(service, path, tenant.tokens[1]) == 4503
        assert (await client.answer("ping"))["type"] == "ping_ack"
        own_redis.start()
        own_redis.wait_until_ready()
        while await opens(service, path, tenant.tokens[1]) == 4503:
            pass
        for _ in range(5):
            last = await writer.append(run_id, 2)
            seen, watched = seen + await client.until_seq(last), watched + await watcher.until_seq(last)
    assert (faults_of(seen, 1, last), faults_of(watched, 2, last)) == ([], [])
