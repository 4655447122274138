"""A small HTTP server on a real socket that answers as a test tells it, wrongly where that is the point."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
import socket
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Generic, TypeVar

TIMING = "auth;dur=0.5, quota;dur=1.5, db;dur=2.5, publish;dur=3.5, app;dur=9"


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request as it came in."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int  # from 1, in the order of their coming

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Answer = Callable[[Asked, asyncio.StreamWriter], Awaitable[None]]


def http(status: int, body: object, *headers: str) -> bytes:
    """A complete answer with a length."""
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(payload)}", f"Server-Timing: {TIMING}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + payload


def always(*pieces: bytes) -> Answer:
    """Answer every request with the same bytes, piece by piece."""

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()

    return answer


def reset(writer: asyncio.StreamWriter) -> None:
    """End the connection with a TCP reset."""
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextlib.asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[str]:
    """Serve on a free port of this machine; yields the URL."""
    connections = 0
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        number = connections
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, path, _ = head[0].split(" ")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:-2])}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                await answer(Asked(method, path, headers, body, number), writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client went away, or the test is over
        finally:
            writer.close()
            tasks.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


CREATED_AT = "2026-01-01T00:00:00Z"
ENDED_AT = "2026-01-01T00:00:00.250000Z"


class ModelService:
    """Behaves like the real service as far as the harness can see. Runs end at their `polls_to_end`-th poll."""

    def __init__(self, polls_to_end: int = 2) -> None:
        self.polls_to_end = polls_to_end
        self.asked: list[Asked] = []
        self.overrides: dict[str, bytes] = {}  # "POST /api/runs/" or a pattern of it: answer instead
        self.expected: dict[str, int] = {}
        self.children: dict[str, list[str]] = {}
        self.polls: dict[str, int] = {}
        self.canceled: list[str] = []
        self.live = 0
        self.live_max = 0
        self.on_poll: Callable[[str], None] = lambda run_id: None

    async def __call__(self, asked: Asked, writer: asyncio.StreamWriter) -> None:
        self.asked.append(asked)
        line = f"{asked.method} {asked.path}"
        for pattern, reply in self.overrides.items():
            if re.fullmatch(pattern, line):
                writer.write(reply)
                return
        writer.write(self._reply(asked))

    def _reply(self, asked: Asked) -> bytes:
        parts = asked.path.split("?")[0].strip("/").split("/")
        match asked.method, parts:
            case "GET", ["metrics"]:
                return http(200, b"plimsoll_queue_depth 3\nplimsoll_ticks_total 7\n")
            case "POST", ["api", "workspaces"]:
                return http(200, {"workspace_id": f"w{len(self.asked)}", "name": asked.json["name"]})
            case "POST", ["api", "workspaces", workspace, "agents"]:
                return http(200, {"agent_id": f"{workspace}-agent"})
            case "POST", ["api", "workspaces", workspace, "tokens"]:
                return http(200, {"token": f"token-of-{workspace}", "role": asked.json["role"]})
            case "POST", ["api", "runs"]:
                return self._create(asked.json)
            case "POST", ["api", "runs", run_id, "spawn_subrun"]:
                self.children[run_id].append(f"{run_id}.c{len(self.children[run_id]) + 1}")
                return http(200, {"child_run_id": self.children[run_id][-1], "status": "PENDING"})
            case "GET", ["api", "runs", run_id, "snapshot"]:
                return self._snapshot(run_id)
            case "POST", ["api", "runs", run_id, "cancel"]:
                self.canceled.append(run_id)
                return http(200, {"run_id": run_id, "status": "CANCELED"})
            case _:
                return http(404, {"error": "no such thing"})

    def _create(self, body: dict[str, Any]) -> bytes:
        run_id = f"r{len(self.children) + 1}"
        self.children[run_id] = []
        self.expected[run_id] = body.get("expected_subruns", 0)
        self.live += 1
        self.live_max = max(self.live_max, self.live)
        return http(200, {"run_id": run_id, "status": "PENDING"})

    def _snapshot(self, run_id: str) -> bytes:
        self.polls[run_id] = self.polls.get(run_id, 0) + 1
        self.on_poll(run_id)
        ended = self.polls[run_id] >= self.polls_to_end and len(self.children[run_id]) == self.expected[run_id]
        self.live -= ended
        status = "COMPLETED" if ended else "RUNNING"
        times = {"created_at": CREATED_AT, "ended_at": ENDED_AT if ended else None}
        run = {"run_id": run_id, "status": status, "ticks": 2, "step_count": 2, "last_seq": 5, **times}
        children = [{"run_id": child, "status": status, **times} for child in self.children[run_id]]
        return http(200, {"run": run, "steps": [], "events_since_seq": [], "child_runs": children, "last_seq": 5})


Model = TypeVar("Model", bound=ModelService)


class RunningModel(Generic[Model]):
    """A model of the service in a thread, because a command has an event loop of its own."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.url = ""
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    async def _serve(self) -> None:
        async with serving(self.model) as self.url:
            self._ready.set()
            await self._over.wait()

    def start(self) -> None:
        self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()
        self._loop.close()
