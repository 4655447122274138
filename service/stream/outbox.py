"""What waits to be sent on one socket: a queue with two bounds, so that a client that does not read costs a known sum.

Live events never wait: one that finds the outbox full is left in the database, and read there when there is room
(`tails`). Replays and answers wait for room, which holds back the one who asked and nobody else.
"""

from __future__ import annotations

import asyncio
from collections import deque

MOST_FRAMES = 1_000
"""Frames that may wait: several seconds of a busy run."""

MOST_BYTES = 1 << 20
"""Characters that may wait: with the kernel's share (`protocol.SEND_BUFFER_BYTES`) about 1.3 MB a socket."""

BATCH = 64
"""Frames handed to the writer at once; between batches other sockets have their turn."""


class Outbox:
    """Frames on their way to one socket, in order."""

    def __init__(self, most_frames: int = MOST_FRAMES, most_bytes: int = MOST_BYTES) -> None:
        self._most_frames = most_frames
        self._most_bytes = most_bytes
        self._frames: deque[str] = deque()
        self._bytes = 0
        self._filled = asyncio.Event()
        self._room = asyncio.Event()
        self._sent = asyncio.Event()  # all that was ever added was sent

    @property
    def full(self) -> bool:
        """Whether nothing more may wait."""
        return len(self._frames) >= self._most_frames or self._bytes >= self._most_bytes

    def add(self, frame: str) -> None:
        """Add a frame; who must not wait asks first whether the outbox is full."""
        self._frames.append(frame)
        self._bytes += len(frame)
        self._sent.clear()
        self._filled.set()

    async def put(self, frame: str) -> None:
        """Add a frame as soon as there is room."""
        while self.full:
            self._room.clear()
            await self._room.wait()
        self.add(frame)

    async def drained(self) -> None:
        """Return when at most half of the outbox is taken."""
        while len(self._frames) > self._most_frames // 2 or self._bytes > self._most_bytes // 2:
            self._room.clear()
            await self._room.wait()

    async def sent(self) -> None:
        """Return when everything that was added has been sent."""
        await self._sent.wait()

    def note_sent(self) -> None:
        """Note that what was taken last has been sent."""
        if not self._frames:
            self._sent.set()

    async def take(self) -> list[str]:
        """Return the next frames, at least one, at most `BATCH`."""
        while not self._frames:
            self._filled.clear()
            await self._filled.wait()
        frames = [self._frames.popleft() for _ in range(min(BATCH, len(self._frames)))]
        self._bytes -= sum(map(len, frames))
        self._room.set()
        return frames
