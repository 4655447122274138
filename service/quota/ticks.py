"""The tick rate: takes tokens for the turns of a batch, and says to those that find none when to come again.

A turn is not refused but delayed. So a bucket has two levels: what was spent, which keeps the rate to the letter, and
the line: that and what was promised to turns that wait. The arithmetic is in ticks.lua; while Redis is away each
process goes on with buckets of its own, as for the other rates (`local`, docs/decisions/0005-redis-away.md). What is
promised: docs/rates.md. Who asks, and what a delay does to a run: `backstop`.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import redis.asyncio
import structlog
from redis.exceptions import NoScriptError, RedisError

from service.guarded import Away
from service.quota.limits import Limit, Rate
from service.quota.local import MOST_BUCKETS
from service.quota.local import TOKEN as LOCAL_TOKEN
from service.quota.rates import bucket

log = structlog.get_logger()

SCRIPT = (Path(__file__).parent / "ticks.lua").read_text()
DIGEST = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()

TOKEN = 10**9
"""One token in ticks.lua, units: a rate of r thousandths drains r of them in a microsecond."""


class Asked(NamedTuple):
    """The turns of one workspace in one batch."""

    workspace_id: uuid.UUID
    rate: Rate
    returned: int  # were delayed, and come at the time that they were told
    fresh: int  # come for the first time


class Verdict(NamedTuple):
    """How many of the turns may be taken now, and when the others come again."""

    returned: int
    fresh: int
    early: int  # by how much the first one that is delayed is too early, units
    short: int  # by how much one that waited is too early and keeps its place, units; below 0: there is no such one
    token: int  # units by which each further one is more so
    drain: int  # units a microsecond

    def wait_us(self, place: int) -> int:
        """Return for how long a turn is delayed, by its place among those that are, from 0; rounded up."""
        if self.short >= 0:
            place -= 1
        return -(-(self.short if place < 0 else self.early + place * self.token) // self.drain)


class TickRates:
    """Takes tokens for one worker's turns."""

    def __init__(self, client: redis.asyncio.Redis, local: LocalLines | None = None) -> None:
        self._client = client
        self._local = local or LocalLines()

    async def take(self, asked: Sequence[Asked]) -> tuple[list[Verdict], bool]:
        """Take a token for as many turns as there are tokens, in one round trip; and say whether Redis was away."""
        try:
            answers = await self._ask(asked)
        except (RedisError, OSError) as fault:
            if not isinstance(fault, Away):  # which was logged when it went
                log.warning("tick rates are checked here", fault=str(fault), workspaces=len(asked))
            return [self._local.take(each) for each in asked], True
        return [
            Verdict(int(back), int(first), int(early), int(short), TOKEN, each.rate.thousandths)
            for each, (back, first, _, early, short) in zip(asked, answers, strict=True)
        ], False

    async def forget_lines(self, workspace_ids: Collection[uuid.UUID]) -> None:
        """Forget what was promised to turns that wait, in one round trip: all of them are told to come now."""
        for workspace_id in workspace_ids:
            self._local.forget_line(workspace_id)
        try:
            async with self._client.pipeline(transaction=False) as pipe:
                for workspace_id in workspace_ids:
                    pipe.hdel(bucket(workspace_id, Limit.TICK), "line")
                await pipe.execute()
        except (RedisError, OSError) as fault:
            log.info("lines were not forgotten; their turns come a little late", fault=str(fault))

    async def promised(self, workspace_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, int]:
        """Return how many turns of each were told a time that has not come yet, in one round trip; of none while Redis
        is away.
        """
        if not workspace_ids:
            return {}
        try:
            async with self._client.pipeline(transaction=False) as pipe:
                pipe.time()
                for workspace_id in workspace_ids:
                    pipe.hmget(bucket(workspace_id, Limit.TICK), "level", "at", "rate", "line")
                (seconds, micros), *lines = await pipe.execute()
        except (RedisError, OSError):
            return {}
        now_us = seconds * 10**6 + micros
        return {
            each: _places(now_us, *map(int, kept))
            for each, kept in zip(workspace_ids, lines, strict=True)
            if None not in kept
        }

    async def _ask(self, asked: Sequence[Asked]) -> list[Any]:
        answers = await self._send(asked)
        if any(isinstance(answer, NoScriptError) for answer in answers):  # a new or emptied Redis took nothing
            await self._client.script_load(SCRIPT)
            answers = await self._send(asked)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    async def _send(self, asked: Sequence[Asked]) -> list[Any]:
        async with self._client.pipeline(transaction=False) as pipe:
            for each in asked:
                terms = (each.rate.thousandths, each.rate.burst, each.returned, each.fresh)
                pipe.evalsha(DIGEST, 1, bucket(each.workspace_id, Limit.TICK), *terms)
            answers: list[Any] = await pipe.execute(raise_on_error=False)
        return answers


def _places(now_us: int, level: int, at_us: int, rate: int, line: int) -> int:
    """Return how many places of a line lie ahead at an instant."""
    drained = max(0, now_us - at_us) * rate
    return max(0, line - drained - max(0, level - drained)) // TOKEN


class _Line(NamedTuple):
    level: int  # spent and not drained yet, units
    line: int  # that, and what was promised
    at_us: int  # when that was so
    drain: int  # units a microsecond


class LocalLines:
    """One process's buckets, by the arithmetic of ticks.lua; of too many, the one used longest ago goes."""

    def __init__(
        self,
        percent: int = 100,
        most: int = MOST_BUCKETS,
        monotonic_us: Callable[[], int] = lambda: time.monotonic_ns() // 1000,
    ) -> None:
        self._percent = percent
        self._most = most
        self._monotonic_us = monotonic_us
        self._kept: OrderedDict[uuid.UUID, _Line] = OrderedDict()

    def take(self, asked: Asked) -> Verdict:
        """Take a token for as many turns as there are tokens, and queue the rest."""
        now_us, drain = self._monotonic_us(), asked.rate.thousandths * self._percent
        burst = asked.rate.burst * LOCAL_TOKEN
        kept = self._kept.get(asked.workspace_id, _Line(0, 0, now_us, drain))
        drained = (now_us - kept.at_us) * max(drain, kept.drain)
        level = min(burst, max(0, kept.level - drained))
        line = max(level, kept.line - drained) if drain == kept.drain else level
        back = min(asked.returned, (burst - level) // LOCAL_TOKEN)
        level += back * LOCAL_TOKEN
        line = max(line, level)
        short, queued = level + LOCAL_TOKEN - burst, asked.returned - back
        if queued and 2 * short < LOCAL_TOKEN:
            queued -= 1
        else:
            short = -1
        first = min(asked.fresh, max(0, burst - line) // LOCAL_TOKEN)
        level += first * LOCAL_TOKEN
        line += first * LOCAL_TOKEN
        early = max(0, line + LOCAL_TOKEN - burst)
        line += (queued + asked.fresh - first) * LOCAL_TOKEN
        self._kept[asked.workspace_id] = _Line(level, line, now_us, drain)
        self._kept.move_to_end(asked.workspace_id)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return Verdict(back, first, early, short, LOCAL_TOKEN, drain)

    def forget_line(self, workspace_id: uuid.UUID) -> None:
        """Forget what was promised."""
        kept = self._kept.get(workspace_id)
        if kept is not None:
            self._kept[workspace_id] = kept._replace(line=kept.level)
