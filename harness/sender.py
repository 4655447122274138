"""One sending process of an open loop: sends its part of the schedule on time and reports what became of it.

It does nothing else. The rows go to the parent as packed numbers four times a second (`openloop` writes them), so no
file, no compression and no display can make a request late. It shares the start instant and the schedule with the other
senders and takes every `workers`-th arrival of it: their rows together are those that one process would have made.

States: a `Job` comes in; connections are opened; `Ready` goes out; `Go` names the start instant; every arrival is begun
at its own absolute instant, late ones at once and in order, none is skipped; when the last run under way has ended, the
`Report` marked as last goes out. `Stop` ends it early: what is unfinished is cancelled and told. When the parent is
gone, so is this process. Run as `python -m harness.sender` by `openloop` only.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import struct
import sys
import time
from array import array
from collections import deque
from typing import Any, cast

import msgspec
import numpy as np

from harness.api import Workspace, problem_of
from harness.arrivals import Schedule
from harness.client import Client
from harness.connection import Exchange, parse_server_timing
from harness.pacing import alarm
from harness.sample import Endpoint, Outcome, RunRecord
from harness.samplebuffer import SampleBuffer
from harness.scenario import AgentRun, Habits, Place
from harness.selfwatch import SelfWatch, Strain, quiet_collector

REPORT_INTERVAL_S = 0.25  # half of the recorder's: what a kill costs stays within the last second
AT_ONCE = 64  # arrivals begun in one turn of a loop that is late, so that answers are read in between
TOLD_AFTER_NS = (
    500_000_000  # a run that is still under way after so long is told before it ends: the parent may be killed
)
TOLD_AT_ONCE = 100
CLEAN_UP_S = 5.0  # what cancelling may take after an interruption
_LENGTH = struct.Struct(">I")


class Tenant(msgspec.Struct, frozen=True):
    """A workspace as it travels: ids, and the token that its requests carry."""

    workspace_id: str
    agent_id: str
    token: str


class Job(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What one sending process is to do."""

    url: str
    request_timeout_s: float
    connections: int  # of this process
    warm: int  # of them, opened beforehand
    schedule: Schedule
    worker: int  # from 0
    workers: int
    habits: Habits | None = None  # with it, each arrival is an agent run in one of `workspaces`
    workspaces: list[Tenant] = []
    request: bytes = b""  # without habits, each arrival is this one request
    endpoint: Endpoint = Endpoint.OTHER  # of that request


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The connections are open, or why they are not."""

    fault: str | None = None


class Go(msgspec.Struct, frozen=True, tag=True):
    """The instant from which the schedule counts, on the monotonic clock that all processes of a machine share."""

    start_at_ns: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End before the schedule does."""


class Report(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What happened since the last one; the counts are of the whole time."""

    chunks: list[tuple[bytes, int]]  # see samplebuffer.Batch
    errors: list[str]
    runs: list[RunRecord]  # that ended
    live: list[RunRecord]  # that have not, as far as they are known
    planned: int  # requests
    begun: int  # arrivals
    strain: Strain
    last: bool


def frame(message: msgspec.Struct) -> bytes:
    """Return a message as it goes through a pipe: its length, then itself."""
    body = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(body)) + body


FRAME_HEAD = _LENGTH.size


def body_length(head: bytes) -> int:
    """Return how many bytes follow the first `FRAME_HEAD` of a frame."""
    return cast("int", _LENGTH.unpack(head)[0])


def share(total: int, worker: int, workers: int) -> int:
    """Return how many of `total` things fall to one of the workers, when they are dealt in turn."""
    return total // workers + (worker < total % workers)


class _Parent(asyncio.Protocol):
    """The two pipes to the parent."""

    def __init__(self) -> None:
        self.go: asyncio.Future[Go | Stop] = asyncio.get_running_loop().create_future()
        self.stopped = asyncio.Event()
        self.written = asyncio.get_running_loop().create_future()  # all that was said has left this process
        self._bytes = b""
        self._out: asyncio.WriteTransport

    async def connect(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: self, os.fdopen(0, "rb", 0))
        transport, _ = await loop.connect_write_pipe(lambda: _Written(self.written), os.fdopen(1, "wb", 0))
        self._out = transport

    def data_received(self, data: bytes) -> None:
        self._bytes += data
        while len(self._bytes) >= FRAME_HEAD and len(self._bytes) >= FRAME_HEAD + body_length(self._bytes[:FRAME_HEAD]):
            end = FRAME_HEAD + body_length(self._bytes[:FRAME_HEAD])
            message = msgspec.msgpack.decode(self._bytes[FRAME_HEAD:end], type=Go | Stop)
            self._bytes = self._bytes[end:]
            if isinstance(message, Stop):
                self.stopped.set()
            if not self.go.done():
                self.go.set_result(message)

    def eof_received(self) -> None:
        os._exit(1)  # nobody is left to report to; whatever is under way has no one who asked for it

    def say(self, message: msgspec.Struct) -> None:
        """Send a message, without waiting for the parent to read it."""
        self._out.write(frame(message))

    async def close(self) -> None:
        """Wait until everything has been read."""
        self._out.close()
        await self.written


class _Written(asyncio.Protocol):
    def __init__(self, over: asyncio.Future[None]) -> None:
        self._over = over

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._over.done():
            self._over.set_result(None)


class _Kept:
    """The rows of this process until they are reported; `scenario.Rows`."""

    def __init__(self) -> None:
        self.samples = SampleBuffer()
        self.planned = 0

    def plan(self, requests: int) -> None:
        """Count requests that are about to be made, or would have been: each must get its row."""
        self.planned += requests


class _Sender:
    """Carries one job out."""

    def __init__(self, job: Job, client: Client, parent: _Parent) -> None:
        self._job = job
        self._client = client
        self._parent = parent
        self._kept = _Kept()
        self._watch = SelfWatch()
        self._due: array[int]
        self._begun = 0
        self._under_way = 0
        self._over = asyncio.Event()  # every arrival was begun and has ended
        self._ended: list[RunRecord] = []
        self._live: dict[AgentRun, int] = {}  # and when each was due
        self._untold: deque[AgentRun] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._alarm = alarm(self._wake)  # made before any load: it takes a descriptor
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._places = [Workspace(client, place.workspace_id, place.agent_id, place.token) for place in job.workspaces]

    async def carry_out(self, start_at_ns: int) -> None:
        """Send everything on time; ends when the last answer has come or patience has, or when told to stop."""
        job = self._job
        mine = job.schedule.offsets_ns()[job.worker :: job.workers]
        self._due = array("q", np.ascontiguousarray(mine + start_at_ns).tobytes())
        if not self._due:
            self._over.set()
        with quiet_collector():
            beside = [asyncio.create_task(self._watch.watch()), asyncio.create_task(self._keep_reporting())]
            waiting: list[asyncio.Future[Any]] = [
                asyncio.ensure_future(event.wait()) for event in (self._over, self._parent.stopped)
            ]
            try:
                if self._due:
                    self._alarm.set(self._due[0])
                never: list[asyncio.Future[None]] = [*beside, self._failed]
                await asyncio.wait([*waiting, *never], return_when=asyncio.FIRST_COMPLETED)
                for each in never:
                    if each.done():
                        each.result()  # it never ends by itself: it failed
            finally:
                self._alarm.close()
                if not self._over.is_set():
                    await self._clean_up()
                for task in (*waiting, *beside):
                    task.cancel()
                await asyncio.gather(*waiting, *beside, return_exceptions=True)
        self._report(last=True)

    def _wake(self) -> None:
        """Begin every arrival that is due, and set the alarm for the next."""
        due, at, end = self._due, self._begun, min(len(self._due), self._begun + AT_ONCE)
        now_ns = time.monotonic_ns()
        if at < end:
            self._watch.note_lag((now_ns - due[at]) / 1e9)
        while at < end and due[at] <= now_ns:
            self._begun = at + 1
            self._under_way += 1
            self._begin(1 + self._job.worker + self._job.workers * at, due[at])
            at += 1
            now_ns = time.monotonic_ns()
        if at < len(due):
            self._alarm.set(due[at])

    def _begin(self, number: int, due_at_ns: int) -> None:
        """Begin the arrival `number` of the whole schedule, from 1."""
        habits = self._job.habits
        if habits is None:
            self._kept.planned += 1
            self._client.send(self._job.request, functools.partial(self._take, number, due_at_ns))
            return
        workspace = self._places[number % len(self._places)]
        place = Place(number, self._job.schedule.rate_per_s, 0, self._job.worker)
        run = AgentRun(self._client, self._kept, workspace, habits, place)
        self._live[run] = due_at_ns
        self._untold.append(run)
        task = asyncio.get_running_loop().create_task(self._perform(run, due_at_ns))
        self._tasks.add(task)
        task.add_done_callback(self._end_task)

    def _end_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None and not self._failed.done():
            self._failed.set_exception(cast("BaseException", task.exception()))  # a bug: nothing else is raised

    def _take(self, number: int, due_at_ns: int, exchange: Exchange) -> None:
        """Make the row of a request that is an arrival by itself."""
        assert exchange.outcome is not None  # noqa: S101 - it ended
        if exchange.outcome is Outcome.HTTP_ERROR:
            exchange.error = problem_of(exchange)
        self._kept.samples.append(
            number, 0, self._job.endpoint, self._job.schedule.rate_per_s, 0, self._job.worker, due_at_ns,
            exchange.sent_at_ns, exchange.first_byte_at_ns, exchange.done_at_ns, exchange.status, exchange.outcome,
            exchange.error, parse_server_timing(exchange.server_timing), exchange.response_bytes,
            exchange.connection_id,
        )  # fmt: skip
        self._end_one()

    async def _perform(self, run: AgentRun, due_at_ns: int) -> None:
        await run.perform(due_at_ns)
        self._end_run(run)

    def _end_run(self, run: AgentRun) -> None:
        self._live.pop(run, None)
        self._ended.extend(run.records())
        self._end_one()

    def _end_one(self) -> None:
        self._under_way -= 1
        if not self._under_way and self._begun == len(self._due):
            self._over.set()

    async def _clean_up(self) -> None:
        """Cancel what an interruption left unfinished, and keep what is known of it."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        left = list(self._live)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLEAN_UP_S):
                await asyncio.gather(*(run.cancel_unfinished() for run in left))
        for run in left:
            self._end_run(run)
        await self._client.close()  # what is not an agent run has its row by that

    async def _keep_reporting(self) -> None:
        while True:
            await asyncio.sleep(REPORT_INTERVAL_S)
            self._report(last=False)

    def _report(self, *, last: bool) -> None:
        batch = self._kept.samples.drain()
        ended, self._ended = self._ended, []
        chunks = [(bytes(chunk), used) for chunk, used in batch.chunks]
        self._parent.say(
            Report(
                chunks=chunks,
                errors=batch.errors,
                runs=ended,
                live=self._long_live(),
                planned=self._kept.planned,
                begun=self._begun,
                strain=self._watch.take(),
                last=last,
            )
        )

    def _long_live(self) -> list[RunRecord]:
        """Return the runs that are worth telling before they end, a few at a time: to tell them takes time too."""
        told: list[RunRecord] = []
        old_ns = time.monotonic_ns() - TOLD_AFTER_NS
        for _ in range(min(TOLD_AT_ONCE, len(self._untold))):
            due_at_ns = self._live.get(self._untold[0])
            if due_at_ns is not None and due_at_ns > old_ns:
                break
            run = self._untold.popleft()
            if due_at_ns is not None:
                told.extend(run.records())
        return told


async def _work(job: Job) -> None:
    parent = _Parent()
    await parent.connect()
    client = Client(job.url, job.request_timeout_s, job.connections)
    fault = await client.warm(job.warm)
    sender = _Sender(job, client, parent)
    parent.say(Ready(None if fault is None else os.strerror(fault.errno or 0)))
    go = await parent.go
    if isinstance(go, Go):
        await sender.carry_out(go.start_at_ns)
    await client.close()
    await parent.close()


def _read(count: int) -> bytes:
    """Read exactly so many bytes of the job, unbuffered: what comes after it is the event loop's."""
    got = b""
    while len(got) < count:
        piece = os.read(0, count - len(got))
        if not piece:
            os._exit(1)  # the parent has gone
        got += piece
    return got


def main() -> int:
    """Take a job, carry it out, report."""
    job = msgspec.msgpack.decode(_read(body_length(_read(FRAME_HEAD))), type=Job)
    loop_factory = None
    if sys.platform != "win32":
        import uvloop

        loop_factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(_work(job))
    return 0


if __name__ == "__main__":
    sys.exit(main())
