"""What stands on a far worker, without the cluster around it: stamps moved between clocks, and nobody who asks."""

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import pyarrow.parquet as pq
import pytest

from harness.arrivals import Arrivals, Schedule
from harness.client import Client
from harness.outpost import Arrived, Order, Outpost, Word
from harness.sample import Endpoint, Mode, Outcome
from harness.samplebuffer import NAN, Batch, SampleBuffer
from harness.selfwatch import Strain
from harness.sender import Job, Report
from harness.storage import Storage
from harness.tablefiles import Part
from tests.harness.fake_service import always, http, serving

AHEAD_NS = 10**15  # the far clock, by eleven days
SCHEDULE = Schedule(Arrivals.CONSTANT, rate_per_s=100.0, duration_s=0.3)


async def order(url: str, schedule: Schedule = SCHEDULE) -> bytes:
    client = Client(url)
    request = client.wire("GET", "/x")
    await client.close()
    job = Job(
        url=url, request_timeout_s=5.0, connections=4, warm=4, schedule=schedule, worker=1, workers=2, request=request,
    )  # fmt: skip
    plain = Order(job=job, measurement_id="m", mode=Mode.OPEN, scenario="request", storage=None)
    return msgspec.msgpack.encode(plain)


async def told(outpost: Outpost) -> tuple[list[Part], int]:
    """All parts that it tells to its last word, and how many arrivals it began."""
    parts: list[Part] = []
    while True:
        word = msgspec.msgpack.decode(await outpost.word(), type=Word)
        assert word.fault is None
        for each in word.told:
            parts.extend(each.parts)
            if each.report.last:
                return parts, each.report.begun


async def test_rows_are_stamped_by_the_clock_of_who_ordered_them(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("home")
    async with serving(always(http(200, {}))) as url:
        outpost = Outpost()
        arrived = msgspec.msgpack.decode(await outpost.prepare(await order(url)), type=Arrived)
        assert arrived.fault is None
        here_ns = time.monotonic_ns() - AHEAD_NS  # what our clock would say
        start_at_ns = here_ns + 200_000_000
        await outpost.go(start_at_ns, AHEAD_NS)
        parts, begun = await told(outpost)
        await outpost.end()
    last = {part.name: part for part in parts}
    assert [(part.name, part.rows, part.closed) for part in last.values()] == [("samples-w001-00001.parquet", 15, True)]
    content = last["samples-w001-00001.parquet"].content
    assert content is not None
    (folder / "samples.parquet").write_bytes(content)
    rows = pq.read_table(folder / "samples.parquet").to_pylist()
    assert begun == 15
    # The other sender's turn comes first: this one has every second arrival from the second on.
    assert [row["intended_at_ns"] - start_at_ns for row in rows] == [10_000_000 + 20_000_000 * at for at in range(15)]
    for row in rows:
        assert row["intended_at_ns"] <= row["sent_at_ns"] <= row["done_at_ns"] < time.monotonic_ns() - AHEAD_NS


async def test_an_outpost_of_which_nobody_asks_any_more_ends_its_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.outpost.ABANDONED_S", 0.05)
    endless = Schedule(Arrivals.CONSTANT, rate_per_s=10.0, duration_s=600.0)
    async with serving(always(http(200, {}))) as url:
        others = set(psutil.Process().children())  # servers of other tests
        outpost = Outpost()
        await outpost.prepare(await order(url, endless))
        assert len(set(psutil.Process().children()) - others) == 1
        await outpost.go(time.monotonic_ns(), 0)
        await asyncio.gather(outpost._tasks[0])  # the one that waits for somebody to ask
        assert set(psutil.Process().children()) <= others
        await outpost.end()


async def test_a_target_that_cannot_be_reached_is_told_and_no_process_is_left() -> None:
    others = set(psutil.Process().children())
    outpost = Outpost()
    arrived = msgspec.msgpack.decode(await outpost.prepare(await order("http://127.0.0.1:1")), type=Arrived)
    assert (arrived.fault, arrived.unreachable) == ("Connection refused", True)
    assert set(psutil.Process().children()) <= others


def report_of(*runs: int, last: bool = False) -> Report:
    """A report with a row for each run."""
    rows = SampleBuffer()
    for run in runs:
        rows.append(
            run, 0, Endpoint.CREATE, NAN, 0, 1, 1, 2, 3, 4, 200, Outcome.OK, None, (NAN, NAN, NAN, NAN), 5, 6,
        )  # fmt: skip
    drained = rows.drain()
    chunks = [(bytes(chunk), used) for chunk, used in drained.chunks]
    strain = Strain(None, None, None, 0.0)
    return Report(chunks=chunks, errors=[], runs=[], live=[], planned=2, begun=2, strain=strain, last=last)


class Sending:
    """In place of a sending process: it reports what it was given, each when it is let go."""

    def __init__(self, _: Job) -> None:
        self._reports = [report_of(1), report_of(2), report_of(last=True)]
        self._free = asyncio.Semaphore(0)

    def let_go(self) -> None:
        self._free.release()

    async def opened(self) -> None:
        return None

    async def go(self, _: int) -> None:
        return None

    async def report(self) -> Report:
        await self._free.acquire()
        return self._reports.pop(0)

    async def end(self) -> None:
        return None


async def test_rows_that_come_while_a_file_is_written_are_written_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first row comes while none is being written, the second while the first is; then nobody asks for a while."""
    monkeypatch.setattr("harness.outpost.SenderProcess", Sending)
    monkeypatch.setattr("harness.outpost.FLUSH_INTERVAL_S", 0.0)
    outpost = Outpost()
    await outpost.prepare(await order("http://127.0.0.1:1"))
    sending, loop = outpost._process, asyncio.get_running_loop()
    assert isinstance(sending, Sending)
    write: Callable[..., list[Part]] = outpost._parts.write
    absorb = outpost._buffer.absorb
    come = threading.Semaphore(0)
    begun = 0

    def slow_write(batch: Batch, storage: Storage | None, *, last: bool) -> list[Part]:
        nonlocal begun
        begun += 1
        loop.call_soon_threadsafe(sending.let_go)
        if begun <= 2:
            come.acquire()
        return write(batch, storage, last=last)

    def heard_absorb(batch: Batch) -> None:
        absorb(batch)
        come.release()

    monkeypatch.setattr(outpost._parts, "write", slow_write)
    monkeypatch.setattr(outpost._buffer, "absorb", heard_absorb)
    await outpost.go(0, 0)
    await outpost._tasks[1]  # it takes the reports, to the last
    parts, _ = await told(outpost)
    await outpost.end()
    assert [(part.rows, part.closed) for part in parts] == [(1, False), (2, False), (2, True)]
    assert parts[-1].content is not None
    (tmp_path / "samples.parquet").write_bytes(parts[-1].content)
    assert pq.read_table(tmp_path / "samples.parquet")["run_key"].to_pylist() == ["1", "2"]
