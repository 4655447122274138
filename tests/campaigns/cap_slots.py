"""How soon a place can be used again, over HTTP and sockets on real processes; a part of `make cap-races`.

For each cap: fill it, end one holder, and ask again and again until a request is admitted; measured from the moment the
end was asked for. Then processes that hold sockets are killed (SIGKILL), each at another moment of its renewals, and a
client at another process asks until it gets the place.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from websockets.exceptions import ConnectionClosed

from service.auth import issue_token
from service.db import Database, migrate
from service.embedded import Stack
from service.quota.limits import CAPS, DEFAULT, Limit
from service.quota.overrides import set_override
from service.runs import StepKind
from service.serve import address_of, http_children, listen
from service.settings import Settings, child_environment, settings_for
from service.toolcalls import Risk, create_definition
from service.workspaces import create_agent, create_workspace
from tests.campaigns.servers import running
from tests.sockets import Client, open_socket

TRIALS = 20  # of each cap
KILLS = 12
AIM_S, KILLED_AIM_S = 1.0, 15.0
PATIENCE_S = 30.0
ASK_AGAIN_S = 0.02
RENEWAL_S = 5.0  # kills are spread over so long

Attempt = Callable[[], Awaitable[bool]]


@dataclass
class Slots:
    """What was measured, seconds from the holder's end to the first request that was admitted."""

    ended: dict[Limit, list[float]] = field(default_factory=dict)
    killed: list[float] = field(default_factory=list)

    def faults(self) -> list[str]:
        """Return every place that came back too late."""
        late = [
            f"{limit}: {max(each):.2f} s until a place was usable"
            for limit, each in self.ended.items()
            if max(each) > AIM_S
        ]
        if max(self.killed, default=PATIENCE_S) > KILLED_AIM_S:
            late.append(f"{max(self.killed, default=PATIENCE_S):.2f} s until a killed process's place was usable")
        return late

    def verdicts(self) -> list[str]:
        """Return what was shown."""
        most = max((max(each) for each in self.ended.values()), default=0.0)
        trials, longest = sum(map(len, self.ended.values())), max(self.killed, default=0.0)
        usable = f"a place was usable at most {most * 1e3:,.0f} ms after its holder's end ({trials} trials)"
        killed = f"at most {longest:.1f} s after a SIGKILL of the process that held it ({len(self.killed)} trials)"
        return [f"over HTTP and sockets, {usable}", f"and {killed}"]

    def page(self) -> str:
        """Return the part of the page."""
        rows = "\n".join(
            f"| {limit} | {len(each)} | {sorted(each)[len(each) // 2] * 1e3:,.0f} | {max(each) * 1e3:,.0f} |"
            for limit, each in self.ended.items()
        )
        killed = ", ".join(f"{each:.1f}" for each in sorted(self.killed))
        return f"""## How soon a place can be used again

On an HTTP process and a worker, from the moment a holder's end was asked for (a cancel, a rejection, a close) to the
answer of the first request that was admitted; whoever was refused asks again after {ASK_AGAIN_S * 1e3:.0f} ms.

| cap | trials | p50 ms | most ms |
|---|---|---|---|
{rows}

After a SIGKILL of the process that held the socket, each trial, seconds: {killed}.
"""


class Tenant:
    """A workspace in which only one cap counts."""

    def __init__(self, http: httpx.AsyncClient, url: str) -> None:
        self.http = http
        self.url = url
        self.workspace_id = uuid.UUID(int=0)
        self.agent_id = ""
        self.token = ""

    async def make(self, database: Database, limit: Limit, places: int | None = None) -> Tenant:
        """Make it; `places`: another cap than the default."""
        asks = {"kind": StepKind.TOOL_CALL.value, "tool": "ask", "arguments": {}}
        async with database.begin() as connection:
            self.workspace_id = await create_workspace(connection, "slots", "calibration")
            most = DEFAULT.cap(limit) if places is None else places
            await set_override(connection, self.workspace_id, limit, most, "cap-races")
            script = None
            if limit in (Limit.PENDING_TOOL_CALLS, Limit.PENDING_TOOL_CALLS_PER_RUN):
                await create_definition(connection, self.workspace_id, "ask", "echo", Risk.ELEVATED)
                script = [asks] * 50
            self.agent_id = str(await create_agent(connection, self.workspace_id, "agent", script))
            self.token = (await issue_token(connection, self.workspace_id, "OPERATOR")).token
        return self

    async def post(self, path: str, body: dict[str, object] | None = None) -> httpx.Response:
        return await self.http.post(path, json=body or {}, headers={"authorization": f"Bearer {self.token}"})

    async def create(self) -> str | None:
        """Ask for a run that stays; None when a cap refuses."""
        body: dict[str, object] = {"workspace_id": str(self.workspace_id), "agent_id": self.agent_id}
        answer = await self.post("/api/runs/", {**body, "expected_subruns": 1000, "max_wait_seconds": 3600})
        return None if answer.status_code == 429 else str(answer.raise_for_status().json()["run_id"])

    async def spawn(self, parent: str) -> str | None:
        """Ask for a subrun that stays paused; None when a cap refuses."""
        answer = await self.post(f"/api/runs/{parent}/spawn_subrun/", {"options": {"failure_policy": "IGNORE_FAILURE"}})
        if answer.status_code == 429:
            return None
        child = str(answer.raise_for_status().json()["child_run_id"])
        await self.post(f"/api/runs/{child}/pause/")
        return child

    async def pending(self) -> list[tuple[str, str]]:
        """Return (tool_call_id, run_id) of what waits for approval."""
        answer = await self.http.get(
            "/api/toolcalls/",
            params={"workspace_id": str(self.workspace_id), "status": "PENDING"},
            headers={"authorization": f"Bearer {self.token}"},
        )
        found = answer.raise_for_status().json()
        calls = found["tool_calls"] if isinstance(found, dict) else found
        return [(each["tool_call_id"], each["run_id"]) for each in calls]


async def until(attempt: Attempt, since_s: float) -> float:
    """Ask until it is granted; returns how long after `since_s`."""
    while not await attempt():
        if time.monotonic() - since_s > PATIENCE_S:
            break
        await asyncio.sleep(ASK_AGAIN_S)
    return time.monotonic() - since_s


async def runs_trials(tenant: Tenant, limit: Limit, trials: int) -> list[float]:
    """Measure a cap on runs."""
    parent = None if limit is Limit.LIVE_PARENT_RUNS else await tenant.create()

    async def take() -> str | None:
        return await tenant.create() if parent is None else await tenant.spawn(parent)

    held: list[str] = []
    while (run_id := await take()) is not None:
        held.append(run_id)
    measured = []
    for _ in range(trials):

        async def attempt() -> bool:
            if (granted := await take()) is not None:
                held.append(granted)
            return granted is not None

        since_s = time.monotonic()
        ending = asyncio.create_task(tenant.post(f"/api/runs/{held.pop(0)}/cancel/"))
        measured.append(await until(attempt, since_s))
        await ending
    return measured


async def calls_trials(tenant: Tenant, limit: Limit, trials: int) -> list[float]:
    """Measure a cap on tool calls: from a rejection to the next call that waits."""
    runs = 1 if limit is Limit.PENDING_TOOL_CALLS_PER_RUN else (DEFAULT.pending_tool_calls or 0) + 1
    most = 1 if runs == 1 else runs - 1
    for _ in range(runs):
        body: dict[str, object] = {"workspace_id": str(tenant.workspace_id), "agent_id": tenant.agent_id}
        (await tenant.post("/api/runs/", body)).raise_for_status()

    async def full() -> bool:
        return len(await tenant.pending()) == most

    await until(full, time.monotonic())
    measured = []
    for _ in range(trials):
        rejected = (await tenant.pending())[0][0]

        async def replaced(old: str = rejected) -> bool:
            ids = {each for each, _ in await tenant.pending()}
            return len(ids) == most and old not in ids

        since_s = time.monotonic()
        (await tenant.post(f"/api/toolcalls/{rejected}/reject/")).raise_for_status()
        measured.append(await until(replaced, since_s))
    return measured


async def is_let_in(url: str, tenant: Tenant, stack: AsyncExitStack) -> Client | None:
    """Open a socket and keep it open; None when a cap refuses it."""
    try:
        socket = await stack.enter_async_context(
            open_socket(url, f"/ws/workspaces/{tenant.workspace_id}/", tenant.token)
        )
        await socket.answer("ping")
    except ConnectionClosed:
        return None
    return socket


async def sockets_trials(tenant: Tenant, trials: int) -> list[float]:
    """Measure a cap on sockets: from a close to the next one that is let in."""
    measured, held = [], []
    async with AsyncExitStack() as stack:
        while (socket := await is_let_in(tenant.url, tenant, stack)) is not None:
            held.append(socket)
        for _ in range(trials):

            async def attempt() -> bool:
                if (opened := await is_let_in(tenant.url, tenant, stack)) is not None:
                    held.append(opened)
                return opened is not None

            since_s = time.monotonic()
            closing = asyncio.create_task(held.pop(0).connection.close())
            measured.append(await until(attempt, since_s))
            await closing
    return measured


def victim(stack: ExitStack, settings: Settings) -> tuple[subprocess.Popen[bytes], str]:
    """Start an HTTP process with a port of its own."""
    listener = stack.enter_context(listen("127.0.0.1", 0))
    child = http_children(child_environment(settings, PLIMSOLL_LOG_LEVEL="error"), listener, 1)[0]
    process = subprocess.Popen(child.command, env=child.environment, pass_fds=child.pass_fds)  # noqa: S603 - our own
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process, address_of(listener)


async def kill_trials(tenants: list[tuple[Tenant, subprocess.Popen[bytes], str]], url: str) -> list[float]:
    """Kill processes that hold a workspace's only place, at moments spread over a renewal; measure each."""
    spread = random.Random(0)  # noqa: S311 - moments, no secret

    async def one(tenant: Tenant, process: subprocess.Popen[bytes], held_at: str) -> float:
        async with AsyncExitStack() as stack:

            async def hold() -> bool:
                return await is_let_in(held_at, tenant, stack) is not None

            async def attempt() -> bool:
                return await is_let_in(url, tenant, stack) is not None

            # A process that is just starting may find Redis too slow at first, and then refuses.
            assert await until(hold, time.monotonic()) < PATIENCE_S
            await asyncio.sleep(RENEWAL_S + spread.random() * RENEWAL_S)
            since_s = time.monotonic()
            os.kill(process.pid, signal.SIGKILL)
            return await until(attempt, since_s)

    return list(await asyncio.gather(*(one(*each) for each in tenants)))


async def measure(settings: Settings, url: str, trials: int, kills: int) -> Slots:
    """Measure everything."""
    slots, database = Slots(), Database(settings.database_url)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as http:
        for limit in CAPS:
            tenant = await Tenant(http, url).make(database, limit)
            if limit in (Limit.WEBSOCKETS, Limit.WEBSOCKETS_PER_USER):
                slots.ended[limit] = await sockets_trials(tenant, trials)
            elif limit in (Limit.PENDING_TOOL_CALLS, Limit.PENDING_TOOL_CALLS_PER_RUN):
                slots.ended[limit] = await calls_trials(tenant, limit, trials)
            else:
                slots.ended[limit] = await runs_trials(tenant, limit, trials)
        victims = []
        with ExitStack() as stack:
            for process, held_at in [victim(stack, settings) for _ in range(kills)]:
                async with httpx.AsyncClient(base_url=held_at, timeout=PATIENCE_S) as other:
                    (await other.get("/livez")).raise_for_status()
                victims.append((await Tenant(http, url).make(database, Limit.WEBSOCKETS, 1), process, held_at))
            slots.killed = await kill_trials(victims, url)
    await database.close()
    return slots


def measure_slots(trials: int = TRIALS, kills: int = KILLS) -> Slots:
    """Measure on a stack and processes of its own."""
    with tempfile.TemporaryDirectory(prefix="plimsoll-slots-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # PostgreSQL's user passes through it when this runs as root
        with Stack(folder / "stack") as stack:
            migrate(stack.database_url)
            settings = settings_for(stack.database_url, stack.redis_url)
            with running(settings, 1, 1) as url:
                return asyncio.run(measure(settings, url, trials, kills))
