"""uvicorn, as the service runs it: HTTP and sockets below the application.

On SIGTERM or SIGINT nothing more is accepted, sockets are closed with 1012 (service restart), long-polls are answered
at once with what there is, and requests in flight have `GRACE_S` to end.
"""

from __future__ import annotations

import socket
from typing import Any

import uvicorn
from starlette.applications import Starlette

from service.stream.protocol import MAX_FRAME_BYTES, PING_EVERY_S, PING_PATIENCE_S, SocketProtocol

GRACE_S = 10
"""How long a request may go on after the process was asked to stop, seconds."""


def configuration(app: Starlette, **changes: Any) -> uvicorn.Config:
    """Return how the service is served; tests change the event loop."""
    settings: dict[str, Any] = {
        "loop": "uvloop",
        "http": "httptools",
        "ws": SocketProtocol,
        "ws_max_size": MAX_FRAME_BYTES,
        "ws_ping_interval": PING_EVERY_S,
        "ws_ping_timeout": PING_PATIENCE_S,
        "ws_per_message_deflate": False,  # frames are short; the CPU is worth more than the bytes
        "lifespan": "on",
        "access_log": False,
        "log_config": None,
        "server_header": False,
        "timeout_graceful_shutdown": GRACE_S,
    }
    return uvicorn.Config(app, **{**settings, **changes})


class Server(uvicorn.Server):
    """A server that tells the application that it is about to end, before it waits for what is in flight."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End: nobody waits for news any more."""
        self.config.app.state.let_go()  # type: ignore[union-attr]
        await super().shutdown(sockets)
