"""The server's side of an HTTP connection below the application: bounded heads, and how a connection parts.

uvicorn's own protocol, when the process is told to stop, closes every connection on which no request is being worked
on. A client that sends its next request at that moment has it reset, and whether it was executed it cannot know. So
here a connection parts in the way that HTTP has for it (RFC 9112, section 9.6): the next answer says
`Connection: close`, and only a connection on which no request comes for a while is closed without one. A request that
is still being sent when the process must end is refused in words: none of it was executed.
"""

from __future__ import annotations

from asyncio import TimerHandle
from typing import cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.errors import PROBLEM_MEDIA_TYPE, ApiError, Malformed, Unavailable, problem
from service.exchange import NO_TIME, field_headers

MAX_HEAD_BYTES = 64 << 10
"""Most that a request head, target and fields together, may have after the first piece that arrived of it: 64 KiB. The
parser itself would gather without end."""

IDLE_PARTING_S = 2.0
"""How long an idle connection waits for one more request once the process was told to stop, seconds."""

NOT_ARRIVED = Unavailable(
    "the service restarts, and the request had not arrived by then; nothing was done, send it again"
)
NOT_ANSWERED = Unavailable("the service restarts, and the request took too long; it may have been done")


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with an end to how large a head may grow, and a parting that loses no request."""

    idle_parting_s = IDLE_PARTING_S  # tests are less patient

    _head_bytes = 0
    _head_is_open = False
    _parting = False
    _part_timer: TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        """Refuse a head that has not ended after MAX_HEAD_BYTES beyond its first piece."""
        was_open = self._head_is_open
        super().data_received(data)
        if was_open and self._head_is_open:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response(f"the request's head is too large; send at most {MAX_HEAD_BYTES >> 10} KiB")

    def on_message_begin(self) -> None:
        """Note that a head has begun."""
        self._head_is_open, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Note that the head has ended; an answer that is given while parting is the connection's last."""
        self._head_is_open = False
        super().on_headers_complete()
        if self._parting and self._is_answering:
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        """Part: answer what was asked or is about to be, say that it is the last answer, and close."""
        if self._parting:
            return
        self._parting = True
        if self._is_answering:
            self.cycle.keep_alive = False
        self._part_timer = self.loop.call_later(self.idle_parting_s, self._close_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._forget_timer()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self) -> None:
        """Leave the connection to the socket's protocol, which parts in its own way."""
        self._forget_timer()
        super().handle_websocket_upgrade()

    def _forget_timer(self) -> None:
        if self._part_timer is not None:
            self._part_timer.cancel()

    @property
    def _is_answering(self) -> bool:
        """Whether a request is being worked on, or its body is still awaited."""
        cycle = cast("RequestResponseCycle | None", self.cycle)  # as long as nothing was asked there is none
        return cycle is not None and not cycle.response_complete

    def _close_if_idle(self) -> None:
        """Close a connection on which no request has begun."""
        if not self._head_is_open and not self._is_answering:
            self.transport.close()

    def refuse_unarrived(self) -> None:
        """Refuse a request that is still being sent."""
        if self._head_is_open or (self._is_answering and self.cycle.more_body and not self.cycle.response_started):
            self._refuse(NOT_ARRIVED)

    def refuse_unanswered(self) -> None:
        """Refuse a request whose answer has not begun, and close."""
        if self._is_answering and not self.cycle.response_started:
            self._refuse(NOT_ANSWERED)
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are no HTTP as every other request is refused, and close the connection."""
        self._write_last(Malformed(msg.removesuffix(".")), "")

    def _refuse(self, error: ApiError) -> None:
        """Answer in the application's place; for the application the client has gone."""
        if self._is_answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._write_last(error, self.scope.get("path", "/"))

    def _write_last(self, error: ApiError, instance: str) -> None:
        """Write a problem as the connection's last answer, and close."""
        body = problem(error, instance)
        fields = {
            "content-type": PROBLEM_MEDIA_TYPE,
            "content-length": str(len(body)),
            "server-timing": NO_TIME,
            "connection": "close",
            **error.headers(),
        }
        named = [*self.server_state.default_headers, *field_headers(fields)]
        head = b"".join(b"%s: %s\r\n" % field for field in named)
        self.transport.write(STATUS_LINE[error.status] + head + b"\r\n" + body)
        self.transport.close()
