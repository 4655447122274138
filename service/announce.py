"""What happens after a commit: its events are published and the workers rung, in one round trip to Redis.

Never before the commit, and never as part of it: Redis may refuse all of this and nothing is lost, because followers
read the database and the sweeper finds what is due. Refusals are counted, not raised, and so is a bug of ours: an error
raised here would look like one of the transaction, and what was committed would be written a second time.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import Sequence

import redis.asyncio
import structlog
from redis.asyncio.client import Pipeline
from redis.exceptions import RedisError

from service.doorbell import Doorbell
from service.events import NewEvent, messages
from service.guarded import Away, Guarded
from service.tallies import KEY, Tallies
from service.telemetry import ANNOUNCEMENTS_LOST, PUBLISH_LAG_SECONDS

log = structlog.get_logger()

RING_EVERY_S = 0.005
"""Rings closer together than this are one ring: a worker that is awake drains everything due anyway."""

MOST_RINGS = 64
"""Rings that may lie in the list. Each says the same, and without a worker nobody takes them out."""


class Announcer:
    """Publishes events and rings the workers for one process."""

    def __init__(self, client: redis.asyncio.Redis, doorbell: Doorbell) -> None:
        self._client = client
        self._queue, self._ring = doorbell.message()
        self._rung_at = float("-inf")
        self._late_ring: asyncio.Task[None] | None = None

    def is_unheard(self) -> bool:
        """Tell whether nobody can be rung at present, because Redis is away."""
        return isinstance(self._client, Guarded) and self._client.guard.is_away()

    async def announce(
        self, events: Sequence[NewEvent], created_at: dt.datetime, *, due: bool, tallies: Tallies | None = None
    ) -> None:
        """Publish what a commit at `created_at` appended and, when it made a run due, ring. Never raises.

        A worker's `tallies` are added in the same round trip.
        """
        committed = time.perf_counter()
        ring = due and self._may_ring_now()
        amounts = tallies.take() if tallies is not None else {}
        try:
            async with self._client.pipeline(transaction=False) as pipe:
                for channel, body in messages(events, created_at):
                    pipe.publish(channel, body)
                if ring:
                    self._add_ring(pipe)
                for field, amount in amounts.items():
                    pipe.hincrbyfloat(KEY, field, amount)
                await pipe.execute()
            if events:
                PUBLISH_LAG_SECONDS.observe(time.perf_counter() - committed)
        except Exception as fault:
            if tallies is not None:
                tallies.put_back(amounts)
            _count_lost("announcement lost; the sweeper will find what is due", fault)

    def _may_ring_now(self) -> bool:
        """Tell whether to ring at once; otherwise make sure that one ring follows at the end of the pause."""
        loop = asyncio.get_running_loop()
        wait_s = self._rung_at + RING_EVERY_S - loop.time()
        if wait_s <= 0:
            self._rung_at = loop.time()
            return True
        if self._late_ring is None or self._late_ring.done():
            self._late_ring = loop.create_task(self._ring_after(wait_s))
        return False

    async def _ring_after(self, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        self._rung_at = asyncio.get_running_loop().time()
        try:
            async with self._client.pipeline(transaction=False) as pipe:
                self._add_ring(pipe)
                await pipe.execute()
        except Exception as fault:
            _count_lost("ring lost; the sweeper will find what is due", fault)

    def _add_ring(self, pipe: Pipeline) -> None:
        """Ring, and drop the oldest of too many rings that nobody heard."""
        pipe.lpush(self._queue, self._ring)
        pipe.ltrim(self._queue, 0, MOST_RINGS - 1)


def _count_lost(message: str, fault: Exception) -> None:
    """Count what Redis did not take: its own refusal in one line, anything else, which is a bug, with its traceback.

    That Redis is away was logged when it went.
    """
    ANNOUNCEMENTS_LOST.inc()
    if isinstance(fault, Away):
        return
    if isinstance(fault, (RedisError, OSError)):
        log.warning(message, fault=str(fault))
    else:
        log.error(message, exc_info=fault)
