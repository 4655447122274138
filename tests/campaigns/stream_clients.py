"""Clients of the streams' campaign: they check what they see, and time it."""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from tests.sockets import faults_of

DICE = random.Random(20_260_101)  # noqa: S311 - the same campaign every time


@dataclass
class Follower:
    """Follows one run, and reconnects with its last `seq` whenever its connection ends."""

    url: str
    token: str
    run_id: str
    seen: list[int] = field(default_factory=list)
    delays_ms: list[float] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    """How its connections ended: by close code."""
    _connection: ClientConnection | None = None

    async def follow(self) -> None:
        """Follow until cancelled."""
        while True:
            last = self.seen[-1] if self.seen else 0
            async with dial(self.url, f"/ws/runs/{self.run_id}/?since_seq={last}", self.token) as connection:
                self._connection = connection
                with suppress(ConnectionClosed):
                    while True:
                        frame = json.loads(await connection.recv())
                        self.seen.append(frame["seq"])
                        self.delays_ms.append(delay_ms(frame))
            told = connection.protocol.close_rcvd
            self.ends["cut" if told is None else str(told.code)] += 1

    def break_off(self) -> bool:
        """Cut the connection, with or without a goodbye; False when there is none at this moment."""
        connection, self._connection = self._connection, None
        if connection is None:
            return False
        if DICE.random() < 0.5:
            connection.transport.abort()
        else:
            connection.transport.write_eof()
        return True

    def faults(self, last_seq: dict[str, int]) -> list[str]:
        """Return what is missing, doubled or out of order."""
        return [f"run {self.run_id}: {fault}" for fault in faults_of(self.seen, 1, last_seq[self.run_id])]


@dataclass
class Watcher:
    """Follows one workspace."""

    url: str
    token: str
    workspace_id: uuid.UUID
    listed: dict[str, int] = field(default_factory=dict)
    seen: dict[str, list[int]] = field(default_factory=dict)
    delays_ms: list[float] = field(default_factory=list)

    async def follow(self) -> None:
        """Follow until cancelled."""
        async with dial(self.url, f"/ws/workspaces/{self.workspace_id}/", self.token) as connection:
            async for text in connection:
                frame = json.loads(text)
                if frame["event"] == "run_listed":
                    self.listed[frame["run_id"]] = frame["seq"]
                elif frame["run_id"] is not None:
                    self.seen.setdefault(frame["run_id"], []).append(frame["seq"])
                    self.delays_ms.append(delay_ms(frame))

    def faults(self, last_seq: dict[str, int]) -> list[str]:
        """Return what is missing, doubled or out of order, run by run."""
        return [
            f"workspace {self.workspace_id}: {fault}"
            for run_id, listed in self.listed.items()
            for fault in faults_of(self.seen.get(run_id, []), listed + 1, last_seq[run_id])
        ]


@dataclass
class Stalled:
    """Follows one run and stops reading at once."""

    url: str
    token: str
    run_id: str
    last_seq: int
    code: int | None = None
    """The close code that it found when it read on, after its eviction."""

    async def stall_until(self, evicted: asyncio.Event) -> None:
        """Stall until told, then read to the end."""
        async with dial(self.url, f"/ws/runs/{self.run_id}/?since_seq={self.last_seq}", self.token) as connection:
            connection.transport.pause_reading()
            await evicted.wait()
            connection.transport.resume_reading()
            with suppress(ConnectionClosed):
                while True:
                    await connection.recv()
            told = connection.protocol.close_rcvd
            self.code = told.code if told is not None else None


def dial(url: str, path: str, token: str) -> Any:
    """Return a connection to be opened with `async with`."""
    return connect(
        url.replace("http", "ws", 1) + path,
        additional_headers={"authorization": f"Bearer {token}"},
        compression=None, proxy=None, ping_interval=None, close_timeout=1, open_timeout=30,
    )  # fmt: skip


def delay_ms(frame: dict[str, Any]) -> float:
    """Return how old an event is when the client has it, since the instant that its transaction gave it."""
    return (time.time() - datetime.fromisoformat(frame["ts"]).timestamp()) * 1e3
