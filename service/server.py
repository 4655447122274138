"""uvicorn, as the service runs it: below the application, and how a process ends.

On SIGTERM or SIGINT the process stops listening and parts from everybody it talks with, within ten seconds. Nothing
that a client has sent is lost: connections that the kernel holds ready are taken, requests are answered and told that
theirs was the last (`http_protocol`), long-polls are answered at once with what there is, sockets end their command and
are closed with 1012 (`stream`). A request that is still arriving after `ARRIVING_S`, or still being worked on after
`ANSWERING_S`, is refused with 503. SIGTERM may come again and changes nothing; a second SIGINT ends all at once.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import structlog
import uvicorn
from starlette.applications import Starlette

from service.http_protocol import HttpProtocol
from service.readiness import tell_ready
from service.stream.protocol import MAX_FRAME_BYTES, PING_EVERY_S, PING_PATIENCE_S, SocketProtocol

ARRIVING_S = 7.5
"""How long a client may go on sending what it began before the process was told to stop, seconds."""

ANSWERING_S = 9.0
"""How long a request may be worked on after that moment, seconds."""

LAST_S = 9.8
"""When the process ends, whatever still waits, seconds after that moment: a caller is promised ten."""

LOOK_S = 0.05
"""How often the end looks who is still there, seconds."""

log = structlog.get_logger()


def configuration(app: Starlette, **changes: Any) -> uvicorn.Config:
    """Return how the service is served; tests change the event loop."""
    settings: dict[str, Any] = {
        "loop": "uvloop",
        "http": HttpProtocol,
        "ws": SocketProtocol,
        "ws_max_size": MAX_FRAME_BYTES,
        "ws_ping_interval": PING_EVERY_S,
        "ws_ping_timeout": PING_PATIENCE_S,
        "ws_per_message_deflate": False,  # frames are short; the CPU is worth more than the bytes
        "lifespan": "on",
        "access_log": False,
        "log_config": None,
        "server_header": False,
        "proxy_headers": False,  # nothing here asks who the client is or by which scheme it came
        "timeout_graceful_shutdown": LAST_S,
    }
    return uvicorn.Config(app, **{**settings, **changes})


class Server(uvicorn.Server):
    """A server that says when it listens, and ends without failing a request."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and tell a supervisor so."""
        await super().startup(sockets)
        tell_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End: nobody waits for news any more, and nobody who has asked is left without an answer."""
        try:
            async with asyncio.timeout(LAST_S):
                for connection in self.server_state.connections:
                    connection.shutdown()
                self.config.app.state.let_go()  # type: ignore[union-attr]
                await self._take_waiting(sockets or [])
                await super().shutdown(sockets)
        except TimeoutError:
            log.warning("ended before everything was closed: something does not answer")

    async def _take_waiting(self, listeners: list[socket.socket]) -> None:
        """Take the connections that are established and not accepted: closing the last listener would reset them."""
        loop = asyncio.get_running_loop()
        for listener in listeners:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:  # nobody waits, or the one who did has gone
                    break
                connection.setblocking(False)
                await loop.connect_accepted_socket(self._make_protocol, connection)

    def _make_protocol(self) -> HttpProtocol:
        return HttpProtocol(self.config, self.server_state, self.lifespan.state)

    async def _wait_tasks_to_complete(self) -> None:
        """Return when every connection is closed and every task is done; see to it that this comes about."""
        clock = asyncio.get_running_loop().time
        began_s = clock()
        while (self.server_state.connections or self.server_state.tasks) and not self.force_exit:
            for connection in list(self.server_state.connections):
                connection.shutdown()  # those that were made in the meantime; the others know it
                if isinstance(connection, HttpProtocol) and clock() - began_s > ARRIVING_S:
                    connection.refuse_unarrived()
                if isinstance(connection, HttpProtocol) and clock() - began_s > ANSWERING_S:
                    connection.refuse_unanswered()
            if clock() - began_s > ANSWERING_S:
                for task in list(self.server_state.tasks):
                    task.cancel()
            await asyncio.sleep(LOOK_S)
        for connection in list(self.server_state.connections):  # of a hurried end: whoever is cut off is told nothing
            connection.transport.abort()
