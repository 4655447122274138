"""uvicorn, as the service runs it: HTTP and sockets below the application.

On SIGTERM or SIGINT nothing more is accepted, sockets are closed with 1012 (service restart), long-polls are answered
at once with what there is, and requests in flight have `GRACE_S` to end.
"""

from __future__ import annotations

import socket
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import PROBLEM_MEDIA_TYPE, Malformed, problem
from service.exchange import NO_TIME
from service.stream.protocol import MAX_FRAME_BYTES, PING_EVERY_S, PING_PATIENCE_S, SocketProtocol

GRACE_S = 10
"""How long a request may go on after the process was asked to stop, seconds."""


MAX_HEAD_BYTES = 64 << 10
"""Largest request head, target and fields together: 64 KiB. The parser itself would gather without end."""


class BoundedHeads(HttpToolsProtocol):
    """uvicorn's protocol, with an end to how large a request's head may grow."""

    _head_bytes = 0
    _head_is_open = False

    def data_received(self, data: bytes) -> None:
        """Close the connection of a head that has not ended after MAX_HEAD_BYTES beyond its first piece."""
        was_open = self._head_is_open
        super().data_received(data)
        if was_open and self._head_is_open:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("the request's head is too large")

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are no HTTP as every other request is refused, and close the connection."""
        body = problem(Malformed(msg.removesuffix(".")), "")
        usual = [f"{name.decode()}: {value.decode()}" for name, value in self.server_state.default_headers]
        head = (
            "HTTP/1.1 400 Bad Request",
            *usual,
            f"content-type: {PROBLEM_MEDIA_TYPE}",
            f"content-length: {len(body)}",
            f"server-timing: {NO_TIME}",
            "connection: close",
        )
        self.transport.write("\r\n".join((*head, "", "")).encode() + body)
        self.transport.close()

    def on_message_begin(self) -> None:
        """Note that a head has begun."""
        self._head_is_open, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Note that the head has ended."""
        self._head_is_open = False
        super().on_headers_complete()


def configuration(app: Starlette, **changes: Any) -> uvicorn.Config:
    """Return how the service is served; tests change the event loop."""
    settings: dict[str, Any] = {
        "loop": "uvloop",
        "http": BoundedHeads,
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
        "timeout_graceful_shutdown": GRACE_S,
    }
    return uvicorn.Config(app, **{**settings, **changes})


class Server(uvicorn.Server):
    """A server that tells the application that it is about to end, before it waits for what is in flight."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End: nobody waits for news any more."""
        self.config.app.state.let_go()  # type: ignore[union-attr]
        await super().shutdown(sockets)
