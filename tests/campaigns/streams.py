"""The streams' campaign: `make streams` measures what docs/streams.md promises, and writes docs/evidence/streams.md.

200 sockets over 20 workspaces, all under the default quota, on one real HTTP process with real PostgreSQL and Redis.
First 1,000 forced reconnects while events are written: every client must have seen every event once. Then rounds with
and without clients that stall, in turn: each of those must be evicted, and the p95 of all others is compared. Exit code
1 when an event was missed or seen twice, or a stalled client stayed. Nothing is asserted about time.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from service.auth import issue_token
from service.db import Database, migrate
from service.embedded import Stack
from service.serve import address_of, listen
from service.settings import child_environment, settings_for
from service.workspaces import create_agent, create_workspace
from tests.campaigns.flags import Flags
from tests.campaigns.stream_clients import DICE, Follower, Stalled, Watcher
from tests.campaigns.streams_report import Measured, Phase, page
from tests.sockets import Writer, open_writer

PAGE = Path("docs/evidence/streams.md")

WORKSPACES, RUNS_EACH, FOLLOWERS_EACH_RUN, WATCHERS_EACH = 20, 2, 4, 2  # 20 * (2 * 4 + 2) = 200 sockets
RECONNECTS, RECONNECTS_PER_S = 1_000, 50.0
EVENTS_PER_S = 100.0  # over all runs
ROUNDS, ROUND_S = 5, 5.0  # with stalled clients, and as many without
STALLED = 3  # in each round with stalled clients
HOT_EVENTS_PER_S, HOT_FILLER = 100.0, "x" * 8_000  # of the one run that they follow
PATIENCE_S = 20.0  # for what is on its way when writing ends


@dataclass
class World:
    """All clients, and what they follow."""

    http: httpx.AsyncClient
    writer: Writer
    followers: list[Follower]
    watchers: list[Watcher]
    last_seq: dict[str, int]  # of each run
    spare_tokens: dict[str, str]  # of each run: a token with which nobody follows it

    @property
    def clients(self) -> list[Follower | Watcher]:
        """All who read."""
        return [*self.followers, *self.watchers]

    def take_delays_ms(self) -> list[float]:
        """Return the delays of all pushes since the last call."""
        delays: list[float] = []
        for client in self.clients:
            delays += client.delays_ms
            client.delays_ms = []
        return delays

    @asynccontextmanager
    async def writing(self, events_per_s: float, run_ids: Sequence[str], filler: str) -> AsyncIterator[None]:
        """Append events to runs in turn, at a steady rate, for as long as the block lasts."""
        ending = asyncio.Event()

        async def write() -> None:
            loop = asyncio.get_running_loop()
            started_at, written = loop.time(), 0
            while not ending.is_set():
                run_id = run_ids[written % len(run_ids)]
                self.last_seq[run_id] = await self.writer.append(run_id, payload={"filler": filler})
                written += 1
                await asyncio.sleep(max(0.0, started_at + written / events_per_s - loop.time()))

        task = asyncio.create_task(write())
        try:
            yield
        finally:
            ending.set()  # not cancelled: what was committed must be counted
            await task

    def faults(self) -> list[str]:
        """Return what is missing, doubled or out of order at any client."""
        return [fault for client in self.clients for fault in client.faults(self.last_seq)]

    async def connected(self) -> None:
        """Return when every client has its first push."""
        while not all(  # noqa: ASYNC110 - what arrives, arrives from another process
            client.seen if isinstance(client, Follower) else client.listed for client in self.clients
        ):
            await asyncio.sleep(0.1)

    async def settle(self) -> list[str]:
        """Return the faults that are left when everything on its way has had time to arrive."""
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while self.faults():  # noqa: ASYNC110 - what arrives, arrives from another process
                    await asyncio.sleep(0.1)
        return self.faults()


async def make_world(url: str, http: httpx.AsyncClient, database: Database, writer: Writer) -> World:
    """Make the workspaces, their runs and their clients, none of them connected yet."""
    world = World(http, writer, [], [], {}, {})
    for _ in range(WORKSPACES):
        async with database.begin() as connection:
            workspace_id = await create_workspace(connection, "campaign", "default")
            agent_id = await create_agent(connection, workspace_id, "agent")
            # A token may have five sockets open: two for the ten clients, one for those that stall.
            tokens = [(await issue_token(connection, workspace_id, "OPERATOR")).token for _ in range(3)]
        places = iter([tokens[0]] * 5 + [tokens[1]] * 5)
        for _ in range(RUNS_EACH):
            answer = await http.post(
                "/api/runs/",
                json={"workspace_id": str(workspace_id), "agent_id": str(agent_id)},
                headers={"authorization": f"Bearer {tokens[0]}"},
            )
            run_id = answer.raise_for_status().json()["run_id"]
            world.last_seq[run_id], world.spare_tokens[run_id] = 1, tokens[2]
            world.followers += [Follower(url, next(places), run_id) for _ in range(FOLLOWERS_EACH_RUN)]
        world.watchers += [Watcher(url, next(places), workspace_id) for _ in range(WATCHERS_EACH)]
    return world


async def reconnect_at_random(world: World) -> Phase:
    """Break connections off while events are written."""
    broken, loop = 0, asyncio.get_running_loop()
    started_at = loop.time()
    async with world.writing(EVENTS_PER_S, list(world.last_seq), ""):
        while broken < RECONNECTS:
            broken += DICE.choice(world.followers).break_off()
            await asyncio.sleep(max(0.0, started_at + broken / RECONNECTS_PER_S - loop.time()))
    return Phase("1,000 reconnects", loop.time() - started_at, world.take_delays_ms())


async def load(world: World, stalled: Sequence[Stalled]) -> tuple[Phase, float]:
    """Write for one round, with clients that stall or without; returns the seconds until the last was evicted."""
    hot, loop, evicted = next(iter(world.last_seq)), asyncio.get_running_loop(), asyncio.Event()
    before, started_at, evicted_after_s = await evictions(world.http), loop.time(), 0.0
    stalling = [asyncio.create_task(each.stall_until(evicted)) for each in stalled]
    async with (
        world.writing(EVENTS_PER_S, list(world.last_seq), ""),
        world.writing(HOT_EVENTS_PER_S, [hot], HOT_FILLER),
    ):
        while (took_s := loop.time() - started_at) < ROUND_S or (not evicted_after_s and took_s < PATIENCE_S):
            await asyncio.sleep(0.2)
            # Asked in rounds of both kinds, so that asking weighs on both.
            if await evictions(world.http) - before >= len(stalled) and not evicted_after_s:
                evicted_after_s = loop.time() - started_at
        phase = Phase("with stalled clients" if stalled else "without", took_s, world.take_delays_ms())
    evicted.set()
    await asyncio.gather(*stalling)
    world.take_delays_ms()
    return phase, evicted_after_s


async def evictions(http: httpx.AsyncClient) -> int:
    """Return how many clients the service has evicted so far."""
    figures = (await http.get("/metrics")).text
    (line,) = [line for line in figures.splitlines() if line.startswith("plimsoll_slow_clients_evicted_total ")]
    return int(float(line.split()[1]))


async def run_campaign(url: str, database: Database, writer: Writer) -> Measured:
    """Run all phases."""
    async with httpx.AsyncClient(base_url=url, timeout=30) as http, asyncio.TaskGroup() as group:
        world = await make_world(url, http, database, writer)
        following = [group.create_task(client.follow()) for client in world.clients]
        await world.connected()
        world.take_delays_ms()
        tell("200 sockets are open; 1,000 reconnects follow")
        phases = [await reconnect_at_random(world)]
        faults = await world.settle()
        ends = sum((follower.ends for follower in world.followers), Counter[str]())
        codes: list[int | None] = []
        evicted_after_s: list[float] = []
        hot = next(iter(world.last_seq))
        for number in range(ROUNDS):
            tell(f"round {number + 1} of {ROUNDS}, without stalled clients and with them")
            for count in (0, STALLED) if number % 2 else (STALLED, 0):
                token, last = world.spare_tokens[hot], world.last_seq[hot]
                stalled = [Stalled(url, token, hot, last) for _ in range(count)]
                phase, after_s = await load(world, stalled)
                phases.append(phase)
                codes += [each.code for each in stalled]
                evicted_after_s += [after_s] * bool(stalled)
        faults += await world.settle()
        for task in following:
            task.cancel()
    return Measured(phases, faults, ends, codes, evicted_after_s, dict(world.last_seq))


@contextmanager
def service(environment: dict[str, str]) -> Iterator[str]:
    """Run one HTTP process; yields its URL."""
    with listen("127.0.0.1", 0) as listener:
        number = listener.fileno()
        process = subprocess.Popen(  # noqa: S603 - our own
            [sys.executable, "-m", "service", "serve", "--fd", str(number)], env=environment, pass_fds=[number]
        )
        url = address_of(listener)
    try:
        httpx.get(f"{url}/livez", timeout=30).raise_for_status()
        yield url
    finally:
        process.terminate()
        process.wait(30)


def main() -> int:
    """Run the campaign on a stack of its own, write the page, and return the exit code."""
    parser = Flags("streams", __doc__)
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write what was found")
    to: Path = parser.parse_args().page
    with tempfile.TemporaryDirectory(prefix="plimsoll-streams-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # PostgreSQL's user passes through it when this runs as root
        with Stack(folder / "stack") as stack:
            migrate(stack.database_url)
            settings = settings_for(stack.database_url, stack.redis_url)
            with service(child_environment(settings)) as url:
                measured = asyncio.run(measure(url, stack))
    to.write_text(page(measured), encoding="utf-8")
    tell(f"{to}: {'; '.join(measured.verdicts())}")
    return 0 if measured.passed else 1


async def measure(url: str, stack: Stack) -> Measured:
    """Open what the campaign itself needs, and run it."""
    database = Database(stack.database_url)
    async with open_writer(database, stack.redis_url) as writer:
        measured = await run_campaign(url, database, writer)
    await database.close()
    return measured


def tell(line: str) -> None:
    """Say what is going on."""
    sys.stdout.write(f"streams: {line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
