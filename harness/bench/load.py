"""The closed-loop generator of the bench: a process of its own that asks as fast as it is answered.

It is lean on purpose, so that the server and not the generator is the bottleneck (the null server's rate shows by how
much): requests are bytes made beforehand, each connection is an `asyncio.Protocol` that reads a status and a length and
nothing else, latencies go into one array. It finds out how much a server can take; how long users wait at a given rate
is the business of `harness.generator`.

`run_load` starts it, hands it a `Load` on standard input, and reads what it measured from standard output.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from typing import cast

import msgspec

from harness.errors import HarnessError
from harness.target import end_with_parent

PATIENCE_S = 10.0  # for connecting, and for the last answers
FIRST_ANSWER_CHECK_S = 0.01
START_S = 20.0  # for a process to start on a busy machine


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What to ask for."""

    host: str
    port: int
    connections: int
    seconds: float  # nothing is sent after so long
    requests: list[bytes]  # sent in turn, then from the beginning again
    most: int | None = None  # requests in all; None: as many as the time allows
    status: int = 200  # what every answer must have
    keep_bodies: bool = False  # return the answers too


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a load."""

    seconds: float  # from the first request to the end of the time, or to the last answer when `most` ended it
    latencies_ns: bytes  # one int64 for each answer within that time, in this machine's byte order
    bodies: list[bytes]
    fault: str | None = None  # why the load was given up; then nothing else counts


class LoadFailed(HarnessError):
    """A request of the bench was not answered as it must be, so its figures would mean nothing."""

    def __init__(self, what: str, fault: str) -> None:
        super().__init__(f"{what}: {fault}")
        self.what = what
        self.fault = fault


def run_load(what: str, load: Load) -> Measured:
    """Make the load in a process of its own; raises LoadFailed, naming `what` was asked, at the first wrong answer."""
    try:
        ended = subprocess.run(  # noqa: S603 - our own module
            [sys.executable, "-m", __name__],
            input=msgspec.msgpack.encode(load),
            stdout=subprocess.PIPE,
            timeout=load.seconds + PATIENCE_S + START_S,
            check=False,
            start_new_session=True,  # Ctrl-C is for the bench, which ends this process
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )
    except subprocess.TimeoutExpired:
        raise LoadFailed(what, "the load did not end in time") from None
    if ended.returncode != 0:
        raise LoadFailed(what, f"the generator ended with exit code {ended.returncode}")
    try:
        measured = msgspec.msgpack.decode(ended.stdout, type=Measured)
    except msgspec.DecodeError as fault:
        raise LoadFailed(what, f"the generator's {len(ended.stdout)} bytes cannot be read: {fault}") from None
    if measured.fault is not None:
        raise LoadFailed(what, measured.fault)
    return measured


class _Course:
    """One load under way: what is sent next, and what was measured so far."""

    def __init__(self, load: Load) -> None:
        requests: Iterator[bytes] = itertools.cycle(load.requests)
        self.load = load
        self.status = b"%d" % load.status
        self.requests = requests if load.most is None else itertools.islice(requests, load.most)
        self.latencies_ns = array("q")
        self.bodies: list[bytes] = []
        self.time_is_up = False
        self.ended_at_ns = 0
        self.active = 0  # connections that wait for an answer
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end_time(self) -> None:
        """Send nothing more; what is answered from now on is not counted. Waits for at least one answer."""
        if self.done.done():
            return
        if not self.latencies_ns:
            asyncio.get_running_loop().call_later(FIRST_ANSWER_CHECK_S, self.end_time)
            return
        self.ended_at_ns = time.perf_counter_ns()
        self.time_is_up = True

    def rest(self) -> None:
        """Note that a connection has nothing more to ask."""
        self.active -= 1
        if not self.active and not self.done.done():
            if not self.time_is_up:
                self.ended_at_ns = time.perf_counter_ns()
            self.done.set_result(None)

    def fail(self, fault: str) -> None:
        """Give the load up."""
        if not self.done.done():
            self.done.set_exception(_WrongAnswer(fault))


class _WrongAnswer(Exception):
    """An answer that is not what must come."""


class _Connection(asyncio.Protocol):
    """One connection with one request under way."""

    def __init__(self, course: _Course) -> None:
        self._course = course
        self._begun = b""  # an answer of which more is to come
        self._sent_at_ns = 0
        self._resting = False
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own is one in all but its class

    def ask(self) -> None:
        """Send the next request, if there is one."""
        course = self._course
        wire = None if course.time_is_up else next(course.requests, None)
        if wire is None:
            self._resting = True
            course.rest()
            return
        self._sent_at_ns = time.perf_counter_ns()
        self._transport.write(wire)

    def data_received(self, data: bytes) -> None:
        """Take an answer, or a part of one."""
        if self._begun:
            data = self._begun + data
        head_end = data.find(b"\r\n\r\n")
        if head_end < 0:
            self._begun = data
            return
        course = self._course
        if data[9:12] != course.status:
            course.fail(f"answered {_excerpt(data)}")
            return
        size = head_end + 4
        if course.status != b"304":
            length_at = data.find(b"content-length: ", 0, head_end + 2)
            if length_at < 0:
                course.fail("an answer without a content-length")
                return
            size += int(data[length_at + 16 : data.index(b"\r", length_at)])
        if len(data) < size:
            self._begun = data
            return
        if len(data) > size:
            course.fail("an answer that is longer than it says")
            return
        if not course.time_is_up:
            course.latencies_ns.append(time.perf_counter_ns() - self._sent_at_ns)
        if course.load.keep_bodies:
            course.bodies.append(data[head_end + 4 :])
        self._begun = b""
        self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._resting:
            self._course.fail(f"closed a connection ({exc or 'end of file'})")


def _excerpt(answer: bytes) -> str:
    """Show an answer's first line and the beginning of its body."""
    head, _, body = answer.partition(b"\r\n\r\n")
    line = head.split(b"\r\n")[0].decode(errors="replace").removeprefix("HTTP/1.1 ")
    return f"{line} {body[:300].decode(errors='replace')}".strip()


async def _carry_out(load: Load) -> Measured:
    loop = asyncio.get_running_loop()
    course = _Course(load)
    connections = []
    async with asyncio.timeout(PATIENCE_S):
        for _ in range(load.connections):
            _, connection = await loop.create_connection(lambda: _Connection(course), load.host, load.port)
            connections.append(connection)
    course.active = len(connections)
    started_at_ns = time.perf_counter_ns()
    loop.call_later(load.seconds, course.end_time)
    for connection in connections:
        connection.ask()
    async with asyncio.timeout(load.seconds + PATIENCE_S):
        await course.done
    return Measured(
        seconds=(course.ended_at_ns - started_at_ns) / 1e9,
        latencies_ns=course.latencies_ns.tobytes(),
        bodies=course.bodies,
    )


def main() -> int:
    """Read a load, carry it out, write what was measured."""
    import uvloop

    load = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Load)
    gc.disable()  # a load makes no cycles, and a pause here would be measured as the server's
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            measured = runner.run(_carry_out(load))
        except (_WrongAnswer, OSError, TimeoutError) as fault:
            text = str(fault) or "no answer in time"
            measured = Measured(seconds=0.0, latencies_ns=b"", bodies=[], fault=text)
    sys.stdout.buffer.write(msgspec.msgpack.encode(measured))
    sys.stdout.buffer.flush()  # a fault here must not end as success with half an answer
    return 0


if __name__ == "__main__":
    sys.exit(main())
