"""A target for campaigns of the generator: answers after a while and, if asked, stamps when each request came in.

Run as a process of its own: `python -m tests.campaigns.targets [--delay-ms N] [--stamps FILE]` prints `url: …` and
serves until SIGTERM, then writes the stamps: int64 nanoseconds of the monotonic clock, which processes share.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import signal
import sys
import time
from array import array
from pathlib import Path
from typing import cast

import uvloop

BODY = b'{"run_id":"1","status":"PENDING"}'
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(BODY), BODY)


class _Target(asyncio.Protocol):
    """Takes whatever arrives at once for one request, as the clients of these campaigns send them."""

    def __init__(self, delay_s: float, stamps: array[int]) -> None:
        self._delay_s = delay_s
        self._stamps = stamps

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._stamps.append(time.monotonic_ns())
        if self._delay_s:
            asyncio.get_running_loop().call_later(self._delay_s, self._transport.write, ANSWER)
        else:
            self._transport.write(ANSWER)


async def _serve(delay_s: float, stamps: array[int]) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    server = await loop.create_server(lambda: _Target(delay_s, stamps), "127.0.0.1", 0, backlog=1024)
    sys.stdout.write(f"url: http://127.0.0.1:{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await ended.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--stamps", type=Path)
    asked = parser.parse_args()
    stamps = array("q")
    gc.disable()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(asked.delay_ms / 1e3, stamps))
    if asked.stamps is not None:
        asked.stamps.write_bytes(stamps.tobytes())


if __name__ == "__main__":
    main()
