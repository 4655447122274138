"""A server that parses nothing and answers canned bytes: how fast the generator itself can go.

Its rate is the ceiling of every other figure of the bench. Run as a process of its own: `python -m
harness.bench.null_server` prints `url: …` and serves until SIGTERM.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import cast

BODY = b'{"run_id":"019a0000-0000-7000-8000-000000000000","status":"PENDING"}'
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(BODY), BODY)


class _Null(asyncio.Protocol):
    """Takes whatever arrives at once for one request, which a closed loop makes true."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own is one in all but its class

    def data_received(self, data: bytes) -> None:
        """Answer."""
        self._transport.write(ANSWER)


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    server = await loop.create_server(_Null, "127.0.0.1", 0)
    sys.stdout.write(f"url: http://127.0.0.1:{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await ended.wait()


def main() -> int:
    """Serve until told to stop."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
