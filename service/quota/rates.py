"""Rates: one call to Redis takes a token of every rate that a request touches, or of none.

The arithmetic is in gcra.lua. All requests that wait in one turn of the loop share a pipeline. When Redis is away a
request is let through and counted: a limiter that is down must not take the service down with it.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import redis.asyncio
import structlog
from redis.exceptions import NoScriptError, RedisError

from service.errors import QuotaExceeded
from service.grouping import Grouping
from service.quota.limits import Limit, Rate
from service.telemetry import QUOTA_REFUSALS, RATES_UNCHECKED

log = structlog.get_logger()

MICROSECONDS = 1_000_000

Demand = tuple[uuid.UUID, tuple[tuple[Limit, Rate], ...]]
"""A workspace, and the rates of which its request needs one token each."""


class Rates:
    """Takes tokens for one process's requests."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._client = client
        self._script = (Path(__file__).parent / "gcra.lua").read_text()
        self._digest = hashlib.sha1(self._script.encode(), usedforsecurity=False).hexdigest()
        self._grouping: Grouping[Demand, dict[str, str]] = Grouping(self._take, lanes=4)

    async def warm(self) -> None:
        """Bring the script to Redis and open a connection before the first request."""
        await self._client.script_load(self._script)

    async def take(self, workspace_id: uuid.UUID, rates: dict[Limit, Rate], *limits: Limit) -> dict[str, str]:
        """Take one token of each limit that has a rate; returns the RateLimit fields of the answer.

        Raises QuotaExceeded when one of them has none left; then nothing was taken.
        """
        wanted = tuple((limit, rates[limit]) for limit in limits if limit in rates)
        return await self._grouping.submit((workspace_id, wanted)) if wanted else {}

    async def _take(self, demands: Sequence[Demand]) -> Sequence[dict[str, str] | Exception]:
        try:
            answers = await self._ask(demands)
            if any(isinstance(answer, NoScriptError) for answer in answers):  # a new or emptied Redis took nothing
                await self._client.script_load(self._script)
                answers = await self._ask(demands)
        except (RedisError, OSError) as fault:
            RATES_UNCHECKED.inc(len(demands))
            log.warning("rates not checked", fault=str(fault), requests=len(demands))
            return [{} for _ in demands]
        return [_outcome(wanted, answer) for (_, wanted), answer in zip(demands, answers, strict=True)]

    async def _ask(self, demands: Sequence[Demand]) -> list[Any]:
        """Run the script for each demand in one round trip; a missing script is an answer, not an exception."""
        async with self._client.pipeline(transaction=False) as pipe:
            for workspace_id, wanted in demands:
                keys = [bucket(workspace_id, limit) for limit, _ in wanted]
                pipe.evalsha(
                    self._digest,
                    len(keys),
                    *keys,
                    *(n for _, rate in wanted for n in (int(rate.per_s * 1000), rate.burst)),
                )
            answers = await pipe.execute(raise_on_error=False)
        for answer in answers:
            if isinstance(answer, RedisError) and not isinstance(answer, NoScriptError):
                raise answer
        return answers


def bucket(workspace_id: uuid.UUID, limit: Limit) -> str:
    """Return the key of a bucket; the braces keep one workspace's buckets on one node of a Redis Cluster."""
    return f"plimsoll:rate:{{{workspace_id}}}:{limit}"


def _outcome(wanted: tuple[tuple[Limit, Rate], ...], answer: list[list[int]]) -> dict[str, str] | QuotaExceeded:
    """Turn the script's answer into the RateLimit fields, or into the refusal.

    Source: draft-ietf-httpapi-ratelimit-headers: whole numbers and whole seconds only, so a window is written as the
    burst and the time in which it fills again.
    """
    policies, states = [], []
    for (limit, rate), (left, wait_us, _) in zip(wanted, answer, strict=True):
        window_s = -(-rate.burst // rate.per_s)
        policies.append(f'"{limit}";q={rate.burst};w={window_s}')
        states.append(f'"{limit}";r={left};t={-(-wait_us // MICROSECONDS)}')
    fields = {"ratelimit-policy": ", ".join(policies), "ratelimit": ", ".join(states)}
    for (limit, rate), (_, wait_us, refused) in zip(wanted, answer, strict=True):
        if refused:
            QUOTA_REFUSALS.labels(limit).inc()
            wait_s = max(1, -(-wait_us // MICROSECONDS))
            return QuotaExceeded(
                limit,
                f"({float(rate.per_s):g} per second, bursts of {rate.burst}); try again in {wait_s} s",
                wait_s,
                fields,
            )
    return fields
