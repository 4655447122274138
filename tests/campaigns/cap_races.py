"""Caps: `make cap-races` races a million times for the places of each cap, and writes docs/evidence/cap-races.md.

Several processes (`cap_racers`) ask at once on real PostgreSQL and Redis. After each round every place that was ever
taken or given back is replayed in order (`cap_audit`): never more than the cap, nothing left, counters equal to rows.
Then each pool is filled once more: exactly its cap fits in. While the race is on an observer counts rows by itself.
After that `cap_slots` measures on HTTP processes how soon a place can be used again. Exit code 1 when something is
wrong.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import redis
from sqlalchemy import text

from service.db import Database, migrate
from service.embedded import Stack
from service.embedded.postgres import SETTINGS
from service.quota.limits import DEFAULT, Limit
from tests.campaigns.cap_arena import CALLS, SOCKETS, Arena
from tests.campaigns.cap_audit import (
    CALL_CHANGES,
    COUNTERS,
    ROWS,
    RUN_CHANGES,
    SAMPLES,
    WAITING,
    Change,
    Monitored,
    pool_of,
    replay,
)
from tests.campaigns.cap_racers import SHORT_LEASE_S, Field, Round, Start, Told
from tests.campaigns.cap_races_report import Result, page, sentence
from tests.campaigns.cap_slots import measure_slots
from tests.campaigns.flags import Flags
from tests.tenants import FAULTS

PAGE = Path("docs/evidence/cap-races.md")
CAPS = (
    Limit.LIVE_PARENT_RUNS,
    Limit.LIVE_RUNS,
    Limit.PENDING_SUBRUNS,
    Limit.PENDING_TOOL_CALLS,  # each of its attempts is one on the run's own cap as well, which is replayed with it
    Limit.PENDING_TOOL_CALLS_PER_RUN,
    Limit.WEBSOCKETS,
    Limit.WEBSOCKETS_PER_USER,
)

ATTEMPTS = 1_000_000  # on each cap
ROUND = 50_000  # attempts between two audits
PROCESSES = 2
CALLERS = 256  # of each process
SAMPLE_EVERY_S = 0.02
PATIENCE_S = 900.0  # for a round


class Racers:
    """The processes, by the pipes to them."""

    def __init__(self, processes: Sequence[asyncio.subprocess.Process]) -> None:
        self._processes = processes

    async def race(self, limit: Limit, attempts: int, fields: list[Field], hold_s: float) -> list[Told]:
        """Have all of them race at once."""
        share = -(-attempts // len(self._processes))
        line = msgspec.json.encode(Round(limit, share, CALLERS, fields, hold_s)) + b"\n"
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(line)
        return list(await asyncio.gather(*map(self._answer, self._processes)))

    @staticmethod
    async def _answer(process: asyncio.subprocess.Process) -> Told:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), PATIENCE_S)
        if not line:
            raise RuntimeError("a racing process ended early; see what it wrote")
        return msgspec.json.decode(line, type=Told)


@asynccontextmanager
async def racing(database_url: str, redis_url: str, count: int, mutant: str | None) -> AsyncIterator[Racers]:
    """Start the processes; they end with their stdin."""
    command = [sys.executable, "-m", "tests.campaigns.cap_racers"]
    pipe = asyncio.subprocess.PIPE
    processes = [await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe) for _ in range(count)]
    try:
        for number, process in enumerate(processes):
            assert process.stdin is not None
            start = Start(f"racer-{number}", number, database_url, redis_url, mutant)
            process.stdin.write(msgspec.json.encode(start) + b"\n")
        yield Racers(processes)
    finally:
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in processes:
            try:
                await asyncio.wait_for(process.wait(), 10)
            except TimeoutError:
                process.kill()
                await process.wait()


async def observe(arena: Arena, result: Result, fields: Sequence[Field], over: asyncio.Event) -> None:
    """Count rows again and again while others race, in a statement of its own each time."""
    held = text(f"SELECT coalesce(max(held), 0) AS most, ({WAITING}) AS waiting FROM ({SAMPLES[result.limit]}) pools")  # noqa: S608 - constants
    ids = {"ids": [field.workspace_id for field in fields]}
    while not over.is_set():
        async with arena.database.read() as connection:
            seen = (await connection.execute(held, ids)).one()
        result.samples += 1
        result.sampled_peak = max(result.sampled_peak, seen.most)
        result.sampled_full += seen.most >= result.most
        result.sampled_waiting += seen.waiting > 0
        await asyncio.sleep(SAMPLE_EVERY_S)


class Listener:
    """Reads what Redis tells about every command, in a thread of its own."""

    def __init__(self, redis_url: str, monitored: Monitored) -> None:
        self._monitored = monitored
        self._client = redis.Redis.from_url(redis_url, socket_timeout=None)  # racers may be long in coming
        self._connection = cast("Any", self._client.connection_pool.get_connection())
        self._connection.send_command("MONITOR")
        self._connection.read_response()
        self._mark = f"mark-{uuid.uuid4().hex}"
        self._thread = threading.Thread(target=self._listen, name="monitor")
        self._thread.start()

    def end(self) -> None:
        """Return when everything that was executed until now was read."""
        with redis.Redis(connection_pool=self._client.connection_pool) as other:
            other.echo(self._mark)
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            raise RuntimeError("what Redis told was not read to its end")
        self._connection.disconnect()
        self._client.close()

    def _listen(self) -> None:
        rest, mark = b"", self._mark.encode()
        while True:
            chunk = self._connection._sock.recv(1 << 20)
            *lines, rest = (rest + chunk).split(b"\r\n")
            for line in lines:
                if mark in line:
                    return
                self._monitored.read(line)
            if not chunk:
                return


async def race_rows(arena: Arena, result: Result, racers: Racers, attempts: int) -> None:
    """One round for a cap that PostgreSQL holds, and its audit."""
    fields = await arena.fields(result.limit)
    over = asyncio.Event()
    observing = asyncio.create_task(observe(arena, result, fields, over))
    add(result.told, await racers.race(result.limit, attempts, fields, arena.hold_s))
    over.set()
    await observing
    if result.limit not in CALLS:
        result.history.left += await live_holders(arena, fields)
    else:
        await arena.end_all(fields)  # calls that wait end with their runs
    await audit(arena, result, fields)
    refilled = await arena.refill(result.limit, fields)
    result.refilled += sum(refilled)
    if not all(refilled):
        result.faults.append(f"after round {result.rounds}, not every pool took exactly its cap again")
    await arena.end_all(fields)


async def live_holders(arena: Arena, fields: Sequence[Field]) -> int:
    """Return how many runs are live beside the standing ones: all of them have ended by now."""
    standing = [run_id for field in fields for run_id in field.parents]
    live = text("""
        SELECT count(*) FROM runs WHERE workspace_id = ANY(:ids) AND ended_at IS NULL AND run_id <> ALL(:standing)
    """)
    async with arena.database.read() as connection:
        ids = {"ids": [field.workspace_id for field in fields], "standing": standing}
        return int((await connection.execute(live, ids)).scalar_one())


async def audit(arena: Arena, result: Result, fields: Sequence[Field]) -> None:
    """Replay what the tables tell, and compare counters with rows."""
    ids = {"ids": [field.workspace_id for field in fields]}
    calls = result.limit in CALLS
    changes, runs = [], dict[str, str]()
    async with arena.database.read() as connection:
        for row in await connection.execute(CALL_CHANGES if calls else RUN_CHANGES, ids):
            parent, holder, who = (
                (None, row.tool_call_id, "") if calls else (row.parent_run_id, str(row.run_id), row.who)
            )
            pool = pool_of(result.limit, row.workspace_id, row.run_id, parent)
            runs[holder] = str(row.run_id)
            if pool is not None:
                changes.append(Change(row.at_us, row.taken, pool, holder, who))
        rows = (await connection.execute(ROWS, ids)).one()
        result.faults += (await connection.execute(COUNTERS, ids)).scalars().all()
    history = replay(changes, result.most)
    if calls:
        per_run = [change._replace(pool=runs[change.holder]) for change in changes]
        result.faults += replay(per_run, DEFAULT.pending_tool_calls_per_run or 0).faults
    standing = sum(len(field.parents) for field in fields) if result.limit is Limit.LIVE_RUNS else 0
    held = {Limit.LIVE_PARENT_RUNS: rows.live, Limit.LIVE_RUNS: rows.live}.get(result.limit, history.left)
    if history.left != held:
        result.faults.append(f"events tell of {history.left} places held, rows of {held}")
    if calls and history.taken != rows.calls:
        result.faults.append(f"events tell of {history.taken} tool calls, rows of {rows.calls}")
    history.left = max(0, history.left - standing)
    result.history.add(history)


async def race_sockets(arena: Arena, result: Result, racers: Racers, attempts: int) -> None:
    """One round for a cap that Redis holds, and its audit."""
    fields = await arena.fields(result.limit)
    monitored = Monitored("user" if result.limit is Limit.WEBSOCKETS_PER_USER else "workspace", result.most)
    listener = await asyncio.to_thread(Listener, arena.redis_url, monitored)
    try:
        add(result.told, await racers.race(result.limit, attempts, fields, arena.hold_s))
        await asyncio.sleep(2 * SHORT_LEASE_S)  # those who ended without a word lapse
    finally:
        await asyncio.to_thread(listener.end)
    result.samples += monitored.commands  # each of them is seen
    result.sampled_peak = max(result.sampled_peak, monitored.replay.history.peak)
    result.history.add(monitored.replay.end(time.time() * 1e6))
    refilled = await arena.refill(result.limit, fields)
    result.refilled += sum(refilled)
    if not all(refilled):
        result.faults.append(f"after round {result.rounds}, not every pool took exactly its cap again")


def add(total: Told, parts: Sequence[Told]) -> None:
    """Sum up what the processes tell."""
    for part in parts:
        total.attempts += part.attempts
        total.admitted += part.admitted
        total.took_s = max(total.took_s, part.took_s)
        for sums, more in ((total.refused, part.refused), (total.failed, part.failed)):
            for name, count in more.items():
                sums[name] = sums.get(name, 0) + count


async def race_for(arena: Arena, racers: Racers, limit: Limit, attempts: int, attempts_of_round: int = ROUND) -> Result:
    """Race for one cap, round by round."""
    result, started_s = Result(limit, DEFAULT.cap(limit) or 0), time.monotonic()
    one_round = race_sockets if limit in SOCKETS else race_rows
    while result.told.attempts < attempts:
        result.rounds += 1
        await one_round(arena, result, racers, min(attempts_of_round, attempts - result.told.attempts))
    if limit in CALLS:
        result.told.admitted = result.history.taken
    result.took_s = time.monotonic() - started_s
    return result


async def contradictions(arena: Arena) -> list[str]:
    """Return what no run of the database may ever be."""
    async with arena.database.read() as connection:
        return list((await connection.execute(text(FAULTS))).scalars())


async def race(database_url: str, redis_url: str, limit: Limit, attempts: int, *, processes: int = PROCESSES) -> Result:
    """Race for one cap on a migrated database of its own whose server tracks commit timestamps."""
    arena = Arena(database_url, redis_url)
    async with racing(database_url, redis_url, processes, None) as racers:
        result = await race_for(arena, racers, limit, attempts)
    result.faults += await contradictions(arena)
    await arena.close()
    return result


def new_database(stack: Stack, name: str) -> str:
    """Make a migrated database."""
    assert stack.postgres is not None
    asyncio.run(_create(stack.database_url, name))
    url = stack.postgres.url_of(name)
    migrate(url)
    return url


async def _create(database_url: str, name: str) -> None:
    database = Database(database_url, pool_size=1)
    async with database.read() as connection:
        await connection.execute(text(f"CREATE DATABASE {name}"))
    await database.close()


def exact_stack(folder: Path) -> Stack:
    """Return a stack, to be entered, whose PostgreSQL knows when each transaction committed."""
    SETTINGS["track_commit_timestamp"] = "on"
    return Stack(folder / "stack")


def run(results: Path, attempts: int, processes: int) -> list[Result]:
    """Race for every cap that the file of results does not hold yet; each result is kept as soon as it is there."""
    done = (
        [msgspec.json.decode(line, type=Result) for line in results.read_bytes().splitlines()]
        if results.exists()
        else []
    )
    left = [limit for limit in CAPS if limit not in {result.limit for result in done}]
    with tempfile.TemporaryDirectory(prefix="plimsoll-caps-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # PostgreSQL's user passes through it when this runs as root
        with exact_stack(folder) as stack:
            for limit in left:
                database_url = new_database(stack, limit)
                result = asyncio.run(race(database_url, stack.redis_url, limit, attempts, processes=processes))
                tell(sentence(result))
                done.append(result)
                with results.open("ab") as file:
                    file.write(msgspec.json.encode(result) + b"\n")
    return done


def main() -> int:
    """Run the campaign, write the page, and return the exit code."""
    parser = Flags("cap_races", __doc__)
    parser.add_argument("--attempts", type=int, default=ATTEMPTS, help="attempts on each cap")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="processes that race")
    parser.add_argument(
        "--results", type=Path, help="a file that keeps each cap's result; those in it are not run again"
    )
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write what was found")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        results = arguments.results or Path(scratch) / "results.jsonl"
        found = run(results, arguments.attempts, arguments.processes)
    slots = measure_slots()
    arguments.page.write_text(page(found, slots), encoding="utf-8")
    faults = [fault for result in found for fault in result.all_faults()] + slots.faults()
    for fault in faults:
        tell(fault)
    return 1 if faults else 0


def tell(line: str) -> None:
    """Say what is going on."""
    sys.stdout.write(f"cap-races: {line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
