"""What tests and campaigns of the streams share: a server, a client that checks what it sees, a writer of events."""

from __future__ import annotations

import json
import socket
import threading
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import redis.asyncio
from sqlalchemy import text
from starlette.applications import Starlette
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from service.announce import Announcer
from service.db import Database
from service.doorbell import Doorbell
from service.events import EventType, NewEvent
from service.guarded import connect_redis
from service.server import Server, configuration

APPEND = text("""
    WITH grown AS (
        UPDATE runs SET last_seq = last_seq + :count WHERE run_id = :run_id
        RETURNING workspace_id, correlation_id, last_seq
    ), added AS (
        INSERT INTO events (run_id, seq, event_type, payload, correlation_id, created_at)
        SELECT :run_id, last_seq - :count + n, :event_type, CAST(:payload AS jsonb), correlation_id, now()
        FROM grown, generate_series(1, :count) AS n
    )
    SELECT workspace_id, correlation_id, last_seq, now() AS created_at FROM grown
""")


class Writer:
    """Appends events to runs as the engine does: number, commit, publish."""

    def __init__(self, database: Database, announcer: Announcer) -> None:
        self.database = database
        self.announcer = announcer

    async def append(
        self,
        run_id: str,
        count: int = 1,
        *,
        event_type: EventType = EventType.STEP_CREATED,
        payload: dict[str, Any] | None = None,
        publish: bool = True,
    ) -> int:
        """Append events in one transaction and publish them after the commit, unless they are to get lost."""
        payload = payload or {}
        async with self.database.begin() as connection:
            parameters = {"run_id": run_id, "count": count, "event_type": event_type, "payload": json.dumps(payload)}
            row = (await connection.execute(APPEND, parameters)).one()
        last_seq: int = row.last_seq
        if publish:
            events = [
                NewEvent(uuid.UUID(run_id), seq, event_type, payload, row.correlation_id, row.workspace_id)
                for seq in range(last_seq - count + 1, last_seq + 1)
            ]
            await self.announcer.announce(events, row.created_at, due=False)
        return last_seq


@asynccontextmanager
async def open_writer(database: Database, redis_url: str) -> AsyncIterator[Writer]:
    """Return a writer with a connection of its own to Redis."""
    client = connect_redis(redis_url)
    yield Writer(database, Announcer(client, Doorbell(redis_url)))
    await client.aclose()


class _Ready(Server):
    """A server that says when it listens."""

    def __init__(self, app: Starlette) -> None:
        super().__init__(configuration(app, loop="none", port=0, log_level="error"))
        self.ready = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


@contextmanager
def serve(app: Starlette) -> Iterator[str]:
    """Serve an application in a thread and an event loop of its own; yields its URL."""
    server = _Ready(app)
    thread = threading.Thread(target=server.run, name="service")
    thread.start()
    assert server.ready.wait(30), "the service did not start"
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive(), "the service did not stop"


class Client:
    """One socket, as a client sees it."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection

    async def frame(self) -> dict[str, Any]:
        """Return the next frame; the test's own timeout bounds the wait."""
        received: dict[str, Any] = json.loads(await self.connection.recv())
        return received

    async def frames(self, count: int) -> list[dict[str, Any]]:
        """Return the next frames."""
        return [await self.frame() for _ in range(count)]

    async def answer(self, cmd: str, **fields: Any) -> dict[str, Any]:
        """Send a command and return the frame that answers it; pushes in between are dropped."""
        await self.send({"type": "cmd", "cmd": cmd, **fields})
        while (frame := await self.frame())["type"] == "push":
            pass
        return frame

    async def send(self, frame: object) -> None:
        """Send a frame as JSON."""
        await self.connection.send(json.dumps(frame))

    async def until_seq(self, seq: int) -> list[int]:
        """Return the numbers of the pushes up to one."""
        seen: list[int] = []
        while not seen or seen[-1] < seq:
            seen.append((await self.frame())["seq"])
        return seen

    async def closed(self) -> tuple[int, str]:
        """Return the close code and reason with which the service ends the socket; frames before it are dropped."""
        with suppress(ConnectionClosed):
            while True:
                await self.connection.recv()
        end = self.connection.protocol.close_rcvd
        assert end is not None, "the connection broke without a close frame"
        return end.code, end.reason


@asynccontextmanager
async def open_socket(
    url: str, path: str, token: str | None = None, *, origin: str | None = None, **options: Any
) -> AsyncIterator[Client]:
    """Open a socket; with `token`, by an Authorization header."""
    headers = {"authorization": f"Bearer {token}"} if token else {}
    if origin is not None:
        headers["origin"] = origin
    options = {"compression": None, "ping_interval": None, "proxy": None, "close_timeout": 5, **options}
    address = url.replace("http", "ws", 1) + path
    async with connect(address, additional_headers=headers, **options) as connection:
        yield Client(connection)


async def cut_subscriptions(client: redis.asyncio.Redis) -> None:
    """Cut every connection that listens to events, as a network that fails for a moment does."""
    await client.client_kill_filter(_type="pubsub")


def faults_of(seen: Sequence[int], first: int, last: int) -> list[str]:
    """Return what is wrong with the numbers that a client has seen: an empty list, or a sentence for each fault."""
    counts = Counter(seen)
    faults = [f"{seq} came {count} times" for seq, count in counts.items() if count > 1]
    faults += [f"{seq} is missing" for seq in range(first, last + 1) if seq not in counts]
    if list(seen) != sorted(seen):
        faults.append("not in order")
    return faults
