"""One bench from the first server to the written file: what is measured, in which order, beside which floor.

A `Cell` is one figure at one number of connections. Every repeat measures every cell once, a path right after its
floor, so that both meet the machine in the same state. Whatever was started is stopped on every way out; one wrong
answer anywhere ends the bench, for its figures would mean nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from harness import machine
from harness.bench import GROUPS, recording
from harness.bench.floors import (
    HttpFloor,
    Pgbench,
    redis_benchmark,
    redis_benchmark_ping,
    redis_ping,
    redis_script,
)
from harness.bench.results import Aim, Bench, Figure, Ratio, Repeat, aim_at_least, aim_at_most, figure, page, ratio
from harness.bench.service_paths import ServicePaths, cold_count, serving
from harness.bench.stage import Process, Stage
from harness.bench.ticks import Ticks
from harness.errors import BadUsage

CONNECTIONS = (32, 128)
PGBENCH_CLIENTS = (8, 32)
SERVICE_PACKAGES = ("starlette", "uvicorn", "uvloop", "sqlalchemy", "asyncpg", "redis", "huey", "pandas")
WARM_UP_S = 0.3

POST, LARGE_GET, SMALL_GET, NULL = "bare POST", "bare GET", "bare small GET", "null server"
PGBENCH, SCRIPT, PING = "pgbench simple update", "Redis quota script", "Redis PING"
NOT_RECORDED, READ_ONLY = "harness client, not recording", "plain Parquet read"
BESIDE: dict[str, tuple[str, ...]] = {
    "create": (POST, NULL),
    "spawn": (POST,),
    "snapshot warm": (LARGE_GET,),
    "snapshot cold": (LARGE_GET,),
    "304": (SMALL_GET, LARGE_GET),
    "harness client, recording": (NOT_RECORDED,),
    "read and judge": (READ_ONLY,),
}
"""The floors of each path at its own number of connections; those of `ticks` depend on what the worker holds."""


@dataclasses.dataclass(frozen=True, slots=True)
class Wish:
    """What is to be measured and for how long."""

    repeats: int
    seconds: float  # of each cell
    only: frozenset[str]  # some of GROUPS
    due_runs: int  # that fall due at once in each repeat of ticks
    pgbench_scale: int  # 100,000 rows each
    sample_rows: int  # of the set that is judged


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """One figure at one number of connections, and how to measure it once."""

    name: str
    connections: int | None
    measure: Callable[[], Repeat]
    floor: bool = False
    unit: str = "requests/s"


def run_bench(wish: Wish, data: Path) -> tuple[Path, Bench]:
    """Measure everything that is wished for and write it under `data`; returns the file and what is in it."""
    started_at = datetime.datetime.now(datetime.UTC)
    bench_id = f"{started_at:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"
    folder = data / "bench" / bench_id
    try:
        folder.mkdir(parents=True)
    except OSError as fault:
        raise BadUsage(
            f"cannot write to {folder} ({fault.strerror}): set PLIMSOLL_DATA to a folder that can be written"
        ) from None
    load_before = os.getloadavg()
    try:
        with _terminate_as_interrupt(), contextlib.ExitStack() as stack:
            figures = _measure(_cells(wish, data, folder, stack), wish.repeats)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    ratios = _ratios(figures)
    bench = Bench(
        bench_id=bench_id,
        started_at=started_at.isoformat(timespec="seconds"),
        ended_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        commit=machine.commit(),
        versions=machine.versions(SERVICE_PACKAGES),
        machine=machine.machine(),
        load_average_before=load_before,
        load_average_after=os.getloadavg(),
        parameters=msgspec.to_builtins(dataclasses.asdict(wish) | {"only": sorted(wish.only, key=GROUPS.index)}),
        figures=figures,
        ratios=ratios,
        aims=_aims(figures, ratios),
    )
    file = folder / "bench.json"
    file.write_bytes(msgspec.json.format(msgspec.json.encode(bench), indent=2) + b"\n")
    file.with_suffix(".md").write_text(page(bench), encoding="utf-8")
    return file, bench


def _measure(cells: Sequence[Cell], repeats: int) -> list[Figure]:
    """Measure every cell once in each repeat."""
    found: list[list[Repeat]] = [[] for _ in cells]
    for number in range(1, repeats + 1):
        for cell, its in zip(cells, found, strict=True):
            its.append(cell.measure())
            place = f", {cell.connections} connections" if cell.connections else ""
            sys.stderr.write(f"{number}/{repeats} {cell.name}{place}: {its[-1].rate_per_s:,.0f} {cell.unit}\n")
    return [
        figure(cell.name, cell.connections, cell.unit, its, floor=cell.floor)
        for cell, its in zip(cells, found, strict=True)
    ]


def _cells(wish: Wish, data: Path, folder: Path, stack: contextlib.ExitStack) -> list[Cell]:
    """Start what is needed and list the cells in the order in which each repeat measures them."""
    cells: list[Cell] = []
    null = stack.enter_context(Process(["harness.bench.null_server"], os.environ, listens=True))
    if wish.only - {"harness", "analysis"}:
        stage = stack.enter_context(Stage(data / "stack" / "bench"))
        if wish.only - {"harness", "analysis", "ticks"}:
            cells += _http_cells(wish, stage, HttpFloor(null), stack)
        if wish.only & {"create", "spawn", "ticks"}:
            cells += _database_cells(wish, stage)
    if "harness" in wish.only:
        cells += _harness_cells(wish, null.url, folder / "samples")
    if "analysis" in wish.only:
        cells += _analysis_cells(wish, folder / "samples", stack)
    return cells


def _http_cells(wish: Wish, stage: Stage, null: HttpFloor, stack: contextlib.ExitStack) -> list[Cell]:
    """The service's paths over HTTP, each after its floor."""
    environment = stage.service_environment("bench_paths", redis_number=1)
    paths = stack.enter_context(serving(stage, environment))
    cold = (wish.repeats * len(CONNECTIONS)) * cold_count(wish.seconds) if "snapshot" in wish.only else 0
    paths.finish_runs(environment, cold)
    bare_process = Process(["harness.bench.bare_app"], os.environ, listens=True, standard_input=paths.document)
    bare = HttpFloor(stack.enter_context(bare_process))
    wire, seconds = paths.create_wire, wish.seconds
    _warm_up(paths, bare)

    def at(connections: int) -> Iterator[Cell]:
        def cell(name: str, ask: Callable[[int, float], Repeat], *, floor: bool = False) -> Cell:
            return Cell(name, connections, lambda: ask(connections, seconds), floor)

        if wish.only & {"create", "spawn"}:
            yield cell(NULL, lambda c, s: null.post(wire, c, s / 3), floor=True)  # the steadiest of all: less will do
            yield cell(POST, lambda c, s: bare.post(wire, c, s), floor=True)
        if "create" in wish.only:
            yield cell("create", paths.create)
        if "spawn" in wish.only:
            yield cell("spawn", paths.spawn)
        if wish.only & {"snapshot", "304"}:
            yield cell(LARGE_GET, bare.get_large, floor=True)
        if "snapshot" in wish.only:
            yield cell("snapshot warm", paths.snapshot_warm)
            yield cell("snapshot cold", paths.snapshot_cold)
        if "304" in wish.only:
            yield cell(SMALL_GET, bare.get_small, floor=True)
            yield cell("304", paths.not_modified)

    return [cell for connections in CONNECTIONS for cell in at(connections)]


def _warm_up(paths: ServicePaths, bare: HttpFloor) -> None:
    """Let each process meet each kind of request once, so that the first repeat is like the others."""
    bare.post(paths.create_wire, CONNECTIONS[-1], WARM_UP_S)
    bare.get_large(CONNECTIONS[-1], WARM_UP_S)
    paths.create(CONNECTIONS[-1], WARM_UP_S)
    paths.snapshot_warm(CONNECTIONS[-1], WARM_UP_S)


def _database_cells(wish: Wish, stage: Stage) -> list[Cell]:
    """What PostgreSQL and Redis do by themselves, and the worker beside them."""
    pgbench = Pgbench(stage, wish.pgbench_scale)
    clients = set(PGBENCH_CLIENTS)
    cells: list[Cell] = []
    if "ticks" in wish.only:
        ticks = Ticks(stage, wish.due_runs)
        ticks.drain(wish.due_runs // 2)  # a warm-up, which also shows how many connections the worker takes
        cells.append(Cell("ticks", ticks.connections, ticks.drain, unit="ticks/s"))
        clients.add(ticks.connections)

    def update(connections: int) -> Cell:
        measure = lambda: pgbench.simple_update(connections, wish.seconds)  # noqa: E731 - one line of a table
        return Cell(PGBENCH, connections, measure, floor=True, unit="transactions/s")

    redis_url, short_s = stage.redis_url(3), wish.seconds / 3
    cells += [update(connections) for connections in sorted(clients)]
    if wish.only & {"create", "spawn"}:
        cells.append(Cell(SCRIPT, 1, lambda: redis_script(redis_url, short_s), floor=True, unit="commands/s"))
        cells.append(Cell(PING, 1, lambda: redis_ping(redis_url, short_s), floor=True, unit="commands/s"))
        if (program := redis_benchmark()) is not None:
            socket = stage.redis_socket
            measure = lambda: redis_benchmark_ping(program, socket, short_s)  # noqa: E731 - one line of a table
            cells.append(Cell("redis-benchmark PING", 32, measure, floor=True, unit="commands/s"))
    return cells


def _harness_cells(wish: Wish, url: str, folder: Path) -> list[Cell]:
    """The harness's own client, with and without recording."""
    connections = CONNECTIONS[0]

    def measure(*, record: bool) -> Repeat:
        return recording.requests_per_s(url, folder, connections, wish.seconds, record=record)

    return [
        Cell(NOT_RECORDED, connections, lambda: measure(record=False), floor=True),
        Cell("harness client, recording", connections, lambda: measure(record=True)),
    ]


def _analysis_cells(wish: Wish, folder: Path, stack: contextlib.ExitStack) -> list[Cell]:
    """Reading and judging a sample set, and only reading it."""
    samples = recording.make_sample_set(folder, wish.sample_rows)
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    recording.judge(samples)  # imports what judging needs
    return [
        Cell(READ_ONLY, None, lambda: recording.read(samples), floor=True, unit="rows/s"),
        Cell("read and judge", None, lambda: recording.judge(samples), unit="rows/s"),
    ]


def _ratios(figures: Sequence[Figure]) -> list[Ratio]:
    """Compare every path with its floors."""
    known = {(one.name, one.connections): one for one in figures}
    pairs = [
        (path, known[floor, path.connections])
        for path in figures
        for floor in BESIDE.get(path.name, ())
        if (floor, path.connections) in known
    ]
    for path in figures:
        if path.name == "ticks":
            clients = sorted({path.connections or 0, PGBENCH_CLIENTS[0]})
            pairs += [(path, known[PGBENCH, count]) for count in clients]
        elif path.name == "create" and path.connections == PGBENCH_CLIENTS[-1]:
            pairs.append((path, known[PGBENCH, path.connections]))
    return [ratio(path, floor) for path, floor in pairs]


def _aims(figures: Sequence[Figure], ratios: Sequence[Ratio]) -> list[Aim]:
    """What the project wants to reach; of the two numbers of connections, the one that is harder."""
    most = CONNECTIONS[-1]
    compared = {(one.name, one.floor, one.connections): one.ratio.median for one in ratios}

    def worst(name: str, floor: str) -> float | None:
        found = [value for (path, its, _), value in compared.items() if (path, its) == (name, floor)]
        return min(found) if found else None

    p95 = next((one.latency_ms_p95 for one in figures if (one.name, one.connections) == ("create", most)), None)
    ticks = [one.ratio.median for one in ratios if one.name == "ticks" and one.floor_connections == one.connections]
    return [
        aim_at_least(
            f"create at least 0.3 of the bare POST at {most} connections", compared.get(("create", POST, most)), 0.3
        ),
        aim_at_most(f"create p95 at most 40 ms at {most} connections", p95.median if p95 else None, 40.0),
        aim_at_least("snapshot warm at least 0.4 of the bare GET", worst("snapshot warm", LARGE_GET), 0.4),
        aim_at_least("snapshot cold at least 0.15 of the bare GET", worst("snapshot cold", LARGE_GET), 0.15),
        aim_at_least("304 at least 0.6 of the bare small GET", worst("304", SMALL_GET), 0.6),
        aim_at_least("ticks at least pgbench's rate with as many clients", ticks[0] if ticks else None, 1.0),
    ]


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C, so that nothing that was started is left behind."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
