"""One connection to the service: carries one exchange at a time, and stamps its four instants.

An `asyncio.Protocol` with a C parser. A request is bytes made beforehand, an answer is an `Exchange` with its stamps:
intended is whoever asks' own, sent, first byte and done are taken here, and the reason is told when one is missing.
Nothing is decided here: no request is sent twice, no redirect followed. `client` holds many of these; next: `api`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import time
from collections.abc import Callable
from typing import Protocol, cast

import httptools

from harness.sample import Outcome
from harness.samplebuffer import NAN, UNKNOWN

# Shorter than the 5 s after which uvicorn closes an idle connection, so that it is not met half-closed.
IDLE_MAX_S = 4.0
PEEK_AFTER_S = 0.1  # a connection idle for longer is asked (one system call) whether its peer has closed it
ERROR_CHARS_MAX = 300  # of one line in the samples

Timing = tuple[float, float, float, float]  # db, quota, publish, app in ms
NO_TIMING: Timing = (NAN, NAN, NAN, NAN)


class Exchange:
    """One request and what became of it. Stamps are monotonic nanoseconds, UNKNOWN where it did not come to that."""

    __slots__ = (
        "body",
        "carrier",
        "connection_id",
        "done_at_ns",
        "due_at",
        "error",
        "first_byte_at_ns",
        "on_done",
        "outcome",
        "response_bytes",
        "retry_after_s",
        "sent_at_ns",
        "server_timing",
        "status",
        "wire",
    )

    def __init__(self, wire: bytes, on_done: Callable[[Exchange], None]) -> None:
        self.wire = wire
        self.on_done = on_done
        self.sent_at_ns = UNKNOWN
        self.first_byte_at_ns = UNKNOWN
        self.done_at_ns = UNKNOWN
        self.status = UNKNOWN
        self.outcome: Outcome | None = None  # None while it is under way
        self.error: str | None = None
        self.body = b""
        self.server_timing = b""
        self.retry_after_s = 0.0  # what a 429 or 503 asked to be waited
        self.response_bytes = UNKNOWN  # head and body
        self.connection_id = UNKNOWN
        self.carrier: Connection | None = None  # while it is under way
        self.due_at = 0.0  # loop time at which patience ends

    def conclude(self, outcome: Outcome, error: str | None = None) -> None:
        """Stamp the end, once, and tell whoever asked."""
        if self.done_at_ns == UNKNOWN:
            self.done_at_ns = time.monotonic_ns()
        self.outcome = outcome
        self.error = error
        self.carrier = None
        self.on_done(self)


def parse_server_timing(header: bytes) -> Timing:
    """Read `auth;dur=0.1, db;dur=2` into (db, quota, publish, app) milliseconds, NAN where not told (W3C)."""
    if not header:
        return NO_TIMING
    told: dict[bytes, float] = {}
    for metric in header.split(b","):
        name, *parameters = metric.split(b";")
        for parameter in parameters:
            key, _, value = parameter.partition(b"=")
            if key.strip().lower() == b"dur":
                with contextlib.suppress(ValueError):
                    told[name.strip().lower()] = float(value.strip().strip(b'"'))
    return (told.get(b"db", NAN), told.get(b"quota", NAN), told.get(b"publish", NAN), told.get(b"app", NAN))


class Pool(Protocol):
    """Who holds connections, and hears of them."""

    def release(self, connection: Connection) -> None:
        """Take back a connection whose answer is complete."""

    def forget(self, connection: Connection) -> None:
        """Drop a connection that is closed or about to be."""


class Connection(asyncio.Protocol):
    """One TCP connection: carries one exchange at a time."""

    def __init__(self, pool: Pool, number: int) -> None:
        self.number = number
        self.idle_since = 0.0
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._fd = -1
        self._exchange: Exchange | None = None
        self._start_answer()

    def _start_answer(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []
        self._complete = False
        self._reuse = False
        self._surplus = False  # a second answer began behind the one that was asked for
        self._ends_with_connection = True  # until a length or a transfer coding was announced

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport (called by the loop)."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own is one in all but its class
        self._fd = transport.get_extra_info("socket").fileno()

    def usable(self, now: float) -> bool:
        """Tell whether a request may be put on this idle connection without meeting a peer that has left."""
        if self._transport is None or self._transport.is_closing() or now - self.idle_since > IDLE_MAX_S:
            return False
        if now - self.idle_since < PEEK_AFTER_S:
            return True
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return not poll.poll(0)  # readable while idle: an end of file, or bytes that nobody asked for

    def start(self, exchange: Exchange) -> None:
        """Put the request on the wire."""
        assert self._transport is not None  # noqa: S101 - only usable or fresh connections are started
        self._exchange = exchange
        exchange.carrier = self
        exchange.connection_id = self.number
        exchange.response_bytes = 0
        # The transport hands the bytes to the kernel within write() itself when nothing waits before them.
        exchange.sent_at_ns = time.monotonic_ns()
        self._transport.write(exchange.wire)

    def data_received(self, data: bytes) -> None:
        """Take a piece of the answer (called by the loop)."""
        exchange = self._exchange
        if exchange is None:
            self.abort()  # bytes that nobody asked for
            return
        if exchange.first_byte_at_ns == UNKNOWN:
            exchange.first_byte_at_ns = time.monotonic_ns()
        exchange.response_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as fault:
            self._fail(f"unreadable answer: {fault}")
            return
        if self._surplus:
            self._fail("unreadable answer: more than one for one request")
        elif self._complete:
            self._finish(reuse=self._reuse)

    def on_message_begin(self) -> None:
        """Note an answer that nobody asked for (called by the parser)."""
        self._surplus = self._complete

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take the few headers that a sample needs (called by the parser)."""
        name = name.lower()
        exchange = self._exchange
        if name in {b"content-length", b"transfer-encoding"}:
            self._ends_with_connection = False
        elif exchange is None:
            return
        elif name == b"server-timing":
            exchange.server_timing = b", ".join(part for part in (exchange.server_timing, value) if part)
        elif name == b"retry-after":
            with contextlib.suppress(ValueError):
                exchange.retry_after_s = max(0.0, float(value))

    def on_headers_complete(self) -> None:
        """Take the status (called by the parser)."""
        if self._exchange is not None:
            self._exchange.status = self._parser.get_status_code()
            if self._exchange.status in {204, 304}:
                self._ends_with_connection = False

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body (called by the parser)."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """Note the end of an answer (called by the parser); `data_received` acts on it outside of the parser."""
        # 1xx answers are followed by the one that was asked for.
        self._complete = self._exchange is not None and self._exchange.status >= 200
        self._reuse = self._parser.should_keep_alive()  # the parser knows it only here

    def _finish(self, *, reuse: bool) -> None:
        exchange, self._exchange = self._exchange, None
        assert exchange is not None and self._transport is not None  # noqa: S101, PT018
        exchange.done_at_ns = time.monotonic_ns()  # before the connection is given to a request that waits for it
        exchange.body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        if reuse and not self._transport.is_closing():
            self._start_answer()
            self._pool.release(self)
        else:
            self.abort()
        ok = 200 <= exchange.status < 300 or exchange.status == 304
        exchange.conclude(Outcome.OK if ok else Outcome.HTTP_ERROR)

    def _fail(self, fault: str) -> None:
        exchange, self._exchange = self._exchange, None
        self.abort()
        if exchange is not None:
            exchange.conclude(Outcome.CONNECTION_ERROR, fault[:ERROR_CHARS_MAX])

    def give_up(self) -> None:
        """Let go of the exchange under way: an answer that comes later must not be taken for the next one's."""
        self._exchange = None
        self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """End what was under way (called by the loop)."""
        exchange = self._exchange
        if exchange is None:
            self._pool.forget(self)
        elif exc is None and self._ends_with_connection and exchange.status >= 200:
            self._finish(reuse=False)  # HTTP/1.0 manner: the end of the connection is the end of the body
        elif exchange.first_byte_at_ns == UNKNOWN:
            self._fail(f"connection closed before an answer ({reason_of(exc)})")
        else:
            self._fail(f"connection closed within the answer ({reason_of(exc)})")

    def abort(self) -> None:
        """Close at once."""
        self._pool.forget(self)
        if self._transport is not None:
            self._transport.abort()


def reason_of(exc: BaseException | None) -> str:
    """Return why a connection was lost or could not be made, in a few words."""
    if exc is None:
        return "end of file"
    if isinstance(exc, OSError) and exc.errno and exc.errno > 0:
        return os.strerror(exc.errno)  # asyncio puts its own words, and the address, into strerror
    return exc.strerror if isinstance(exc, OSError) and exc.strerror else type(exc).__name__
