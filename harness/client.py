"""Reaches the service: the only file of the harness that opens a socket to it.

A keep-alive pool of connections (`connection`). The hot path (`Client.send` to callback) builds no dict, no task, no
timer per request: one timer serves all, because every request has the same patience. A pool that may not grow makes
requests wait in the order of their coming; whoever asks counts that wait, for `sent` is stamped when it is over.

What it refuses: to decide. It never repeats a request that was handed to the kernel, follows no redirect, and reports
each fault as an `Outcome`. Next: `api` knows which requests there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections import deque
from collections.abc import Callable

from harness.address import split_url
from harness.connection import Connection, Exchange, reason_of
from harness.sample import Outcome

REQUEST_TIMEOUT_S = 10.0  # an answer after so long is of no use to a user: over 25 times the slowest SLO target

OWN_FAULT = "generator: "
"""Begins the error of a request that could not be sent for want of something of this machine's own."""

# What a machine that makes load runs out of: descriptors of the process and of the machine, memory, local ports.
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})


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
        self._idle: deque[Connection] = deque()  # the newest is taken first, so that few connections serve a low rate
        self._connections: set[Connection] = set()
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
                _, connection = await loop.create_connection(lambda: Connection(self, number), host, port)  # noqa: B023
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

    def release(self, connection: Connection) -> None:
        """Take back a connection whose answer is complete: for what waits for one, or to be idle."""
        waiting = self._next_waiting()
        if waiting is not None:
            connection.start(waiting)
            return
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
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
                    _, connection = await loop.create_connection(lambda: Connection(self, number), host, port)
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
            exchange.conclude(Outcome.NOT_SENT, f"{OWN_FAULT}cannot open a connection: {reason_of(faults[-1])}")
            return
        refused = all(fault.errno == errno.ECONNREFUSED for fault in faults)
        text = f"cannot connect to {self._host_header}: {reason_of(faults[-1])}"
        exchange.conclude(Outcome.REFUSED if refused else Outcome.CONNECTION_ERROR, text)

    async def _resolve(self) -> list[tuple[str, int]]:
        """Look the host up once: a lookup per connection would be measured as the service's time."""
        if not self._addresses:
            found = await asyncio.get_running_loop().getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
            self._addresses = list(dict.fromkeys((str(entry[4][0]), int(entry[4][1])) for entry in found))
        return self._addresses
