"""What Redis saw of the rates: when each request asked, and when each token was taken.

Redis' MONITOR tells every command with the instant at which it was begun, those inside scripts included. So the stamps
are the server's own: of each request the instant at which gcra.lua was called for it, and of each admission the `at`
that the script read from the clock and wrote into the bucket. Nothing in the service is changed for this.
"""

from __future__ import annotations

import re
import socket
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ASKED = re.compile(rb'^\+(\d+)\.(\d{6}) \[\d+ [^\]]*\] "EVALSHA" "\w+" "1" "plimsoll:rate:\{([^}]+)\}:(\w+)"')
TAKEN = re.compile(rb'^\+\S+ \[\d+ lua\] "HSET" "plimsoll:rate:\{([^}]+)\}:(\w+)" "level" "\d+" "at" "(\d+)"')


@dataclass
class Trace:
    """One bucket's requests and admissions, microseconds of the server's clock, in order."""

    asked_us: list[int] = field(default_factory=list)
    admitted_us: list[int] = field(default_factory=list)
    refused_us: list[int] = field(default_factory=list)


Bucket = tuple[str, str]
"""Workspace and limit."""


def read_traces(lines: Iterable[bytes]) -> dict[Bucket, Trace]:
    """Return the trace of every bucket; a script writes right behind its call, and nobody in between."""
    traces: dict[Bucket, Trace] = defaultdict(Trace)
    pending: tuple[Bucket, int] | None = None  # asked, and not known to be admitted yet

    def refuse() -> None:
        if pending is not None:
            traces[pending[0]].refused_us.append(pending[1])

    for line in lines:
        if asked := ASKED.match(line):
            refuse()
            seconds, micros, workspace, limit = asked.groups()
            pending = (workspace.decode(), limit.decode()), int(seconds) * 1_000_000 + int(micros)
            traces[pending[0]].asked_us.append(pending[1])
        elif taken := TAKEN.match(line):
            traces[taken[1].decode(), taken[2].decode()].admitted_us.append(int(taken[3]))
            pending = None
    refuse()
    return dict(traces)


@contextmanager
def monitoring(redis_socket: Path, into: Path) -> Iterator[None]:
    """Write what MONITOR tells to a file for as long as the block lasts."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, into.open("wb") as kept:
        connection.connect(str(redis_socket))
        connection.sendall(b"MONITOR\r\n")
        if not connection.recv(16).startswith(b"+OK"):
            raise RuntimeError("Redis does not let itself be watched")

        def keep() -> None:
            while piece := connection.recv(1 << 18):
                kept.write(piece)

        thread = threading.Thread(target=keep, name="monitor")
        thread.start()
        try:
            yield
        finally:
            connection.shutdown(socket.SHUT_RDWR)
            thread.join()
