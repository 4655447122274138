"""A proxy that stands between a client and a server and fails as networks do, when it is told to.

It listens on a TCP port of this machine and passes every connection on to a TCP port or a Unix socket. A fault is
switched on at run time, for connections that are open, for those still to come, or for both. What it does to bytes:

    DELAY                 each piece waits before it goes on, in either direction
    RESET                 open connections end with RST on both sides; new ones are accepted and reset
    HALF_OPEN_TO_SERVER   what the client sends is lost, its FIN and RST too; what the server sends arrives
    HALF_OPEN_TO_CLIENT   what the server sends is lost, its FIN and RST too; what the client sends arrives
    BLACKHOLE             all is lost both ways; new connections are accepted, and the server never hears of them

**What has lost a byte never speaks again.** A stream with a hole in it would be garbage, so a connection that lost
anything stays as it is when the fault is lifted: silent towards its client until the client gives up. Towards the
server it ends `forget_s` after the loss, which is what the server's own keepalives bring about on a real network.
A connection that lost nothing goes on as if nothing had been. It knows no protocol. Who uses it: `chaos.py`.
"""

from __future__ import annotations

import asyncio
import enum
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Self
from urllib.parse import parse_qs, urlsplit

from service.embedded import Stack
from service.embedded.postgres import ROLE

Upstream = str | tuple[str, int]
"""Where the server is: the path of a Unix socket, or host and port."""

PIECE_BYTES = 1 << 16
RST_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER with no time left: close() sends RST and drops what waits


class Fault(enum.StrEnum):
    """What becomes of the bytes of a connection."""

    NONE = "none"  # they are passed on
    DELAY = "delay"  # they are passed on late
    RESET = "reset"  # the connection is reset
    HALF_OPEN_TO_SERVER = "half-open to the server"  # the client's are lost
    HALF_OPEN_TO_CLIENT = "half-open to the client"  # the server's are lost
    BLACKHOLE = "blackhole"  # all are lost


LOSES_TO_SERVER = frozenset({Fault.BLACKHOLE, Fault.HALF_OPEN_TO_SERVER})
LOSES_TO_CLIENT = frozenset({Fault.BLACKHOLE, Fault.HALF_OPEN_TO_CLIENT})


class FaultProxy:
    """One port in front of one server; `async with FaultProxy(upstream) as proxy: … proxy.switch(Fault.RESET)`."""

    def __init__(self, upstream: Upstream, *, delay_s: float = 0.3, forget_s: float = 30.0) -> None:
        self.delay_s = delay_s
        self.port = 0  # known once it listens
        self._upstream = upstream
        self._forget_s = forget_s
        self._for_new = Fault.NONE
        self._links: set[_Link] = set()
        self._accepting: asyncio.Task[None] | None = None
        self._listener: socket.socket | None = None

    async def __aenter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._accepting = asyncio.create_task(self._accept(self._listener), name="accept")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        links = list(self._links)
        for link in links:
            link.end()
        await asyncio.gather(*(link.ended() for link in links))

    def switch(self, fault: Fault, *, new: bool = True, existing: bool = True) -> None:
        """Set what becomes of new connections, of open ones, or of both, from now on."""
        if new:
            self._for_new = fault
        if existing:
            for link in list(self._links):
                link.switch(fault)

    @property
    def open_connections(self) -> int:
        """How many connections are held, those that will never speak again included."""
        return len(self._links)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(listener)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._for_new is Fault.RESET:
                _reset(client)
                continue
            link = _Link(client, self._for_new, self.delay_s, self._forget_s)
            self._links.add(link)
            link.start(self._upstream, self._links.discard)


class _Link:
    """One connection: the client's side, the server's side, and what becomes of what passes between them."""

    def __init__(self, client: socket.socket, fault: Fault, delay_s: float, forget_s: float) -> None:
        self._client = client
        self._server: socket.socket | None = None
        self._fault = fault
        self._delay_s = delay_s
        self._forget_s = forget_s
        self._has_lost = False
        self._forgetting: asyncio.TimerHandle | None = None
        self._forgotten = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self, upstream: Upstream, gone: Callable[[_Link], object]) -> None:
        """Begin to pass bytes on; `gone` is called with the link when it has ended."""
        self._task = asyncio.create_task(self._live(upstream), name="link")
        self._task.add_done_callback(lambda _: gone(self))

    def switch(self, fault: Fault) -> None:
        """Change what becomes of its bytes, unless some were lost already."""
        if self._has_lost:
            return
        self._fault = fault
        if fault is Fault.RESET:
            self.end()

    def end(self) -> None:
        """Reset both sides."""
        if self._task is not None:
            self._task.cancel()

    async def ended(self) -> None:
        """Return when nothing of it is left."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    async def _live(self, upstream: Upstream) -> None:
        try:
            if self._fault is Fault.BLACKHOLE:
                self._lose()
                await self._pump(self._client, None, LOSES_TO_SERVER)
                return
            self._server = await _connect(upstream)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(self._client, self._server, LOSES_TO_SERVER))
                group.create_task(self._pump(self._server, self._client, LOSES_TO_CLIENT))
            if self._has_lost:
                await self._forgotten.wait()
            else:
                self._client.close()
                self._server.close()
        except* OSError:  # the server refused, or one side reset: so is the other
            pass
        finally:
            if self._forgetting is not None:
                self._forgetting.cancel()
            _reset(self._client)
            if self._server is not None:
                _reset(self._server)

    async def _pump(self, source: socket.socket, sink: socket.socket | None, losing: frozenset[Fault]) -> None:
        """Pass on what comes from one side until it ends; after a loss, neither side's end is told to the other."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                piece = await loop.sock_recv(source, PIECE_BYTES)
            except OSError:
                if self._fault not in losing:
                    raise
                piece = b""
            if self._fault is Fault.DELAY:
                await asyncio.sleep(self._delay_s)
            if self._fault in losing or sink is None:
                self._lose()
                if not piece:
                    return
                continue
            try:
                if not piece:
                    sink.shutdown(socket.SHUT_WR)
                    return
                await loop.sock_sendall(sink, piece)
            except OSError:
                if not self._has_lost:
                    raise
                if not piece:
                    return

    def _lose(self) -> None:
        """Note a loss; from now on the server's side has so long to live."""
        if not self._has_lost:
            self._has_lost = True
            self._forgetting = asyncio.get_running_loop().call_later(self._forget_s, self._forget)

    def _forget(self) -> None:
        self._forgotten.set()
        if self._server is not None:
            with suppress(OSError):
                self._server.shutdown(socket.SHUT_RDWR)  # ends whoever reads it; closed when the client has ended too


async def _connect(upstream: Upstream) -> socket.socket:
    """Open a connection to the server; raises OSError."""
    family = socket.AF_UNIX if isinstance(upstream, str) else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    server.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(server, upstream)
    except BaseException:
        server.close()
        raise
    return server


def _reset(end: socket.socket) -> None:
    """Close a socket so that its peer sees RST (a Unix socket: an end without what was still on its way)."""
    with suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
    end.close()


def socket_of(stack: Stack) -> str:
    """Return the path of a stack's PostgreSQL."""
    return f"{parse_qs(urlsplit(stack.database_url).query)['host'][0]}/.s.PGSQL.5432"


def behind(proxy: FaultProxy, database_url: str) -> str:
    """Return the address of a stack's database behind a proxy."""
    return f"postgresql://{ROLE}@127.0.0.1:{proxy.port}{urlsplit(database_url).path}?sslmode=disable"
