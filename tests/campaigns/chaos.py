"""The chaos campaign: `make chaos RUNS=2000 KILLS=100 SEED=1` strikes the service while users work, and then audits.

Real processes, SIGKILLs and network faults in an order that the seed gives; what is struck and how, `chaos_world.py`;
who works meanwhile, `chaos_load.py`; what must hold afterwards, `chaos_audit.py`; the page that tells of it,
`chaos_report.py`. Exit code 1 when a promise is broken, and nothing is asserted about time. Everything is bounded in
time, and whatever was started is ended, also by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from service.db import Database, migrate
from tests.campaigns.chaos_audit import audit
from tests.campaigns.chaos_effects import read_effects
from tests.campaigns.chaos_load import ANSWER_PATIENCE_S, Tenant, Users, make_plan, make_tenant
from tests.campaigns.chaos_report import Measured, Struck, page
from tests.campaigns.chaos_world import Eye, World
from tests.campaigns.faultproxy import Fault
from tests.campaigns.flags import Flags

PAGE = Path("docs/evidence/chaos.md")
LOG = Path("data/logs/chaos-service.log")

KILLS = {
    "HTTP process killed": 22,
    "worker killed": 26,
    "PostgreSQL backend killed": 18,
    "PostgreSQL killed": 10,
    "Redis killed": 12,
    "HTTP supervisor killed": 6,
    "worker supervisor killed": 6,
}
"""What is killed, and of a hundred kills how often; the first of each come before the second of any."""

SERVERS = ("PostgreSQL", "Redis")
NETWORK = [(server, fault) for server in SERVERS for fault in Fault if fault is not Fault.NONE]
FLUSHALL = "Redis emptied"
OTHERS_PER_KILL = 0.44  # eleven kinds of other faults: with a hundred kills each comes four times
EPISODE_S = (0.5, 4.0)  # how long a network fault lasts
REST_S = (0.2, 1.0)  # between a recovery and the next fault
SIDE_BY_SIDE = 4
RECOVERY_PATIENCE_S = 90.0
END_PATIENCE_S = 240.0  # for the users to finish after the last fault
PLACES = 5  # live parent runs of a workspace under the default quota


def make_schedule(seed: int, kills: int) -> list[str | tuple[str, Fault]]:
    """Return all faults in their order."""
    dice = random.Random(f"schedule {seed}")  # noqa: S311 - repeatable, not secret
    names = list(KILLS)
    drawn: list[str | tuple[str, Fault]] = [*names[:kills]]
    drawn += dice.choices(names, list(KILLS.values()), k=max(0, kills - len(names)))
    others: list[str | tuple[str, Fault]] = [FLUSHALL, *NETWORK]
    dice.shuffle(others)
    count = max(1, round(kills * OTHERS_PER_KILL))
    drawn += (others * (count // len(others) + 1))[:count]
    dice.shuffle(drawn)
    return drawn


def told(took_s: float | None) -> str:
    """Return a duration for whoever watches."""
    return "more than patience" if took_s is None else f"{took_s:.2f} s"


class Campaign:
    """One campaign on one world."""

    def __init__(self, world: World, users: Users, measured: Measured) -> None:
        self._world = world
        self._users = users
        self._measured = measured
        self._dice = random.Random(f"campaign {measured.seed}")  # noqa: S311 - repeatable, not secret
        self._begun_s = time.monotonic()

    async def run(self, tenants: list[Tenant], prober: Tenant) -> None:
        """Let users in, strike, wait for the end of everything, and try every slot once more."""
        schedule = make_schedule(self._measured.seed, self._measured.kills)
        playing: list[asyncio.Task[None]] = []
        keeping = asyncio.create_task(self._world.keep_alive())
        deciding = [asyncio.create_task(self._users.decide(tenant)) for tenant in tenants]
        try:
            for number, fault in enumerate(schedule):
                share = (number + 1) / len(schedule)
                while len(playing) < share * self._measured.runs:
                    plan = make_plan(self._measured.seed, len(playing))
                    tenant = tenants[len(playing) % len(tenants)]
                    playing.append(asyncio.create_task(self._users.play(tenant, plan)))
                await asyncio.sleep(self._dice.uniform(*REST_S))
                await self._strike(number, fault, prober)
            tell("the last fault is over; waiting for every run to end")
            await self._finish(playing)
            await asyncio.gather(*(self._fill(tenant) for tenant in tenants))
            self._measured.took_s = time.monotonic() - self._begun_s
            await self._until_no_socket_is_counted()
        finally:
            for task in (*playing, *deciding):
                task.cancel()
            await asyncio.gather(*playing, *deciding, return_exceptions=True)
            keeping.cancel()
            ended = await asyncio.gather(keeping, return_exceptions=True)
            self._measured.faults += [
                f"what keeps servers alive failed: {each!r}" for each in ended if isinstance(each, Exception)
            ]

    async def _finish(self, playing: Iterable[asyncio.Task[None]]) -> None:
        """Wait for the users, and then for the runs that nobody follows."""
        _, late = await asyncio.wait(playing, timeout=END_PATIENCE_S)
        if late:
            self._measured.faults.append(f"{len(late)} users did not come to an end in {END_PATIENCE_S:g} s")
        for task in playing:
            if task.done() and (fault := task.exception()) is not None:
                self._measured.faults.append(f"a user failed: {fault!r} {getattr(fault, 'exceptions', '')}")
        await within(END_PATIENCE_S, self._until_all_ended())

    async def _until_all_ended(self) -> None:
        while await self._world.eye.rows("SELECT 1 FROM runs WHERE ended_at IS NULL LIMIT 1"):  # noqa: ASYNC110
            await asyncio.sleep(0.2)

    async def _fill(self, tenant: Tenant) -> None:
        """See that a workspace has all its places again: take them at once, and give them back."""
        body = {"workspace_id": tenant.workspace_id, "agent_id": tenant.agents["slow"]}
        await asyncio.sleep(2)  # its rate is full again
        for number in range(PLACES):
            key = f"fill-{number}"
            answer = await self._users.ask(
                tenant, "POST", "/api/runs/", {**body, "metadata": {"key": f"{tenant.workspace_id}-{key}"}}, key
            )
            if answer is None or answer.status_code != 200:
                said = "no answer" if answer is None else answer.text
                self._measured.faults.append(
                    f"place {number + 1} of workspace {tenant.workspace_id} is not free: {said}"
                )
                continue
            run_id = answer.json()["run_id"]
            self._users.known.accepted[f"{tenant.workspace_id}-{key}"] = run_id
            self._users.known.cancels_asked.add(run_id)
        for run_id in [each for key, each in self._users.known.accepted.items() if key.startswith(tenant.workspace_id)]:
            await self._users.ask(tenant, "POST", f"/api/runs/{run_id}/cancel/", {})

    async def _until_no_socket_is_counted(self) -> None:
        """See that no socket's place is held in Redis: those of killed processes lapse by themselves."""

        async def look() -> None:
            while await self._places_held():  # noqa: ASYNC110 - what lapses, lapses in Redis
                await asyncio.sleep(0.5)

        if not await within(60, look()):
            self._measured.faults.append(
                f"{await self._places_held()} places of sockets are held, and no socket is open"
            )

    async def _places_held(self) -> int:
        seconds, microseconds = await self._world.redis.time()
        now_ms = seconds * 1000 + microseconds // 1000
        return sum(
            [
                await self._world.redis.zcount(key, now_ms, "+inf")
                async for key in self._world.redis.scan_iter("plimsoll:{sockets}:*")
            ]
        )

    async def _strike(self, number: int, fault: str | tuple[str, Fault], prober: Tenant) -> None:
        """Strike once and measure how long everything takes to go on."""
        kind = fault if isinstance(fault, str) else f"{fault[0]}: {fault[1]}"
        begun_s = time.monotonic()
        await self._hit(fault)
        over_s = time.monotonic()
        due, requests_s, work_s = await self._recovery(f"probe-{number}", prober)
        struck = Struck(kind, kind in KILLS, begun_s - self._begun_s, over_s - begun_s, requests_s, work_s, due)
        self._measured.struck.append(struck)
        tell(
            f"{number + 1}: {kind} for {struck.lasted_s:.1f} s, {due} runs due;"
            f" requests go on after {told(requests_s)}, work after {told(work_s)}"
        )

    async def _hit(self, fault: str | tuple[str, Fault]) -> None:
        """Return when the fault is over."""
        world = self._world
        if isinstance(fault, tuple):
            server, what = fault
            world.proxies.switch(server, what)
            try:
                await asyncio.sleep(self._dice.uniform(*EPISODE_S))
            finally:
                world.proxies.switch(server, Fault.NONE)
            return
        hits: dict[str, Callable[[], Awaitable[Any]]] = {
            "HTTP process killed": lambda: world.kill_child("serve", self._dice),
            "worker killed": lambda: world.kill_child("worker", self._dice),
            "HTTP supervisor killed": lambda: world.kill_supervisor("serve"),
            "worker supervisor killed": lambda: world.kill_supervisor("worker"),
            "PostgreSQL backend killed": lambda: world.kill_backend(self._dice),
            "PostgreSQL killed": lambda: world.kill_server("PostgreSQL"),
            "Redis killed": lambda: world.kill_server("Redis"),
            FLUSHALL: lambda: world.redis.flushall(),
        }
        await hits[fault]()
        await world.until_servers_answer()

    async def _recovery(self, name: str, prober: Tenant) -> tuple[int, float | None, float | None]:
        """Return how many runs are due, and the seconds until requests and those runs go on."""
        begun_s = time.monotonic()
        due = await self._world.eye.rows(DUE)
        requests = asyncio.create_task(
            within(RECOVERY_PATIENCE_S, self._users.accept_side_by_side(prober, SIDE_BY_SIDE, name))
        )
        work = asyncio.create_task(within(RECOVERY_PATIENCE_S, until_advanced(self._world.eye, due, begun_s)))
        return len(due), *await asyncio.gather(requests, work)


DUE = """
    SELECT run_id, ticks, step_due_at, tool_call_id FROM runs
    WHERE ended_at IS NULL AND status <> 'PAUSED' AND step_due_at <= now()
"""
STILL_DUE = """
    SELECT r.run_id FROM runs r JOIN unnest($1::uuid[], $2::int[], $3::timestamptz[], $4::uuid[])
        AS d(run_id, ticks, step_due_at, tool_call_id) ON d.run_id = r.run_id
    WHERE r.ended_at IS NULL AND r.status <> 'PAUSED' AND r.ticks = d.ticks AND r.step_due_at = d.step_due_at
        AND r.tool_call_id IS NOT DISTINCT FROM d.tool_call_id LIMIT 1
"""


async def until_advanced(eye: Eye, due: list[dict[str, Any]], begun_s: float) -> float:
    """Return the seconds since `begun_s` when every one of these runs has been advanced, has ended or is paused."""
    columns = [[row[name] for row in due] for name in ("run_id", "ticks", "step_due_at", "tool_call_id")]
    while await eye.rows(STILL_DUE, *columns):  # noqa: ASYNC110 - what moves, moves in the database
        await asyncio.sleep(0.05)
    return time.monotonic() - begun_s


async def within(patience_s: float, what: Awaitable[Any]) -> Any:
    """Return what something returns (True for nothing), or None when it takes longer than the campaign's patience."""
    try:
        async with asyncio.timeout(patience_s):
            result = await what
    except TimeoutError:
        return None
    return True if result is None else result


async def count_rows(eye: Eye) -> tuple[Counter[str], Counter[str]]:
    """Return what the database holds, and how its runs ended."""
    (rows,) = await eye.rows("""
        SELECT count(*) FILTER (WHERE parent_run_id IS NULL) AS parents, sum(ticks) AS ticks,
               count(*) FILTER (WHERE parent_run_id IS NOT NULL) AS subruns,
               (SELECT count(*) FROM events) AS events, (SELECT count(*) FROM tool_calls) AS "tool calls" FROM runs
    """)
    statuses = await eye.rows("SELECT status, count(*) AS runs FROM runs GROUP BY status")
    return Counter({name: int(count) for name, count in rows.items()}), Counter(
        {r["status"]: r["runs"] for r in statuses}
    )


async def until_up(http: httpx.AsyncClient) -> None:
    """Return when the service can serve."""
    async with asyncio.timeout(60):
        while True:
            with suppress(httpx.TransportError):
                if (await http.get("/readyz")).status_code == 200:
                    return
            await asyncio.sleep(0.1)


async def measure(world: World, url: str, measured: Measured) -> None:
    """Run the campaign, stop the service, and audit."""
    count = max(2, min(10, measured.runs // 15))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=50)
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_PATIENCE_S, limits=limits) as http:
        await until_up(http)
        database = Database(world.stack.database_url)
        tenants = [await make_tenant(database, http, f"workspace {number + 1}") for number in range(count)]
        prober = await make_tenant(database, http, "probes", "calibration")
        await database.close()
        users = Users(url, http)
        tell(f"the service is up; {measured.runs} runs in {count} workspaces, {measured.kills} kills")
        await Campaign(world, users, measured).run(tenants, prober)
    codes = await world.drain_service()
    measured.faults += [
        f"{name} ended with {code} when it was told to stop" for name, code in codes.items() if code != 0
    ]
    measured.faults += await audit(world.eye.rows, users.known, read_effects(world.effects))
    measured.rows, measured.statuses = await count_rows(world.eye)
    measured.answers, measured.restarts = users.known.answers, world.restarts
    measured.errors_logged = world.errors_logged()
    await world.eye.close()
    await world.redis.aclose()


def run_campaign(runs: int, kills: int, seed: int, keep: Path | None = None) -> Measured:
    """Run a campaign in a temporary folder; the service's log is kept in `keep`, when given."""
    measured = Measured(runs, kills, seed, RECOVERY_PATIENCE_S)
    with tempfile.TemporaryDirectory(prefix="plimsoll-chaos-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # PostgreSQL's user passes through it when this runs as root
        with World(folder) as world:
            try:
                migrate(world.stack.database_url)
                asyncio.run(measure(world, world.start_service(), measured))
            finally:
                if keep is not None and world.log.exists():
                    keep.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(world.log, keep)
    return measured


def main() -> int:
    """Run the campaign, write the page, and return the exit code."""
    parser = Flags("chaos", __doc__)
    parser.add_argument("--runs", type=int, default=2000, help="runs that users create (their subruns come on top)")
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs; other faults come on top")
    parser.add_argument("--seed", type=int, default=1, help="decides plans, faults and their order")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the evidence is written")
    parser.add_argument("--log", type=Path, default=LOG, help="where the log of the service's processes is kept")
    asked = parser.parse_args()
    if asked.runs < 1 or asked.kills < 1:
        parser.error("--runs and --kills: give at least 1")
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with suppress(KeyboardInterrupt):
        measured = run_campaign(asked.runs, asked.kills, asked.seed, keep=asked.log)
        asked.page.write_text(page(measured), encoding="utf-8")
        for fault in measured.faults:
            tell(f"BROKEN: {fault}")
        for line in measured.errors_logged[:20]:
            tell(f"logged: {line[:2000]}")
        tell(f"{asked.page}: {'; '.join(measured.verdicts())}; the service's log is in {asked.log}")
        return 0 if measured.passed else 1
    tell("stopped; everything that was started has been ended")
    return 130


def tell(line: str) -> None:
    """Say what is going on."""
    sys.stdout.write(f"chaos: {line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
