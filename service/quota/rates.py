"""Rates: one call to Redis takes a token of every rate that a request touches, or of none.

The arithmetic is in gcra.lua. All requests that wait in one turn of the loop share a pipeline. While Redis is away, or
answers with an error of its own, each process goes on with buckets of its own (`local`) and counts that it did: a
limiter that is down must not take the service down with it. What is promised, and to whom: docs/rates.md.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import redis.asyncio
import structlog
from redis.exceptions import NoScriptError, RedisError

from service.errors import QuotaExceeded
from service.grouping import Grouping
from service.guarded import Away
from service.quota.limits import Limit, Rate
from service.quota.local import LocalBuckets, State
from service.quota.refusals import count_refusal
from service.telemetry import RATES_LOCAL

log = structlog.get_logger()

MICROSECONDS = 1_000_000

SLACK_US, SLACK_PARTS = 1_000, 1_000
"""What is added to a wait before it is told, microseconds and the share 1/SLACK_PARTS: the caller waits by a clock of
its own, and Linux lets each of the two clocks be slewed by 500 parts in a million (adjtimex(2), ADJ_FREQUENCY)."""

MOST_TERMS = 10_000
"""Rates whose terms a process remembers."""


class Terms(NamedTuple):
    """A rate in the forms in which it is sent and told."""

    rate: Rate
    thousandths: int  # tokens in a thousand seconds
    policy: str  # parameters of RateLimit-Policy


Wanted = tuple[tuple[Limit, Terms], ...]

Demand = tuple[uuid.UUID, Wanted]
"""A workspace, and the rates of which its request needs one token each."""


class Rates:
    """Takes tokens for one process's requests."""

    def __init__(self, client: redis.asyncio.Redis, local: LocalBuckets | None = None) -> None:
        self._client = client
        self._local = local or LocalBuckets()
        self._script = (Path(__file__).parent / "gcra.lua").read_text()
        self._digest = hashlib.sha1(self._script.encode(), usedforsecurity=False).hexdigest()
        self._grouping: Grouping[Demand, dict[str, str]] = Grouping(self._take, lanes=4)
        self._terms: dict[int, Terms] = {}

    async def warm(self) -> None:
        """Bring the script to Redis and open a connection before the first request."""
        await self._client.script_load(self._script)

    async def take(self, workspace_id: uuid.UUID, rates: dict[Limit, Rate], *limits: Limit) -> dict[str, str]:
        """Take one token of each limit that has a rate; returns the RateLimit fields of the answer.

        Raises QuotaExceeded when one of them has none left; then nothing was taken.
        """
        wanted = tuple((limit, self._terms_of(rates[limit])) for limit in limits if limit in rates)
        return await self._grouping.submit((workspace_id, wanted)) if wanted else {}

    def _terms_of(self, rate: Rate) -> Terms:
        """Return a rate's terms. They are found by identity: hashing a fraction costs more than all else here."""
        known = self._terms.get(id(rate))
        if known is not None and known.rate is rate:
            return known
        if len(self._terms) >= MOST_TERMS:
            self._terms.clear()
        # Whole seconds only, so the window is the time in which a burst fills again.
        policy = f"q={rate.burst};w={-(-rate.burst // rate.per_s)}"
        terms = self._terms[id(rate)] = Terms(rate, rate.thousandths, policy)
        return terms

    async def _take(self, demands: Sequence[Demand]) -> Sequence[dict[str, str] | Exception]:
        try:
            answers = await self._ask(demands)
            if any(isinstance(answer, NoScriptError) for answer in answers):  # a new or emptied Redis took nothing
                await self._client.script_load(self._script)
                answers = await self._ask(demands)
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
        except (RedisError, OSError) as fault:
            if not isinstance(fault, Away):  # which was logged when it went
                log.warning("rates are checked here", fault=str(fault), requests=len(demands))
            return [self._take_here(workspace_id, wanted) for workspace_id, wanted in demands]
        return [
            _outcome(workspace_id, wanted, each) for (workspace_id, wanted), each in zip(demands, answers, strict=True)
        ]

    async def _ask(self, demands: Sequence[Demand]) -> list[Any]:
        """Run the script for each demand in one round trip; an error of one demand is its answer."""
        async with self._client.pipeline(transaction=False) as pipe:
            for workspace_id, wanted in demands:
                keys = [bucket(workspace_id, limit) for limit, _ in wanted]
                terms = [n for _, each in wanted for n in (each.thousandths, each.rate.burst)]
                pipe.evalsha(self._digest, len(keys), *keys, *terms)
            answers: list[Any] = await pipe.execute(raise_on_error=False)
        return answers

    def _take_here(self, workspace_id: uuid.UUID, wanted: Wanted) -> dict[str, str] | QuotaExceeded:
        """Take tokens of this process's own buckets."""
        states = self._local.take(workspace_id, [(limit, terms.rate) for limit, terms in wanted])
        outcome = _outcome(workspace_id, wanted, states)
        RATES_LOCAL.labels("refused" if isinstance(outcome, QuotaExceeded) else "admitted").inc()
        return outcome


def bucket(workspace_id: uuid.UUID, limit: Limit) -> str:
    """Return the key of a bucket; the braces keep one workspace's buckets on one node of a Redis Cluster."""
    return f"plimsoll:rate:{{{workspace_id}}}:{limit}"


def _outcome(
    workspace_id: uuid.UUID, wanted: Wanted, states: Sequence[State | list[int]]
) -> dict[str, str] | QuotaExceeded:
    """Turn what the buckets say into the RateLimit fields, or into the refusal.

    Source: draft-ietf-httpapi-ratelimit-headers-11: whole numbers, whole seconds, names as strings; Retry-After is not
    earlier than the end of any window that is told.
    """
    policies, told, refused = [], [], []
    for (limit, terms), (left, wait_us, refuses) in zip(wanted, states, strict=True):
        policies.append(f'"{limit}";{terms.policy}')
        told.append(f'"{limit}";r={left};t={whole_seconds(wait_us)}')
        if refuses:
            refused.append((limit, terms.rate, wait_us))
    fields = {"ratelimit-policy": ", ".join(policies), "ratelimit": ", ".join(told)}
    if not refused:
        return fields
    for limit, _, _ in refused:
        count_refusal(limit, workspace_id)
    limit, rate, _ = refused[0]
    wait_s = max(whole_seconds(wait_us) for _, _, wait_us in refused)
    return QuotaExceeded(
        limit,
        f"({float(rate.per_s):g} per second, bursts of {rate.burst}); try again in {wait_s} s",
        wait_s,
        fields,
        violated=[each for each, _, _ in refused],
    )


def whole_seconds(wait_us: int) -> int:
    """Return a wait in whole seconds, rounded up, that suffices by the clock of whoever waits; 0 for none."""
    return -(-(wait_us + SLACK_US + wait_us // SLACK_PARTS) // MICROSECONDS) if wait_us > 0 else 0
