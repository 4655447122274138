"""Starts sending processes (`sender`) and speaks with them through their pipes.

A process is given its job at once, says when its connections are open and reports four times a second. When it ends
before its last report, that is told with how it ended and its last words. `LocalCrew` is all that this machine sends
with; `outpost` uses one process on another machine in the same way.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec

from harness.crew import KEPT, READY_S, UNDONE, Sender, SenderFailed, Told
from harness.errors import ServiceUnreachable
from harness.openview import glimpse_of
from harness.recorder import Recorder
from harness.samplebuffer import Batch
from harness.sender import FRAME_HEAD, Go, Job, Ready, Report, Stop, body_length, frame
from harness.target import end_with_parent

_PIPE_BYTES = 8 * 2**20

Message = TypeVar("Message", Ready, Report)


class LocalCrew:
    """Processes of this machine."""

    start_lead_s = 0.25  # every sender has heard of it by then
    shares_descriptors = True

    def parameters(self) -> dict[str, Any]:
        """Return nothing: a set is of one machine unless it says otherwise."""
        return {}

    async def muster(self, jobs: Sequence[Job], recorder: Recorder) -> Sequence[Sender]:
        """Start a process for each job and wait for its connections; raises ServiceUnreachable or SenderFailed."""
        processes: list[SenderProcess] = []
        try:
            for job in jobs:
                processes.append(SenderProcess(job))  # noqa: PERF401 - those that were started must be ended
            async with asyncio.timeout(READY_S):
                for process in processes:
                    await process.wait_until_ready()
        except TimeoutError:
            await self._end(processes)
            raise SenderFailed(len(processes), f"was not ready after {READY_S:g} s") from None
        except BaseException:
            await self._end(processes)
            raise
        return processes

    async def _end(self, processes: list[SenderProcess]) -> None:
        for process in processes:
            await process.stop()
        for process in processes:
            await process.end()

    async def dismiss(self) -> None:
        """Do nothing: the processes have ended."""


class SenderProcess:
    """One sending process and the pipes to it."""

    def __init__(self, job: Job) -> None:
        self.worker = job.worker
        self._url = job.url
        self._head = b""
        self._complaints: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "harness.sender"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            bufsize=0,
            env=_surroundings(),
            start_new_session=True,  # Ctrl-C is for this process, which stops it
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )
        self._reader: asyncio.StreamReader | None = None
        self._transport: asyncio.ReadTransport | None = None
        self._say(job)

    @property
    def pid(self) -> int:
        """Return the process."""
        return self._process.pid

    async def go(self, start_at_ns: int) -> None:
        """Tell it the instant from which the schedule counts."""
        self._say(Go(start_at_ns))

    async def stop(self) -> None:
        """Tell it to end before the schedule does."""
        self._say(Stop())

    def _say(self, message: msgspec.Struct) -> None:
        """Send it a message; whether it is still there, reading will show."""
        assert self._process.stdin is not None  # noqa: S101 - it is a pipe
        try:
            self._process.stdin.write(frame(message))
        except (BrokenPipeError, ValueError):
            return

    async def wait_until_ready(self) -> None:
        """Wait for its connections; raises ServiceUnreachable or SenderFailed."""
        if (fault := await self.opened()) is not None:
            raise ServiceUnreachable(f"open connections to {self._url}", fault)

    async def opened(self) -> str | None:
        """Wait for its connections and return why there are none, or null; raises SenderFailed."""
        self._reader = asyncio.StreamReader(limit=_PIPE_BYTES)
        reader = self._reader
        self._transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._process.stdout
        )
        return (await self._read(Ready)).fault

    async def report(self) -> Report:
        """Return its next report; raises SenderFailed when there is none."""
        return await self._read(Report)

    async def told(self) -> Told:
        """Return its next report, its rows within; raises SenderFailed when there is none."""
        report = await self._read(Report)
        return Told(report, glimpse_of(Batch(list(report.chunks), report.errors).rows()))

    async def _read(self, kind: type[Message]) -> Message:
        """Return its next message; raises SenderFailed when there is none."""
        assert self._reader is not None  # noqa: S101 - wait_until_ready() comes first
        try:
            # Kept until the rest has come: who waits may be cancelled in between, and another reads on.
            self._head = self._head or await self._reader.readexactly(FRAME_HEAD)
            body = await self._reader.readexactly(body_length(self._head))
            self._head = b""
            return msgspec.msgpack.decode(body, type=kind)
        except asyncio.IncompleteReadError:
            raise SenderFailed(self.worker, await self._how_it_ended()) from None

    async def _how_it_ended(self) -> str:
        code = await asyncio.to_thread(self._process.wait)
        self._complaints.seek(0)
        lines = [line.strip() for line in self._complaints.read().decode(errors="replace").splitlines() if line.strip()]
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        last = f": {lines[-1]}" if lines else ""
        return f"{how} {UNDONE}{last}; {KEPT}"

    async def end(self) -> None:
        """See it out."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            await asyncio.to_thread(self._process.wait, 1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        if self._transport is not None:
            self._transport.close()
        elif self._process.stdout is not None:
            self._process.stdout.close()
        self._complaints.close()


def _surroundings() -> dict[str, str]:
    """Return the environment in which a sender finds this very harness, wherever the process is that starts it."""
    package = str(Path(__file__).resolve().parent.parent)
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))}
