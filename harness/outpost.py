"""What stands on a worker of a Dask cluster for one sender: starts its process, keeps its rows, passes on its word.

It is a Dask actor, so that its state stays where it is and `cluster` can ask it things while the load goes on. The
sending itself is done by the same process as at home (`sender`), which shares no interpreter with Dask: nothing that
the cluster does in between makes a request late, but for the cores that it takes.

Stamps are moved to the clock of the machine that ordered the load as soon as they come in. Rows become Parquet here,
in a folder of the worker's own as everywhere (`tablefiles`); each file that has changed goes home with the next word,
or to the shared storage. Who has not asked for a while is gone: then all ends by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from harness import machine
from harness.crew import READY_S, SenderFailed, Told
from harness.descriptors import allow_connections
from harness.errors import HarnessError
from harness.openview import glimpse_of
from harness.recorder import FLUSH_INTERVAL_S
from harness.sample import Mode, RunRecord, Sample, arrow_schema
from harness.samplebuffer import Batch, SampleBuffer, sample_table
from harness.sender import Job, Report
from harness.sender_process import SenderProcess
from harness.storage import Storage
from harness.tablefiles import Part, TableFiles

WORD_S = 1.0  # so long a question waits for something to tell; then the answer is that there is nothing
ABANDONED_S = 2 * READY_S  # nobody has asked for so long, not even while others got ready: there is nobody


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What one outpost is to do."""

    job: Job
    measurement_id: str
    mode: Mode
    scenario: str
    storage: str | None  # where to leave the rows; null: send them home


class Arrived(msgspec.Struct, frozen=True):
    """The sender's connections are open, or why they are not."""

    fault: str | None
    unreachable: bool  # the fault is the target's
    machine: dict[str, Any]


class Word(msgspec.Struct, frozen=True):
    """What there is to tell since the last question."""

    told: list[Told]
    fault: str | None = None  # it will tell no more


class Outpost:
    """One sender far from home. Its coroutines run on the Dask worker's event loop."""

    async def prepare(self, order: bytes) -> bytes:
        """Start the sender of an Order, wait for its connections, return an Arrived."""
        self._order = msgspec.msgpack.decode(order, type=Order)
        self._asked = asyncio.Event()
        self._standing = False
        self._told: list[Told] = []
        self._fresh: list[Part] = []  # written, and not told yet
        self._fault: str | None = None
        self._news = asyncio.Event()
        self._buffer = SampleBuffer()
        self._writing = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        fault, unreachable = None, False
        try:
            allow_connections(self._order.job.connections, "--connections")
            self._storage = None if self._order.storage is None else Storage(self._order.storage)
            self._process = SenderProcess(self._order.job)
        except HarnessError as refused:
            return msgspec.msgpack.encode(Arrived(str(refused), False, {}))
        try:
            async with asyncio.timeout(READY_S):
                fault = await self._process.opened()
                unreachable = fault is not None
        except SenderFailed as failed:
            fault = failed.what
        except TimeoutError:
            fault = f"was not ready after {READY_S:g} s"
        if fault is None:
            self._parts = _Parts(self._order)
            self._standing = True
            self._tasks = [asyncio.create_task(self._see_to_it_that_somebody_asks())]
        else:
            await self._process.stop()
            await self._process.end()
        return msgspec.msgpack.encode(Arrived(fault, unreachable, machine.machine()))

    async def now(self) -> int:
        """Return this machine's monotonic clock, ns."""
        self._asked.set()
        return time.monotonic_ns()

    async def go(self, start_at_ns: int, offset_ns: int) -> None:
        """Begin at an instant of the orderer's clock, to which this one is ahead by the offset."""
        self._offset_ns = offset_ns
        await self._process.go(start_at_ns + offset_ns)
        self._tasks += [asyncio.create_task(self._relay()), asyncio.create_task(self._keep_writing())]

    async def stop(self) -> None:
        """End before the schedule does."""
        await self._process.stop()

    async def word(self) -> bytes:
        """Wait a while for something to tell, and return it: a Word."""
        self._asked.set()
        try:
            async with asyncio.timeout(WORD_S):
                await self._news.wait()
        except TimeoutError:
            pass  # then there is nothing, and it is said
        self._news.clear()
        told, self._told = self._told, []
        return msgspec.msgpack.encode(Word(told, self._fault))

    async def end(self) -> None:
        """See the sender out and forget its rows, which were told; nothing where it never stood."""
        if not self._standing:
            return
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._process.end()
        self._parts.remove()

    async def _relay(self) -> None:
        """Take the sender's reports to the last one."""
        try:
            last = False
            while not last:
                report = await self._process.report()
                batch = Batch(list(report.chunks), report.errors).shifted(-self._offset_ns)
                self._buffer.absorb(batch)
                last = report.last
                if last:
                    await self._write(last=True)
                parts, self._fresh = self._fresh, []
                self._told.append(Told(self._at_home(report), glimpse_of(batch.rows()), parts))
                self._news.set()
        except SenderFailed as failed:
            self._end_with(failed.what)
        except Exception as fault:  # whatever it is, who waits at home must hear of it
            self._end_with(f"cannot go on: {type(fault).__name__}: {fault}")

    def _at_home(self, report: Report) -> Report:
        """Return the report without its rows, its runs by the orderer's clock."""
        return msgspec.structs.replace(
            report,
            chunks=[],
            errors=[],
            runs=[_shifted(run, -self._offset_ns) for run in report.runs],
            live=[_shifted(run, -self._offset_ns) for run in report.live],
        )

    async def _keep_writing(self) -> None:
        try:
            while True:
                await asyncio.sleep(FLUSH_INTERVAL_S)
                await self._write(last=False)
        except (OSError, HarnessError) as fault:
            self._end_with(f"cannot go on writing its samples ({fault})")

    async def _write(self, *, last: bool) -> None:
        async with self._writing:  # a thread at a time
            batch = self._buffer.take()
            parts = await asyncio.to_thread(self._parts.write, batch, self._storage, last=last)
            self._fresh += parts  # not before: what was fresh when the writing began may have been told meanwhile

    def _end_with(self, fault: str) -> None:
        self._fault = fault
        self._news.set()

    async def _see_to_it_that_somebody_asks(self) -> None:
        with contextlib.suppress(TimeoutError):
            while True:
                self._asked.clear()
                async with asyncio.timeout(ABANDONED_S):
                    await self._asked.wait()
        await self._process.end()  # its pipe is closed, so it ends whatever it does
        self._parts.remove()


def _shifted(run: RunRecord, by_ns: int) -> RunRecord:
    """Return the run's record as a clock shows it that is `by_ns` ahead."""
    created, unfinished, finished = (
        None if at_ns is None else at_ns + by_ns
        for at_ns in (run.created_at_ns, run.last_unfinished_at_ns, run.first_finished_at_ns)
    )
    return dataclasses.replace(
        run, created_at_ns=created, last_unfinished_at_ns=unfinished, first_finished_at_ns=finished
    )


class _Parts:
    """The Parquet files of one sender, and which of them have changed."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._folder = tempfile.TemporaryDirectory(prefix="plimsoll-")
        self._schema = arrow_schema(Sample, order.measurement_id)
        stem = f"samples-w{order.job.worker:03d}"
        self._files = TableFiles(Path(self._folder.name), stem, self._schema, ends_as_one=False)
        self._rows: dict[str, int] = {}  # of each file
        self._done: set[str] = set()  # closed, and where they belong

    def write(self, batch: Batch, storage: Storage | None, *, last: bool) -> list[Part]:
        """Write rows, and return each file that has changed. Raises OSError or HarnessError."""
        table = sample_table(batch, self._order.mode, self._order.scenario, self._schema)
        name = self._files.open_name
        self._rows[name] = self._files.open_rows + len(table)
        self._files.extend(table)
        closed = self._files.finish() if last else self._files.closed
        changed = closed.keys() - self._done
        if len(table):
            changed |= {name}
        return [self._part(each, storage, closed=each in closed) for each in sorted(changed)]

    def _part(self, name: str, storage: Storage | None, *, closed: bool) -> Part:
        """Bring a file to where it belongs; a closed one is removed here, so that a long load leaves no heap."""
        file = Path(self._folder.name) / name
        content = file.read_bytes()
        part = Part(name, self._rows[name], hashlib.sha256(content).hexdigest(), closed, content)
        if storage is not None:
            storage.put(name, content)
            part = msgspec.structs.replace(part, content=None)
        if closed:
            file.unlink()
            self._done.add(name)
        return part

    def remove(self) -> None:
        """Remove the folder; it may be gone already."""
        self._folder.cleanup()
