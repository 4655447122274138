"""The gate that a request passes: tokens of the active revision's rates, and the shadow's opinion of it.

The shadow has buckets of its own, asked with the same script as the active ones after the request has its decision:
nobody waits for it, and it refuses nobody. `shadow` counts what it says.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import redis.asyncio
import structlog
from redis.exceptions import NoScriptError, RedisError

from service.errors import QuotaExceeded
from service.grouping import Grouping
from service.quota.limits import Limit, Quota, Rate
from service.quota.rates import Rates
from service.quota.recalibration_counts import RequestTally
from service.quota.shadow import Observation, ShadowTally
from service.telemetry import SHADOW_UNCHECKED

log = structlog.get_logger()

MOST_WAITING = 10_000
"""Requests whose evaluation may wait; when Redis is slower than that, more are left out and counted as such."""


class _Asked(NamedTuple):
    """One request and one rate of the shadow."""

    workspace_id: uuid.UUID
    revision: int
    limit: Limit
    rate: Rate
    admitted: bool  # by the active revision


class Gate:
    """Takes tokens of the active revision's rates, and has the shadow's opinion counted."""

    def __init__(
        self, rates: Rates, client: redis.asyncio.Redis, tally: ShadowTally, requests: RequestTally | None = None
    ) -> None:
        self._rates = rates
        self._client = client
        self._tally = tally
        self._requests = requests
        self._script = (Path(__file__).parent / "gcra.lua").read_text()
        self._digest = hashlib.sha1(self._script.encode(), usedforsecurity=False).hexdigest()
        self._grouping: Grouping[_Asked, None] = Grouping(self._evaluate)
        self._waiting = 0

    async def take(self, workspace_id: uuid.UUID, quota: Quota, *limits: Limit) -> dict[str, str]:
        """Take one token of each limit that has a rate; returns the RateLimit fields of the answer.

        Raises QuotaExceeded when one of them has none left; then nothing was taken.
        """
        if quota.shadow is None:
            return await self._take(workspace_id, quota, *limits)
        try:
            fields = await self._take(workspace_id, quota, *limits)
        except QuotaExceeded:
            self.observe(workspace_id, quota.shadow, limits, admitted=False)
            raise
        self.observe(workspace_id, quota.shadow, limits, admitted=True)
        return fields

    async def _take(self, workspace_id: uuid.UUID, quota: Quota, *limits: Limit) -> dict[str, str]:
        """Take the tokens, and have it counted what became of the request."""
        if self._requests is None:
            return await self._rates.take(workspace_id, quota.rates, *limits)
        try:
            fields = await self._rates.take(workspace_id, quota.rates, *limits)
        except QuotaExceeded as refusal:
            self._requests.count(quota, limits, refused=refusal.extensions["violated-policies"])
            raise
        self._requests.count(quota, limits)
        return fields

    async def drain(self) -> None:
        """Return when every observation so far was evaluated."""
        await self._grouping.drain()

    def observe(self, workspace_id: uuid.UUID, shadow: Quota, limits: Sequence[Limit], *, admitted: bool) -> None:
        """Have the shadow asked about one request, and what the active revision said; nobody waits for it."""
        for limit in limits:
            rate = shadow.rates.get(limit)
            if rate is None or shadow.revision is None:
                continue
            if self._waiting >= MOST_WAITING:
                SHADOW_UNCHECKED.inc()
                continue
            self._waiting += 1
            self._grouping.submit(_Asked(workspace_id, shadow.revision, limit, rate, admitted))

    async def _evaluate(self, asked: Sequence[_Asked]) -> Sequence[None]:
        """Ask the shadow's buckets, in one round trip; raises nothing, as nobody waits."""
        try:
            answers = await self._ask(asked)
            if any(isinstance(answer, NoScriptError) for answer in answers):
                await self._client.script_load(self._script)
                answers = await self._ask(asked)
        except (RedisError, OSError) as fault:
            log.info("the shadow revision was not asked", fault=str(fault), requests=len(asked))
            answers = [fault] * len(asked)
        finally:
            self._waiting -= len(asked)
        heard = [(each, said) for each, said in zip(asked, answers, strict=True) if isinstance(said, list)]
        SHADOW_UNCHECKED.inc(len(asked) - len(heard))
        self._tally.count(
            Observation(each.revision, each.limit, bool(said[0][2]), bool(said[0][2]) and each.admitted)
            for each, said in heard
        )
        return [None] * len(asked)

    async def _ask(self, asked: Sequence[_Asked]) -> list[object]:
        async with self._client.pipeline(transaction=False) as pipe:
            for each in asked:
                key = shadow_bucket(each.workspace_id, each.revision, each.limit)
                pipe.evalsha(self._digest, 1, key, each.rate.thousandths, each.rate.burst)
            answers: list[object] = await pipe.execute(raise_on_error=False)
        return answers


def shadow_bucket(workspace_id: uuid.UUID, revision: int, limit: Limit) -> str:
    """Return the key of a bucket in which only a shadow counts."""
    return f"plimsoll:shadow:{{{workspace_id}}}:{revision}:{limit}"
