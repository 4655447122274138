"""The server's side of a socket below the application: what uvicorn's own protocol leaves open for clients that stall.

A close frame waits until the transport takes data again, and a transport that is closed waits until its data are taken:
for a client that stalls, both may last as long as its kernel answers. So here a connection that the service closes is
cut when the client has not parted within a bounded time. Small send buffers make a stall visible early.
"""

from __future__ import annotations

import socket
from asyncio.transports import BaseTransport

from uvicorn._types import ASGISendEvent
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

MAX_FRAME_BYTES = 64 << 10
"""Largest message that is read; a larger one closes the socket with 1009."""

PING_EVERY_S = PING_PATIENCE_S = 20.0
"""How often a silent client is asked whether it still lives, and how long it may take to answer, seconds."""

SEND_BUFFER_BYTES = 64 << 10
"""Asked of the kernel for each socket (Linux doubles it). By default it takes megabytes, which hide a stall."""

PARTING_S = 10.0
"""How long a client that was told to go may take what was sent before, seconds."""

SHUTDOWN_PARTING_S = 1.0
"""The same while the process ends, seconds."""

SHUTDOWN_PATIENCE_S = 5.0
"""How long the application may take to close a socket while the process ends (a command is being answered), seconds."""


class SocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket protocol, with an end to all waiting."""

    parting_s = PARTING_S  # tests are less patient
    _ending = False

    def connection_made(self, transport: BaseTransport) -> None:
        """Keep the kernel's share of what waits small."""
        super().connection_made(transport)
        self.close_timeout = self.parting_s
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)

    async def send(self, message: ASGISendEvent) -> None:
        """Send; from a close frame on, the client's time is bounded."""
        if message["type"] == "websocket.close" and self.handshake_complete and not self.disconnected:
            self._cut_after(self.parting_s)
        await super().send(message)

    def keepalive_timeout(self) -> None:
        """Close the connection of a client that answers no ping."""
        super().keepalive_timeout()
        self._cut_after(0.0)

    def shutdown(self) -> None:
        """See that the socket closes soon. The application closes it with 1012 when it has answered what it was asked.

        A handshake that is under way is ended first: the client is owed an answer, and 1012 says what to do.
        """
        if self._ending:
            return
        self._ending = True
        self.parting_s = SHUTDOWN_PARTING_S
        if self.close_sent:
            self._cut_after(SHUTDOWN_PARTING_S)
        else:
            self.loop.call_later(SHUTDOWN_PATIENCE_S, self._end)

    def _end(self) -> None:
        """Close a socket that the application did not."""
        super().shutdown()
        self._cut_after(SHUTDOWN_PARTING_S)

    def _cut_after(self, seconds: float) -> None:
        self.loop.call_later(seconds, self.transport.abort)
