"""What the harness itself costs: recording beside not recording, and judging beside only reading.

Recording is measured on the real client, buffer and files, against the null server: the same requests once with a row
each and once without. Judging is measured on a sample set of so many rows, made by the real recorder; its floor is a
plain read of the same Parquet files.
"""

from __future__ import annotations

import asyncio
import importlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from harness.bench.load import LoadFailed
from harness.bench.results import Repeat
from harness.client import Client
from harness.connection import Exchange, parse_server_timing
from harness.recorder import FLUSH_INTERVAL_S, Recorder
from harness.sample import Endpoint, Mode, Outcome, RunRecord
from harness.samplebuffer import NAN, run_key

POLLS = 3  # rows of one synthetic run: a create, a spawn and so many snapshots
ROWS_PER_RUN = 2 + POLLS
REQUEST_NS = 2_000_000  # what one synthetic request takes


def requests_per_s(url: str, folder: Path, connections: int, seconds: float, *, record: bool) -> Repeat:
    """Ask the null server in a closed loop by the harness's client, with or without a row for each request."""
    recorder = Recorder(folder, Mode.SMOKE, "bench", {})
    try:
        return asyncio.run(_closed_loop(url, recorder if record else None, connections, seconds))
    finally:
        shutil.rmtree(recorder.path)


async def _closed_loop(url: str, recorder: Recorder | None, connections: int, seconds: float) -> Repeat:
    client = Client(url)
    wire = client.wire("GET", "/", "none")
    finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    answered, under_way, faults = 0, 0, 0
    give_up_at_ns = time.monotonic_ns() + int(seconds * 1e9)

    def on_done(exchange: Exchange) -> None:
        nonlocal answered, under_way, faults
        answered += 1
        faults += exchange.outcome is not Outcome.OK
        if recorder is not None:
            _record(recorder, answered, exchange)
        if exchange.done_at_ns < give_up_at_ns:
            client.send(wire, on_done)
            return
        under_way -= 1
        if not under_way:
            finished.set_result(None)

    flushing = asyncio.create_task(_flush(recorder)) if recorder is not None else None
    started = time.perf_counter()
    for _ in range(connections):
        under_way += 1
        client.send(wire, on_done)
    await finished
    elapsed = time.perf_counter() - started
    if flushing is not None:
        flushing.cancel()
        await asyncio.gather(flushing, return_exceptions=True)
    await client.close()
    if faults:
        raise LoadFailed("the harness's client", f"{faults} of {answered} requests failed")
    return Repeat(rate_per_s=answered / elapsed, count=answered, seconds=elapsed)


def _record(recorder: Recorder, run: int, exchange: Exchange) -> None:
    recorder.plan(1)
    assert exchange.outcome is not None  # noqa: S101 - it is done
    recorder.samples.append(
        run, 0, Endpoint.SNAPSHOT, NAN, 0, 0, exchange.sent_at_ns, exchange.sent_at_ns, exchange.first_byte_at_ns,
        exchange.done_at_ns, exchange.status, exchange.outcome, exchange.error,
        parse_server_timing(exchange.server_timing), exchange.response_bytes, exchange.connection_id,
    )  # fmt: skip


async def _flush(recorder: Recorder) -> None:
    """Bring rows to disk as the generator does."""
    while True:
        await asyncio.sleep(FLUSH_INTERVAL_S)
        await asyncio.to_thread(recorder.write, recorder.collect())


def make_sample_set(root: Path, rows: int) -> Path:
    """Write a sound smoke set of about so many rows by the real recorder; returns its folder."""
    recorder = Recorder(root, Mode.SMOKE, "bench", {})
    base_ns = time.monotonic_ns()
    for run in range(1, max(1, rows // ROWS_PER_RUN) + 1):
        _write_run(recorder, run, base_ns + run)
    recorder.finish(complete=True)
    return recorder.path


def _write_run(recorder: Recorder, run: int, at_ns: int) -> None:
    """Record one run with one subrun that ends at its last poll."""
    asked = [(0, Endpoint.CREATE), (1, Endpoint.SPAWN), *[(0, Endpoint.SNAPSHOT)] * POLLS]
    recorder.plan(len(asked))
    for number, (child, endpoint) in enumerate(asked):
        sent_at_ns = at_ns + number  # all within the set's time, however many rows there are
        done_at_ns = sent_at_ns + REQUEST_NS + run % 1000
        recorder.samples.append(
            run, child, endpoint, NAN, 0, 0, sent_at_ns, sent_at_ns, done_at_ns - 1, done_at_ns, 200, Outcome.OK, None,
            (1.0, 0.1, 0.1, 0.2), 500, run % 32,
        )  # fmt: skip
    for key, parent in ((run_key(run), None), (run_key(run, 1), run_key(run))):
        recorder.add_run(
            RunRecord(
                run_key=key,
                run_id=key,
                parent_run_key=parent,
                workspace_id="w",
                trial=0,
                worker=0,
                created_at_ns=at_ns + REQUEST_NS,
                last_unfinished_at_ns=at_ns + 3,
                first_finished_at_ns=at_ns + 4 + REQUEST_NS,
                server_completion_ms=2.0,
                final_status="COMPLETED",
                poll_timed_out=False,
                ticks=2,
                steps=2,
                events=5,
                subruns=1 if parent is None else 0,
            )
        )


def judge(path: Path) -> Repeat:
    """Read the set, check it and judge it, as the report does; raises LoadFailed when it is not found sound."""
    evaluation = importlib.import_module("harness.evaluation")  # slow to import, and not needed for making load

    def read_and_judge() -> int:
        found = evaluation.load([path])
        if found.findings:
            raise LoadFailed("the synthetic sample set", found.findings[0].detail)
        return len(found.data.samples)

    return _timed(read_and_judge)


def read(path: Path) -> Repeat:
    """Read the set's Parquet files and nothing else."""

    def read_plainly() -> int:
        tables = {file.name: pq.read_table(file, partitioning=None) for file in path.glob("*.parquet")}
        return sum(len(table) for name, table in tables.items() if name.startswith("samples-"))

    return _timed(read_plainly)


def _timed(work: Callable[[], int]) -> Repeat:
    started = time.perf_counter()
    rows = work()
    elapsed = time.perf_counter() - started
    return Repeat(rate_per_s=rows / elapsed, count=rows, seconds=elapsed)
