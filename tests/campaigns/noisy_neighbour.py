"""A noisy neighbour: `make noisy-neighbour` measures what one costs, and writes docs/evidence/noisy-neighbour.md.

An HTTP process and two workers on real PostgreSQL and Redis. A quiet workspace creates short runs at a steady rate.
Its neighbour holds as many runs as would take a hundred times its tick rate. In windows that follow each other the
quiet one is alone (the neighbour's runs are paused), beside the neighbour, and beside it with the neighbour's tick rate
lifted, which shows what the backstop does. In the end the rate is lifted and everything must end. Exit code 1 when
something was lost, the neighbour had more turns than it may, or the quiet one's tick wait at p95 was more than twice
that alone: `noisy_neighbour_report` judges.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import itertools
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import text

from harness.client import Client
from service.auth import issue_token
from service.db import Database, migrate
from service.embedded import Stack
from service.quota.limits import DEFAULT, Limit
from service.quota.overrides import clear_override, set_override
from service.settings import settings_for
from service.workspaces import create_agent, create_workspace
from tests.campaigns.flags import Flags
from tests.campaigns.noisy_neighbour_report import Kind, Measured, Window, page
from tests.campaigns.servers import running

PAGE = Path("docs/evidence/noisy-neighbour.md")

WORKERS = 2
NOISE = 100  # times the tick rate, were it held by nobody
LATENCY_MS = 100.0  # of the neighbour's steps
STEPS = 60  # of the neighbour's runs
QUIET_PER_S = 8.0  # creates, of two turns each
REPEATS, WINDOW_S = 5, 5.0
SETTLE_S = 1.5  # between two windows: a change of rate is in force, and what it left behind is done
AT_ONCE = 32  # requests of the neighbour
PATIENCE_S = 90.0  # for runs to end

WAITS = text("""
    SELECT CAST(extract(epoch FROM started_at - created_at) AS float8) AS first_s,
           CAST(extract(epoch FROM ended_at - started_at) AS float8) AS second_s
    FROM runs WHERE workspace_id = :workspace_id AND created_at >= :began_at AND created_at < :ended_at
        AND status = 'COMPLETED'
""")
"""Of a run of two turns without latencies: each is due when the one before was written, or the run was accepted."""
TURNS = text("""
    SELECT CAST(extract(epoch FROM s.created_at - :began_at) AS float8) AS at_s FROM steps s JOIN runs USING (run_id)
    WHERE workspace_id = :workspace_id AND s.created_at >= :began_at AND s.created_at < :ended_at ORDER BY s.created_at
""")
CLAIMS = text("SELECT sum(epoch) AS claims, sum(ticks) AS turns, now() AS at FROM runs WHERE workspace_id = :id")
LIVE = text("SELECT run_id, status FROM runs WHERE workspace_id = :id AND ended_at IS NULL")
STATUSES = text("""
    SELECT status || CASE WHEN step_count = :steps THEN '' ELSE ' after ' || step_count || ' steps' END AS how,
           count(*) AS runs
    FROM runs WHERE workspace_id = :id GROUP BY 1
""")


class Tenant:
    """A workspace of the class `default`, its agent, and what it was told about its runs."""

    def __init__(self, client: Client, workspace_id: uuid.UUID, agent_id: uuid.UUID, token: str) -> None:
        self._client = client
        self.workspace_id = workspace_id
        self._token = token
        self._create = msgspec.json.encode({"workspace_id": workspace_id, "agent_id": agent_id})
        self.accepted = 0
        self.refused = 0

    @classmethod
    async def make(cls, client: Client, database: Database, steps: int, latency_ms: float) -> Tenant:
        """Make one whose runs have so many steps."""
        step: dict[str, Any] = {"kind": "MESSAGE"}
        script = [step, *[{**step, "latency_ms": latency_ms}] * (steps - 1)]  # so that every turn writes a step
        async with database.begin() as connection:
            workspace_id = await create_workspace(connection, "neighbours", "default")
            agent_id = await create_agent(connection, workspace_id, "agent", script)
            token = (await issue_token(connection, workspace_id, "OPERATOR")).token
        return cls(client, workspace_id, agent_id, token)

    async def create(self) -> None:
        """Ask for a run."""
        path, body = "/api/runs/", self._create
        status = (await self._client.exchange(self._client.wire("POST", path, self._token, body))).status
        self.accepted += status == 200
        self.refused += status != 200

    async def control(self, verb: str, run_id: uuid.UUID) -> None:
        """Pause or resume a run, if it can be."""
        wire = self._client.wire("POST", f"/api/runs/{run_id}/{verb}/", self._token, b"{}")
        status = (await self._client.exchange(wire)).status
        if status not in (200, 409):
            raise RuntimeError(f"{verb} was answered {status}")


class Neighbours:
    """The quiet workspace, the noisy one, and what is done to them."""

    def __init__(self, database: Database, quiet: Tenant, noisy: Tenant, repeats: int, window_s: float) -> None:
        self._database = database
        self.quiet = quiet
        self.noisy = noisy
        self._repeats = repeats
        self._window_s = window_s
        self.windows: list[Window] = []
        rate = DEFAULT.rates[Limit.TICK]
        self._crowd = int(NOISE * rate.per_s * Fraction(LATENCY_MS) / 1000)  # runs

    async def run(self) -> Measured:
        """Let the windows follow each other, in another order each time, and let everything end."""
        await self._lift_all_but_ticks()
        orders = itertools.cycle(itertools.permutations(Kind))
        async with self._steady():
            for _ in range(self._repeats):
                for kind in next(orders):
                    await self._window(kind)
        await self._make(Kind.WITHOUT)
        statuses = [await self._settled(tenant, steps) for tenant, steps in ((self.quiet, 2), (self.noisy, STEPS))]
        return Measured(
            self.windows,
            DEFAULT.rates[Limit.TICK],
            float(NOISE * DEFAULT.rates[Limit.TICK].per_s),
            (self.quiet.accepted, self.noisy.accepted),
            (statuses[0], statuses[1]),
            self.quiet.refused,
        )

    async def _window(self, kind: Kind) -> None:
        """Make a state of things, wait until it is so, and see how the two fare in it."""
        await self._make(kind)
        await asyncio.sleep(SETTLE_S)
        before = await self._read(self.noisy)
        await asyncio.sleep(self._window_s)
        after = await self._read(self.noisy)
        began_at, ended_at = before[2], after[2]
        await asyncio.sleep(0.5)  # for the last runs of the window to end
        span = {"began_at": began_at, "ended_at": ended_at}
        async with self._database.read() as connection:
            waits = [*await connection.execute(WAITS, {"workspace_id": self.quiet.workspace_id, **span})]
            turns = [*await connection.execute(TURNS, {"workspace_id": self.noisy.workspace_id, **span})]
        self.windows.append(
            Window(
                kind,
                (ended_at - began_at).total_seconds(),
                [1e3 * each for row in waits for each in row],
                [row.at_s for row in turns],
                after[0] - before[0],
                after[1] - before[1],
            )
        )
        tell(self.windows[-1].told())

    async def _make(self, kind: Kind) -> None:
        """Pause the neighbour's runs, or have as many going as it takes, with its tick rate or without."""
        async with self._database.begin() as connection:
            if kind is Kind.WITHOUT:
                await set_override(connection, self.noisy.workspace_id, Limit.TICK, None, "campaign")
            else:
                await clear_override(connection, self.noisy.workspace_id, Limit.TICK)
        async with self._database.read() as connection:
            live = {row.run_id: row.status for row in await connection.execute(LIVE, {"id": self.noisy.workspace_id})}
        if kind is Kind.ALONE:
            await many(lambda run_id: self.noisy.control("pause", run_id), live)
        else:
            paused = [run_id for run_id, status in live.items() if status == "PAUSED"]
            await many(lambda run_id: self.noisy.control("resume", run_id), paused)
            await many(lambda _: self.noisy.create(), range(self._crowd - len(live)))

    async def _read(self, tenant: Tenant) -> tuple[int, int, dt.datetime]:
        async with self._database.read() as connection:
            row = (await connection.execute(CLAIMS, {"id": tenant.workspace_id})).one()
        return row.claims or 0, row.turns or 0, row.at

    async def _settled(self, tenant: Tenant, steps: int) -> dict[str, int]:
        """Return how many of a tenant's runs ended how, when all have ended or patience has."""
        give_up_at = time.monotonic() + PATIENCE_S
        while True:
            async with self._database.read() as connection:
                found = await connection.execute(STATUSES, {"id": tenant.workspace_id, "steps": steps})
                statuses = {row.how: row.runs for row in found}
            if set(statuses) == {"COMPLETED"} or time.monotonic() > give_up_at:
                return statuses
            await asyncio.sleep(0.2)

    async def _lift_all_but_ticks(self) -> None:
        """Let the neighbour hold as many runs as it wants, created as fast as it can."""
        async with self._database.begin() as connection:
            for limit in (Limit.RUN_CREATION, Limit.LIVE_RUNS, Limit.LIVE_PARENT_RUNS):
                await set_override(connection, self.noisy.workspace_id, limit, None, "campaign")

    @asynccontextmanager
    async def _steady(self) -> AsyncIterator[None]:
        """Have the quiet workspace create runs on schedule, whatever becomes of them."""
        ending, tasks = asyncio.Event(), set[asyncio.Task[None]]()

        async def create_on_schedule() -> None:
            started_s = time.monotonic()
            for number in itertools.count():
                await asyncio.sleep(started_s + number / QUIET_PER_S - time.monotonic())
                if ending.is_set():
                    return
                task = asyncio.create_task(self.quiet.create())
                tasks.add(task)
                task.add_done_callback(tasks.discard)

        creating = asyncio.create_task(create_on_schedule())
        yield
        ending.set()
        await creating
        await asyncio.gather(*tasks)


async def many(ask: Callable[[Any], Awaitable[None]], over: Iterable[Any]) -> None:
    """Ask for each, a few at a time."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(each: Any) -> None:
        async with gate:
            await ask(each)

    await asyncio.gather(*map(one, over))


async def measure(stack: Stack, url: str, repeats: int, window_s: float) -> Measured:
    """Measure on a running service."""
    database, client = Database(stack.database_url), Client(url)
    quiet = await Tenant.make(client, database, 2, 0.0)
    noisy = await Tenant.make(client, database, STEPS, LATENCY_MS)
    measured = await Neighbours(database, quiet, noisy, repeats, window_s).run()
    await client.close()
    await database.close()
    return measured


def run(folder: Path, repeats: int, window_s: float) -> Measured:
    """Run everything on a stack in the folder."""
    with Stack(folder / "stack") as stack:
        migrate(stack.database_url)
        with running(settings_for(stack.database_url, stack.redis_url), 1, WORKERS) as url:
            return asyncio.run(measure(stack, url, repeats, window_s))


def main() -> int:
    """Run the campaign, write the page, and return the exit code."""
    parser = Flags("noisy_neighbour", __doc__)
    parser.add_argument("--seconds", type=float, default=WINDOW_S, help="how long each window is, seconds")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="how often each kind of window comes")
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write what was found")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="plimsoll-neighbour-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # PostgreSQL's user passes through it when this runs as root
        measured = run(folder, arguments.repeats, arguments.seconds)
    arguments.page.write_text(page(measured), encoding="utf-8")
    for sentence in measured.verdicts() + measured.faults() + measured.misses():
        tell(sentence)
    return 1 if measured.faults() or measured.misses() else 0


def tell(line: str) -> None:
    """Say what is going on."""
    sys.stdout.write(f"noisy-neighbour: {line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
