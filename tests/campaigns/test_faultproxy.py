"""The fault proxy on real sockets: what each fault does to open and to new connections, and what comes after it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.campaigns.faultproxy import Fault, FaultProxy, Upstream

FORGET_S = 0.2


@dataclass
class Server:
    """Answers each line with the same line, and knows who is connected."""

    upstream: Upstream
    heard: list[bytes] = field(default_factory=list)
    told: asyncio.Event = field(default_factory=asyncio.Event)
    """Set at whatever happens here."""
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    """How connections ended: `end` or `reset`."""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        self.writers.append(writer)
        self.told.set()
        try:
            while line := await reader.readline():
                self.heard.append(line)
                self.told.set()
                writer.write(line)
            self.ends.append("end")
        except ConnectionError:
            self.ends.append("reset")
        self.told.set()
        writer.close()

    async def until_one_ends(self) -> None:
        """Return when a connection has ended, one way or the other; the test's own timeout bounds it."""
        while not self.ends:
            self.told.clear()
            await self.told.wait()

    async def until_heard(self, *lines: bytes) -> None:
        """Return when these lines have arrived."""
        while self.heard != list(lines):
            self.told.clear()
            await self.told.wait()


@pytest.fixture(params=["tcp", "unix"])
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Server]:
    """A server on a TCP port or on a Unix socket."""
    server = Server("")
    if request.param == "tcp":
        listening = await asyncio.start_server(server.answer, "127.0.0.1", 0)
        host, port = listening.sockets[0].getsockname()
        server.upstream = (host, port)
    else:
        server.upstream = str(tmp_path / "socket")
        listening = await asyncio.start_unix_server(server.answer, server.upstream)
    yield server
    for writer in server.writers:
        writer.close()
    listening.close()


@pytest.fixture
async def proxy(server: Server) -> AsyncIterator[FaultProxy]:
    """A proxy in front of the server."""
    async with FaultProxy(server.upstream, delay_s=0.05, forget_s=FORGET_S) as proxy:
        yield proxy


class Client:
    """One connection through the proxy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def ask(self, line: bytes) -> bytes:
        """Send a line and return the answer."""
        self.writer.write(line)
        return await self.reader.readline()

    async def how_it_ends(self) -> str:
        """Return how the connection ends; hangs while it does not."""
        try:
            return "end" if await self.reader.read() == b"" else "bytes"
        except ConnectionResetError:
            return "reset"

    async def is_silent(self) -> bool:
        """Whether nothing arrives: the whole time of the server's patience and as much again goes by."""
        reading = asyncio.ensure_future(self.reader.read(1))
        done, _ = await asyncio.wait({reading}, timeout=2 * FORGET_S)
        reading.cancel()
        return not done


@pytest.fixture
async def connections() -> AsyncIterator[AsyncExitStack]:
    """What a test opened."""
    async with AsyncExitStack() as stack:
        yield stack


async def dial(proxy: FaultProxy, connections: AsyncExitStack) -> Client:
    """Open a connection through the proxy."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    connections.callback(writer.close)
    return Client(reader, writer)


async def test_without_a_fault_bytes_and_ends_are_passed_on(
    server: Server, proxy: FaultProxy, connections: AsyncExitStack
) -> None:
    client = await dial(proxy, connections)
    large = b"x" * 50_000 + b"\n"

    assert await client.ask(b"one\n") == b"one\n"
    assert await client.ask(large) == large

    client.writer.write_eof()
    assert await client.how_it_ends() == "end"
    await server.until_one_ends()
    assert server.ends == ["end"]


async def test_what_a_client_sent_before_its_end_is_still_answered(
    proxy: FaultProxy, connections: AsyncExitStack
) -> None:
    client = await dial(proxy, connections)
    client.writer.write(b"last\n")
    client.writer.write_eof()

    assert await client.reader.read() == b"last\n"


async def test_a_reset_by_the_client_is_a_lost_connection_for_the_server(
    server: Server, proxy: FaultProxy, connections: AsyncExitStack
) -> None:
    client = await dial(proxy, connections)
    assert await client.ask(b"one\n") == b"one\n"

    client.writer.transport.abort()

    await server.until_one_ends()


async def test_a_delay_keeps_bytes_and_their_order(proxy: FaultProxy, connections: AsyncExitStack) -> None:
    client = await dial(proxy, connections)
    proxy.switch(Fault.DELAY)

    client.writer.write(b"one\n")
    client.writer.write(b"two\n")

    assert [await client.reader.readline() for _ in range(2)] == [b"one\n", b"two\n"]


async def test_a_delay_is_at_least_as_long_as_it_says(proxy: FaultProxy, connections: AsyncExitStack) -> None:
    client = await dial(proxy, connections)
    proxy.switch(Fault.DELAY)
    loop = asyncio.get_running_loop()
    asked_at_s = loop.time()

    await client.ask(b"one\n")

    assert loop.time() - asked_at_s >= 2 * proxy.delay_s  # there and back; a lower bound that no slow machine breaks


async def test_a_reset_ends_open_connections_on_both_sides(
    server: Server, proxy: FaultProxy, connections: AsyncExitStack
) -> None:
    client = await dial(proxy, connections)
    await client.ask(b"one\n")

    proxy.switch(Fault.RESET, new=False)

    assert await client.how_it_ends() == "reset"
    await server.until_one_ends()
    assert await (await dial(proxy, connections)).ask(b"new\n") == b"new\n"


async def test_a_reset_for_new_connections_leaves_open_ones_alone(
    server: Server, proxy: FaultProxy, connections: AsyncExitStack
) -> None:
    client = await dial(proxy, connections)
    await client.ask(b"one\n")

    proxy.switch(Fault.RESET, existing=False)
    refused = await dial(proxy, connections)

    assert await refused.how_it_ends() == "reset"
    assert await client.ask(b"two\n") == b"two\n"
    assert server.heard == [b"one\n", b"two\n"]


async def test_half_open_to_the_server_loses_what_the_client_sends_and_its_end(
    server: Server, proxy: FaultProxy, connections: AsyncExitStack
) -> None:
    client = await dial(proxy, connections)
    await client.ask(b"one\n")
    proxy.switch(Fault.HALF_OPEN_TO_SERVER)

    client.writer.write(b"lost\n")
    server.writers[0].write(b"from the server\n")

    assert await client.reader.readline() == b"from the server\n"
    client.writer.transport.abort()
    await server.until_one_ends()  # of old age, not by the client's end
    assert server.heard == [b"one\n"]


async def test_half_open_to_the_client_loses_answers_and_the_servers_end(
    server: Server, proxy: FaultProxy, connections: AsyncExitStack
) -> None:
    client = await dial(proxy, connections)
    await client.ask(b"one\n")
    proxy.switch(Fault.HALF_OPEN_TO_CLIENT)

    client.writer.write(b"done all the same\n")

    await server.until_heard(b"one\n", b"done all the same\n")
    server.writers[0].close()
    assert await client.is_silent()


async def test_a_blackhole_accepts_swallows_and_never_answers(
    server: Server, proxy: FaultProxy, connections: AsyncExitStack
) -> None:
    open_before = await dial(proxy, connections)
    await open_before.ask(b"one\n")
    proxy.switch(Fault.BLACKHOLE)

    new = await dial(proxy, connections)
    for client in (open_before, new):
        client.writer.write(b"swallowed\n")

    assert await new.is_silent()
    assert await open_before.is_silent()
    assert server.heard == [b"one\n"]
    assert len(server.writers) == 1


async def test_what_has_lost_a_byte_stays_silent_when_the_fault_is_lifted(
    server: Server, proxy: FaultProxy, connections: AsyncExitStack
) -> None:
    loser, quiet = await dial(proxy, connections), await dial(proxy, connections)
    await loser.ask(b"one\n")
    await quiet.ask(b"two\n")
    proxy.switch(Fault.BLACKHOLE)
    loser.writer.write(b"lost\n")
    assert await loser.is_silent()

    proxy.switch(Fault.NONE)
    loser.writer.write(b"never heard\n")

    assert await quiet.ask(b"three\n") == b"three\n"
    assert await (await dial(proxy, connections)).ask(b"four\n") == b"four\n"
    assert await loser.is_silent()
    assert server.heard == [b"one\n", b"two\n", b"three\n", b"four\n"]


async def test_a_server_that_is_away_is_a_reset_for_the_client(tmp_path: Path, connections: AsyncExitStack) -> None:
    async with FaultProxy(str(tmp_path / "nobody")) as proxy:
        assert await (await dial(proxy, connections)).how_it_ends() == "reset"


async def test_a_closed_proxy_holds_nothing(server: Server) -> None:
    async with AsyncExitStack() as connections, FaultProxy(server.upstream) as proxy:
        kept, silent = await dial(proxy, connections), await dial(proxy, connections)
        await kept.ask(b"one\n")
        await silent.ask(b"two\n")
        proxy.switch(Fault.BLACKHOLE)
        silent.writer.write(b"lost\n")
        assert await silent.is_silent()
    assert proxy.open_connections == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", proxy.port)) != 0
