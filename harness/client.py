"""Reaches the service: the only file of the harness that opens a socket to it.

A keep-alive pool of connections, each an `asyncio.Protocol` with a C parser; a request is bytes made beforehand, an
answer is an `Exchange` with its stamps. The hot path (`Client.send` to callback) builds no dict, no task, no timer per
request: one timer serves all, because every request has the same patience. A pool that may not grow makes requests
wait in the order of their coming; whoever asks counts that wait, for `sent` is stamped when it is over.

What it refuses: to decide. It never repeats a request that was handed to the kernel, follows no redirect, and reports
each fault as an `Outcome`. Next: `api` knows which requests there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import cast

import httptools

from harness.address import split_url
from harness.sample import Outcome
from harness.samplebuffer import NAN, UNKNOWN

REQUEST_TIMEOUT_S = 10.0  # an answer after so long is of no use to a user: over 25 times the slowest SLO target
# Shorter than the 5 s after which uvicorn closes an idle connection, so that it is not met half-closed.
IDLE_MAX_S = 4.0
PEEK_AFTER_S = 0.1  # a connection idle for longer is asked (one system call) whether its peer has closed it
ERROR_CHARS_MAX = 300  # of one line in the samples

OWN_FAULT = "generator: "
"""Begins the error of a request that could not be sent for want of something of this machine's own."""

# What a machine that makes load runs out of: descriptors of the process and of the machine, memory, local ports.
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})

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
        self.carrier: _Connection | None = None  # while it is under way
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


class _Connection(asyncio.Protocol):
    """One TCP connection: carries one exchange at a time."""

    def __init__(self, client: Client, number: int) -> None:
        self.number = number
        self.idle_since = 0.0
        self._client = client
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
            self._client.release(self)
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
        exchange = self._exchange
        if exchange is None:
            self._client.forget(self)
        elif exc is None and self._ends_with_connection and exchange.status >= 200:
            self._finish(reuse=False)  # HTTP/1.0 manner: the end of the connection is the end of the body
        elif exchange.first_byte_at_ns == UNKNOWN:
            self._fail(f"connection closed before an answer ({_reason(exc)})")
        else:
            self._fail(f"connection closed within the answer ({_reason(exc)})")

    def abort(self) -> None:
        """Close at once."""
        self._client.forget(self)
        if self._transport is not None:
            self._transport.abort()


def _reason(exc: BaseException | None) -> str:
    if exc is None:
        return "end of file"
    if isinstance(exc, OSError) and exc.errno and exc.errno > 0:
        return os.strerror(exc.errno)  # asyncio puts its own words, and the address, into strerror
    return exc.strerror if isinstance(exc, OSError) and exc.strerror else type(exc).__name__


class Client:
    """A pool of connections to one service. Belongs to one event loop."""

    def __init__(self, url: str, timeout_s: float = REQUEST_TIMEOUT_S, connections_max: int | None = None) -> None:
        """`timeout_s` is every request's patience, waiting and connecting included.

        With `connections_max`, requests wait for one of so many connections. Raises BadUsage for a URL it cannot use.
        """
        self.url = url
        self.connections_max = connections_max
        self.host, self.port, self.prefix = split_url(url)
        self.timeout_s = timeout_s
        host = f"[{self.host}]" if ":" in self.host else self.host
        self._host_header = host if self.port == 80 else f"{host}:{self.port}"
        self._addresses: list[tuple[str, int]] = []
        self._idle: deque[_Connection] = deque()  # the newest is taken first, so that few connections serve a low rate
        self._connections: set[_Connection] = set()
        self._opened = 0
        self._opening = 0  # connections that are being made
        self._queue: deque[Exchange] = deque()  # what waits for a connection, in the order of `_waiting`
        self._waiting: deque[Exchange] = deque()  # in order of their end of patience
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def wire(self, method: str, path: str, token: str | None = None, body: bytes | None = None) -> bytes:
        """Make the bytes of a request, to be sent any number of times. A body is JSON."""
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {self._host_header}"]
        if token is not None:
            lines.append(f"Authorization: Bearer {token}")
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        lines += ["Accept: application/json", "User-Agent: plimsoll-harness", "", ""]
        return "\r\n".join(lines).encode("ascii") + (body or b"")

    def send(self, wire: bytes, on_done: Callable[[Exchange], None]) -> Exchange:
        """Send now, on an idle connection or a fresh one; `on_done` is called once, from the event loop."""
        exchange = Exchange(wire, on_done)
        loop = asyncio.get_running_loop()
        now = loop.time()
        exchange.due_at = now + self.timeout_s
        while self._waiting and self._waiting[0].outcome is not None:
            self._waiting.popleft()  # or answered requests would be kept for as long as patience lasts
        self._waiting.append(exchange)
        if self._timer is None:
            self._timer = loop.call_at(exchange.due_at, self._end_patience)
        while self._idle:
            connection = self._idle.pop()
            if connection.usable(now):
                connection.start(exchange)
                return exchange
            connection.abort()  # nothing of this request was sent on it, so a fresh one is no repetition
        if self.connections_max is not None and len(self._connections) + self._opening >= self.connections_max:
            self._queue.append(exchange)
        else:
            self._open(exchange)
        return exchange

    def _open(self, exchange: Exchange) -> None:
        """Make a connection for this exchange."""
        self._opening += 1
        task = asyncio.get_running_loop().create_task(self._connect(exchange))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _next_waiting(self) -> Exchange | None:
        while self._queue:
            exchange = self._queue.popleft()
            if exchange.outcome is None:
                return exchange
        return None

    async def warm(self, connections: int) -> OSError | None:
        """Open so many connections before they are needed; returns the first fault and opens no more after it."""
        loop = asyncio.get_running_loop()
        try:
            addresses = await self._resolve()
            while len(self._connections) < connections:
                self._opened += 1
                number = self._opened
                host, port = addresses[0]
                _, connection = await loop.create_connection(lambda: _Connection(self, number), host, port)  # noqa: B023
                self._connections.add(connection)
                self.release(connection)
        except OSError as fault:
            return fault
        return None

    async def exchange(self, wire: bytes) -> Exchange:
        """Send and wait for the outcome. Never raises for a fault of the service or the network."""
        future: asyncio.Future[Exchange] = asyncio.get_running_loop().create_future()

        def wake(done: Exchange) -> None:
            if not future.done():
                future.set_result(done)

        self.send(wire, wake)
        return await future

    async def close(self) -> None:
        """Close every connection; exchanges under way end as connection errors."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for exchange in self._waiting:
            if exchange.outcome is None:
                if exchange.carrier is not None:
                    exchange.carrier.give_up()
                exchange.conclude(Outcome.CONNECTION_ERROR, "the harness closed the connection")
        self._waiting.clear()
        self._queue.clear()
        for connection in list(self._connections):
            connection.abort()
        await asyncio.sleep(0)  # transports close their sockets in the loop's next turn

    def release(self, connection: _Connection) -> None:
        """Take back a connection whose answer is complete: for what waits for one, or to be idle."""
        waiting = self._next_waiting()
        if waiting is not None:
            connection.start(waiting)
            return
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle.append(connection)

    def forget(self, connection: _Connection) -> None:
        """Drop a connection that is closed or about to be."""
        self._connections.discard(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)
        self._fill_place()

    def _fill_place(self) -> None:
        """Open a connection for what waits, when one has gone."""
        if self._queue and self.connections_max is not None:
            free = self.connections_max - len(self._connections) - self._opening
            waiting = self._next_waiting() if free > 0 else None
            if waiting is not None:
                self._open(waiting)

    def _end_patience(self) -> None:
        """End what has waited too long, and set the timer for the next that could."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._timer = None
        while self._waiting:
            exchange = self._waiting[0]
            if exchange.outcome is None and exchange.due_at > now:
                self._timer = loop.call_at(exchange.due_at, self._end_patience)
                return
            self._waiting.popleft()
            if exchange.outcome is not None:
                continue
            if exchange.carrier is not None:
                exchange.carrier.give_up()
            if self._queue and self._queue[0] is exchange:  # patience ends in the order of the queue
                self._queue.popleft()
                text = f"none of {self.connections_max} connections was free within {self.timeout_s:g} s"
                exchange.conclude(Outcome.NOT_SENT, text)
            else:
                exchange.conclude(Outcome.TIMEOUT, f"no complete answer within {self.timeout_s:g} s")

    async def _connect(self, exchange: Exchange) -> None:
        """Open a connection for this exchange, and start it unless its patience has ended meanwhile."""
        loop = asyncio.get_running_loop()
        faults: list[OSError] = []
        self._opened += 1
        number = self._opened
        try:
            for host, port in await self._resolve():
                try:
                    _, connection = await loop.create_connection(lambda: _Connection(self, number), host, port)
                except OSError as fault:
                    faults.append(fault)
                    continue
                self._connections.add(connection)
                if exchange.outcome is None:
                    connection.start(exchange)
                else:
                    self.release(connection)
                return
        except OSError as fault:
            faults.append(fault)
        finally:
            self._opening -= 1
        if exchange.outcome is None:
            self._conclude_unconnected(exchange, faults)
        self._fill_place()

    def _conclude_unconnected(self, exchange: Exchange, faults: list[OSError]) -> None:
        if any(fault.errno in _EXHAUSTED for fault in faults):
            exchange.conclude(Outcome.NOT_SENT, f"{OWN_FAULT}cannot open a connection: {_reason(faults[-1])}")
            return
        refused = all(fault.errno == errno.ECONNREFUSED for fault in faults)
        text = f"cannot connect to {self._host_header}: {_reason(faults[-1])}"
        exchange.conclude(Outcome.REFUSED if refused else Outcome.CONNECTION_ERROR, text)

    async def _resolve(self) -> list[tuple[str, int]]:
        """Look the host up once: a lookup per connection would be measured as the service's time."""
        if not self._addresses:
            found = await asyncio.get_running_loop().getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
            self._addresses = list(dict.fromkeys((str(entry[4][0]), int(entry[4][1])) for entry in found))
        return self._addresses
