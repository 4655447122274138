"""Redis away: `make redis-away` stops Redis under load, twice, and writes docs/evidence/redis-away.md.

Two HTTP processes and a worker on real PostgreSQL and Redis. Tenants within their quota create and poll at 0.9 of their
rates, one greedy tenant polls at three times its rate, and a socket is opened every second. Redis hangs for a while
(SIGSTOP, SIGCONT), answers again, is killed (SIGKILL), and is started again, empty. Exit code 1 when a promise of
docs/decisions/0005-redis-away.md was not kept: `redis_away_report` judges. Nothing is asserted about speed.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import httpx
import msgspec
from sqlalchemy import text
from websockets.exceptions import ConnectionClosed

from harness.client import Client
from service.auth import issue_token
from service.db import Database, migrate
from service.embedded import Stack
from service.quota.limits import DEFAULT, Limit
from service.settings import settings_for
from service.workspaces import create_agent, create_workspace
from tests.campaigns.flags import Flags
from tests.campaigns.quota_clients import Refusal
from tests.campaigns.redis_away_report import Measured, Phase, Request, page
from tests.campaigns.servers import figure, running
from tests.sockets import open_socket

PAGE = Path("docs/evidence/redis-away.md")

HTTP_PROCESSES, WORKERS = 2, 1
TENANTS = 3  # within their quota
MODESTY, GREED = 0.9, 3.0  # times the rate
GREEDY_CLIENTS = 8
SOCKET_EVERY_S = 1.0
OUTAGE_S, CALM_S = 60.0, 10.0
PATIENCE_S = 60.0  # for runs to end

READ_STATUSES = text("SELECT status, count(*) AS runs FROM runs WHERE run_id = ANY(:ids) GROUP BY status")


class Tenant:
    """A workspace under the default quota; for polls, with a run in it that stays."""

    def __init__(self, workspace_id: uuid.UUID, agent_id: uuid.UUID, token: str) -> None:
        self.workspace_id = workspace_id
        self.token = token
        self.create = msgspec.json.encode({"workspace_id": workspace_id, "agent_id": agent_id})
        self.lasting = ""

    @classmethod
    async def make(cls, http: httpx.AsyncClient, database: Database, *, lasting: bool) -> Tenant:
        """Make one."""
        async with database.begin() as connection:
            workspace_id = await create_workspace(connection, "redis away", "default")
            agent_id = await create_agent(connection, workspace_id, "agent")
            token = (await issue_token(connection, workspace_id, "OPERATOR")).token
        tenant = cls(workspace_id, agent_id, token)
        if lasting:
            body = msgspec.json.decode(tenant.create) | {"expected_subruns": 1, "max_wait_seconds": 3600}
            answer = await http.post("/api/runs/", json=body, headers={"authorization": f"Bearer {token}"})
            tenant.lasting = answer.raise_for_status().json()["run_id"]
        return tenant


class Load:
    """Everything that is asked while Redis comes and goes."""

    def __init__(self, url: str) -> None:
        self.requests: list[Request] = []
        self.run_ids: list[str] = []
        self.sockets: list[tuple[float, int | None]] = []  # when, and the close code; None: it was let in
        self._url = url
        self._ending = asyncio.Event()

    def end(self) -> None:
        """Ask nothing more."""
        self._ending.set()

    async def repeat(self, kind: str, per_s: float, clients: int, ask: Callable[[Client], Awaitable[Request]]) -> None:
        """Ask on schedule, whatever becomes of the requests before, on a few connections in turn."""
        pool = [Client(self._url) for _ in range(clients)]
        started_s, tasks = time.monotonic(), set[asyncio.Task[None]]()

        async def one(client: Client, late_ms: float) -> None:
            self.requests.append((await ask(client))._replace(kind=kind, late_ms=late_ms))

        for number in itertools.count():
            due_s = started_s + number / per_s
            await asyncio.sleep(due_s - time.monotonic())
            if self._ending.is_set():
                break
            task = asyncio.create_task(one(pool[number % clients], (time.monotonic() - due_s) * 1e3))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        for client in pool:
            await client.close()

    async def create(self, tenant: Tenant, client: Client) -> Request:
        """Create a run and remember that it was accepted."""
        request, body = await ask(client, "POST", "/api/runs/", tenant.token, tenant.create)
        if request.status == 200:
            self.run_ids.append(msgspec.json.decode(body)["run_id"])
        return request

    async def poll(self, tenant: Tenant, client: Client) -> Request:
        """Ask for a snapshot."""
        return (await ask(client, "GET", f"/api/runs/{tenant.lasting}/snapshot/", tenant.token, None))[0]

    async def open_sockets(self, tenant: Tenant) -> None:
        """Open a socket now and then, and close it again when it was let in."""
        while not self._ending.is_set():
            at_s, code = time.monotonic(), None
            try:
                async with open_socket(self._url, f"/ws/workspaces/{tenant.workspace_id}/", tenant.token) as socket:
                    await socket.send({"type": "cmd", "cmd": "ping"})
                    await socket.frame()
            except ConnectionClosed as closed:
                code = closed.rcvd.code if closed.rcvd else 1006
            self.sockets.append((at_s, code))  # by when it was asked for, so that an answer may come in the next phase
            await asyncio.sleep(SOCKET_EVERY_S)


async def ask(client: Client, method: str, path: str, token: str, body: bytes | None) -> tuple[Request, bytes]:
    """Make one request; returns what became of it and the answer's body."""
    sent_s = time.monotonic()
    exchange = await client.exchange(client.wire(method, path, token, body))
    policies = msgspec.json.decode(exchange.body, type=Refusal).policies if exchange.status == 429 else []
    latency_ms = (time.monotonic() - sent_s) * 1e3
    return Request("", sent_s, exchange.status, policies[0] if policies else None, latency_ms), exchange.body


class Outages:
    """Takes Redis away and gives it back, and notes what the service says about it."""

    def __init__(self, stack: Stack, url: str) -> None:
        self._stack = stack
        self._url = url
        self.phases: list[Phase] = []

    async def phase(self, name: str, away: bool, duration_s: float) -> None:
        """Let some time pass, and note how many processes say at its end that Redis is away."""
        started_s = time.monotonic()
        await asyncio.sleep(duration_s)
        alarm = await asyncio.to_thread(figure, self._url, "plimsoll_redis_away")
        self.phases.append(Phase(name, away, started_s, time.monotonic(), int(alarm)))
        tell(f"{name}: {duration_s:g} s, {alarm:g} processes go without Redis")

    def send(self, signum: signal.Signals) -> None:
        """Send a signal to the stack's own Redis."""
        assert self._stack.redis is not None
        assert self._stack.redis.process is not None
        os.kill(self._stack.redis.process.pid, signum)

    def start_again(self) -> None:
        """Start a Redis that was killed."""
        assert self._stack.redis is not None
        assert self._stack.redis.process is not None
        self._stack.redis.process.wait()
        self._stack.mend()


async def measure(stack: Stack, url: str, outage_s: float, calm_s: float) -> Measured:
    """Load the service while Redis comes and goes."""
    database = Database(stack.database_url)
    async with httpx.AsyncClient(base_url=url, timeout=30) as http:
        creators = [await Tenant.make(http, database, lasting=False) for _ in range(TENANTS)]
        pollers = [await Tenant.make(http, database, lasting=True) for _ in range(TENANTS)]
        greedy, watcher = [await Tenant.make(http, database, lasting=True) for _ in range(2)]
    load, outages = Load(url), Outages(stack, url)
    create_per_s, poll_per_s = (float(DEFAULT.rates[each].per_s) for each in (Limit.RUN_CREATION, Limit.SNAPSHOT_POLL))
    async with asyncio.TaskGroup() as group:
        for tenant in creators:
            group.create_task(load.repeat("create", MODESTY * create_per_s, 4, partial(load.create, tenant)))
        for tenant in pollers:
            group.create_task(load.repeat("poll", MODESTY * poll_per_s, 4, partial(load.poll, tenant)))
        greed = GREED * poll_per_s
        group.create_task(load.repeat("greedy poll", greed, GREEDY_CLIENTS, partial(load.poll, greedy)))
        group.create_task(load.open_sockets(watcher))
        await outages.phase("before", False, calm_s)
        outages.send(signal.SIGSTOP)
        await outages.phase("hangs (SIGSTOP)", True, outage_s)
        outages.send(signal.SIGCONT)
        await outages.phase("answers again", False, calm_s)
        outages.send(signal.SIGKILL)
        await outages.phase("is gone (SIGKILL)", True, outage_s)
        await asyncio.to_thread(outages.start_again)
        await outages.phase("started again, empty", False, calm_s)
        load.end()
    statuses = await settled(database, load.run_ids)
    await database.close()
    rate = DEFAULT.rates[Limit.SNAPSHOT_POLL]
    return Measured(outages.phases, load.requests, load.sockets, statuses, len(load.run_ids), rate, HTTP_PROCESSES)


async def settled(database: Database, run_ids: list[str]) -> dict[str, int]:
    """Return how many of the runs are in which status, when all have ended or patience has."""
    give_up_at = time.monotonic() + PATIENCE_S
    while True:
        async with database.read() as connection:
            found = await connection.execute(READ_STATUSES, {"ids": [uuid.UUID(each) for each in run_ids]})
            statuses = {row.status: row.runs for row in found}
        if set(statuses) == {"COMPLETED"} or time.monotonic() > give_up_at:
            return statuses
        await asyncio.sleep(0.2)


def run(folder: Path, outage_s: float, calm_s: float) -> Measured:
    """Run everything on a stack in the folder."""
    with Stack(folder / "stack") as stack:
        migrate(stack.database_url)
        with running(settings_for(stack.database_url, stack.redis_url), HTTP_PROCESSES, WORKERS) as url:
            return asyncio.run(measure(stack, url, outage_s, calm_s))


def main() -> int:
    """Run the campaign, write the page, and return the exit code."""
    parser = Flags("redis_away", __doc__)
    parser.add_argument("--seconds", type=float, default=OUTAGE_S, help="how long Redis is away, each time, seconds")
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write what was found")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="plimsoll-away-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # PostgreSQL's user passes through it when this runs as root
        measured = run(folder, arguments.seconds, CALM_S)
    arguments.page.write_text(page(measured), encoding="utf-8")
    for sentence in measured.verdicts() + measured.faults():
        tell(sentence)
    return 1 if measured.faults() else 0


def tell(line: str) -> None:
    """Say what is going on."""
    sys.stdout.write(f"redis-away: {line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
