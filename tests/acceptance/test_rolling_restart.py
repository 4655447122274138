"""Processes replaced one by one under load: every request that was sent is answered, and no answer is a 5xx."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from typing import Any

import psutil
import pytest
from websockets.exceptions import ConnectionClosed

from service.auth import issue_token
from service.db import Database
from service.readiness import READY_FD
from service.serve import address_of, listen
from tests.sockets import faults_of, open_socket
from tests.strictclient import Reply, StrictClient
from tests.tenants import Tenant, open_tenant

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(400)]  # a dozen processes start, on a busy machine

SERVICE = [sys.executable, "-m", "service"]
SCRIPT: list[dict[str, Any]] = [{"kind": "MODEL_CALL", "latency_ms": 50}, {"kind": "OBSERVATION", "latency_ms": 100}]

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(service_environment: dict[str, str]) -> Iterator[Start]:
    """Return a function that starts a command of the service; what still runs at the end of the test is ended."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(*words: str, ready_fd: int | None = None, **more: Any) -> subprocess.Popen[bytes]:
        told = {} if ready_fd is None else {READY_FD: str(ready_fd)}
        process = subprocess.Popen([*SERVICE, *words], env={**service_environment, **told}, **more)  # noqa: S603 - our own
        started.append(process)
        return process

    yield begin
    for process in started:
        process.terminate()
    for process in started:
        process.wait(20)
        if process.stdout is not None:
            process.stdout.close()


@pytest.fixture
async def tenant(database_url: str, redis_url: str) -> AsyncIterator[Tenant]:
    """A workspace without limits."""
    database = Database(database_url)
    async with open_tenant(database, redis_url) as tenant:
        yield tenant
    await database.close()


class Load:
    """Clients of every kind, who go on until they are told to stop; what went wrong is kept, in words."""

    def __init__(self, url: str, token: str, workspace_id: uuid.UUID, agent_id: uuid.UUID) -> None:
        self.url, self.token = url, token
        self.workspace_id = workspace_id
        self.create = {"workspace_id": str(workspace_id), "agent_id": str(agent_id)}
        self.done: Counter[str] = Counter()
        self.faults: list[str] = []
        self.accepted: list[str] = []
        self.goodbyes: Counter[str] = Counter()
        self._stopping = False

    @asynccontextmanager
    async def going_on(self) -> AsyncIterator[None]:
        """Let all kinds of clients go on during the block."""
        kinds = {
            self._creator: 1,
            self._family: 1,
            self._poller: 2,
            self._long_poller: 3,
            self._follower: 3,
            self._watcher: 1,
        }
        async with asyncio.TaskGroup() as clients:
            for kind, count in kinds.items():
                for _ in range(count):
                    clients.create_task(kind())
            try:
                await self.more_of(*(kind.__name__ for kind in kinds))
                yield
                await self.more_of(*(kind.__name__ for kind in kinds))
            finally:
                self._stopping = True

    async def more_of(self, *kinds: str) -> None:
        """Return when clients of each kind have done more than they have by now."""
        before = self.done.copy()
        for _ in itertools.count():
            if self.faults or all(self.done[kind] >= before[kind] + 3 for kind in kinds):
                return
            await asyncio.sleep(0.02)

    def _count(self, kind: str, reply: Reply) -> bool:
        """Note an answer; whether it was a good one."""
        self.done[kind] += 1
        self.goodbyes[kind] += reply.is_last
        if reply.status not in (200, 304):
            self.faults.append(f"{kind}: {reply.status} {reply.body!r}")
        return reply.status == 200

    async def _send(self, kind: str, client: StrictClient, method: str, path: str, body: Any = None) -> Reply | None:
        """Send a request; None when it was not answered with 200, which is noted."""
        try:
            reply = await client.send(method, path, body)
        except (OSError, EOFError) as fault:
            self.faults.append(f"{kind}: {method} {path}: {fault!r}")
            return None
        return reply if self._count(kind, reply) else None

    async def _creator(self) -> None:
        with closing(StrictClient(self.url, self.token)) as client:
            while not self._stopping:
                created = await self._send("_creator", client, "POST", "/api/runs/", self.create)
                if created is not None:
                    self.accepted.append(created.json["run_id"])
                await asyncio.sleep(0.1)

    async def _family(self) -> None:
        with closing(StrictClient(self.url, self.token)) as client:
            while not self._stopping:
                created = await self._send(
                    "_family", client, "POST", "/api/runs/", {**self.create, "expected_subruns": 1}
                )
                if created is not None:
                    run_id = created.json["run_id"]
                    self.accepted.append(run_id)
                    spawned = await self._send("_family", client, "POST", f"/api/runs/{run_id}/spawn_subrun/", {})
                    if spawned is not None:
                        self.accepted.append(spawned.json["child_run_id"])
                await asyncio.sleep(0.1)

    async def _poller(self) -> None:
        with closing(StrictClient(self.url, self.token)) as client:
            while not self._stopping:
                for run_id in self.accepted[-2:]:
                    await self._send("_poller", client, "GET", f"/api/runs/{run_id}/snapshot/")
                await asyncio.sleep(0.05)

    async def _long_poller(self) -> None:
        with closing(StrictClient(self.url, self.token)) as client:
            while not self._stopping:
                created = await self._send("_long_poller", client, "POST", "/api/runs/", self.create)
                if created is None:
                    continue
                run_id, status, since = created.json["run_id"], "PENDING", 0
                self.accepted.append(run_id)
                while status not in ("COMPLETED", "FAILED", "CANCELED") and not self.faults:
                    path = f"/api/runs/{run_id}/snapshot/?since_seq={since}&wait=30"
                    seen = await self._send("_long_poller", client, "GET", path)
                    if seen is not None:
                        status, since = seen.json["run"]["status"], seen.json["last_seq"]

    async def _follower(self) -> None:
        """Follow runs by a socket; 1012 asks to come again."""
        with closing(StrictClient(self.url, self.token)) as client:
            while not self._stopping:
                created = await self._send("_follower", client, "POST", "/api/runs/", self.create)
                if created is None:
                    continue
                run_id = created.json["run_id"]
                self.accepted.append(run_id)
                seen: list[int] = []
                while not self.faults and not await self._followed(run_id, seen):
                    self.goodbyes["1012"] += 1
                self.faults += faults_of(seen, 1, max(seen, default=0))

    async def _watcher(self) -> None:
        """Hold a socket on the workspace for as long as it lasts: whoever is replaced must part with it."""
        while not self._stopping and not self.faults:
            try:
                async with open_socket(
                    self.url, f"/ws/workspaces/{self.workspace_id}/", self.token, open_timeout=60
                ) as socket_:
                    while not self._stopping:
                        await socket_.frame()
                        self.done["_watcher"] += 1
            except ConnectionClosed as end:
                if end.rcvd is None or end.rcvd.code != 1012:
                    self.faults.append(f"_watcher: {end!r}")
                self.goodbyes["1012"] += 1

    async def _followed(self, run_id: str, seen: list[int]) -> bool:
        """Read a run's events until it has ended; False when the service restarts meanwhile."""
        path = f"/ws/runs/{run_id}/?since_seq={seen[-1] if seen else 0}"
        try:
            async with open_socket(self.url, path, self.token, open_timeout=60) as socket_:  # while nobody answers
                while True:
                    frame = await socket_.frame()
                    seen.append(frame["seq"])
                    if frame["event"] == "state_changed" and frame["data"]["to"] == "COMPLETED":
                        self.done["_follower"] += 1
                        return True
        except ConnectionClosed as end:
            if end.rcvd is None or end.rcvd.code != 1012:
                self.faults.append(f"_follower: {end!r}")
        except Exception as fault:  # whatever else: a handshake that failed, with whatever status
            self.faults.append(f"_follower: {fault!r}")
        return False


def children_of(process: subprocess.Popen[bytes]) -> set[int]:
    """Return the ids of the processes under a supervisor."""
    return {child.pid for child in psutil.Process(process.pid).children() if child.status() != psutil.STATUS_ZOMBIE}


async def until_replaced(process: subprocess.Popen[bytes], old: set[int]) -> None:
    """Return when two processes are under a supervisor, and none of the old ones."""
    for _ in itertools.count():
        now = children_of(process)
        if len(now) == 2 and not now & old:
            return
        assert process.poll() is None
        await asyncio.sleep(0.05)


async def assert_all_completed_once(tenant: Tenant, load: Load) -> None:
    """Every accepted run COMPLETED with each step once, and no other run is there."""
    for _ in itertools.count():
        if not await tenant.rows("SELECT run_id FROM runs WHERE ended_at IS NULL LIMIT 1"):
            break
        await asyncio.sleep(0.05)
    runs = await tenant.rows("SELECT CAST(run_id AS text) AS run_id, status FROM runs")
    assert {(row["run_id"], row["status"]) for row in runs} == {(run_id, "COMPLETED") for run_id in load.accepted}
    assert await tenant.faults() == []


async def new_load(tenant: Tenant, url: str) -> Load:
    """Return clients of a tenant, who have not begun yet."""
    agent_id = await tenant.agent(*SCRIPT)
    async with tenant.database.begin() as connection:
        token = (await issue_token(connection, tenant.workspace_id, "OPERATOR")).token
    return Load(url, token, tenant.workspace_id, agent_id)


async def test_processes_replaced_one_by_one_under_load_fail_no_request_and_lose_no_run(
    tenant: Tenant, start: Start
) -> None:
    http = start("serve", "--port", "0", "--processes", "2", stdout=subprocess.PIPE)
    workers = start("worker", "--processes", "2")
    assert http.stdout is not None
    url = http.stdout.readline().decode().strip().removeprefix("url: ")
    load = await new_load(tenant, url)

    async with load.going_on():
        for supervisor in (http, workers):
            old = children_of(supervisor)
            supervisor.send_signal(signal.SIGHUP)
            await until_replaced(supervisor, old)
        for supervisor in (http, workers):  # and as an operator does it who knows of no SIGHUP
            pid = children_of(supervisor).pop()
            os.kill(pid, signal.SIGTERM)
            await until_replaced(supervisor, {pid})

    assert load.faults == []
    assert min(load.goodbyes["_poller"], load.goodbyes["_long_poller"], load.goodbyes["1012"]) > 0, load.goodbyes
    await assert_all_completed_once(tenant, load)
    for supervisor in (http, workers):
        supervisor.send_signal(signal.SIGTERM)
    assert [await asyncio.to_thread(supervisor.wait, 20) for supervisor in (http, workers)] == [0, 0]


async def test_independent_processes_on_one_inherited_socket_are_replaced_even_when_none_is_left_meanwhile(
    tenant: Tenant, start: Start
) -> None:
    """What a service manager does that holds the listening socket: it keeps those who come while nobody answers."""
    start("worker")
    with listen("127.0.0.1", 0) as listener:
        number = listener.fileno()

        async def serve() -> subprocess.Popen[bytes]:
            """Start one more, and return when it answers."""
            reader, writer = os.pipe()
            process = start("serve", "--fd", str(number), pass_fds=[number, writer], ready_fd=writer)
            os.close(writer)
            assert await asyncio.to_thread(os.read, reader, 1) == b"1"
            os.close(reader)
            return process

        async def end(process: subprocess.Popen[bytes]) -> None:
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, 20) == 0

        one, another = await serve(), await serve()
        load = await new_load(tenant, address_of(listener))
        async with load.going_on():
            await end(one)
            one = await serve()
            await end(another)
            await end(one)
            await serve()

    assert load.faults == []
    await assert_all_completed_once(tenant, load)
