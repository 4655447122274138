"""The shadow revision: what it would refuse, counted beside the active one, while nobody is refused by it.

`observe` evaluates rates in buckets of the shadow's own, by the same script as the active ones, after the request has
its answer: nobody waits for it. Caps are compared with the counts that were taken for the active one's sake
(`caps.Held`). Every process adds what it counted to one row for each limit, at most twice a second and only while there
is a shadow, so that `quotas history` and a recalibration read the sum of all processes.

Where the active revision refuses less than the shadow, a workspace holds more than the shadow would have let it; so for
a lowered cap every request above it is counted, and the figures err on the side of too many.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import redis.asyncio
import structlog
from redis.exceptions import NoScriptError, RedisError
from sqlalchemy import BigInteger, ForeignKey, select, text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import Mapped, mapped_column

from service.db import Base, Database, rows
from service.errors import QuotaExceeded
from service.grouping import Grouping
from service.quota.limits import Limit, Quota, Rate
from service.quota.rates import Rates
from service.runs import Instant
from service.telemetry import SHADOW_UNCHECKED

log = structlog.get_logger()

ADD_EVERY_S = 0.5
"""How long a process gathers counts before it adds them to the database's, seconds."""

MOST_WAITING = 10_000
"""Requests whose evaluation may wait; when Redis is slower than that, more are left out and counted as such."""


class QuotaShadowCount(Base, kw_only=True):
    """What one limit of a revision would have done while it was the shadow: the sum of all processes."""

    __tablename__ = "quota_shadow_counts"

    revision: Mapped[int] = mapped_column(ForeignKey("quota_revisions.revision"), primary_key=True)
    limit_name: Mapped[str] = mapped_column(primary_key=True)
    """A Limit."""
    asked: Mapped[int] = mapped_column(BigInteger)
    """Requests that touched the limit."""
    refused: Mapped[int] = mapped_column(BigInteger)
    """Those that it would have refused."""
    newly_refused: Mapped[int] = mapped_column(BigInteger)
    """Those of them that the active revision admitted."""
    first_at: Mapped[dt.datetime] = mapped_column(Instant)
    last_at: Mapped[dt.datetime] = mapped_column(Instant)


class Observation(NamedTuple):
    """One request, and what the shadow's limit would have said to it."""

    revision: int
    limit: Limit
    refused: bool
    newly: bool  # refused, where the active revision admitted


class ShadowCount(NamedTuple):
    """A limit's sums; QuotaShadowCount explains each."""

    limit: Limit
    asked: int
    refused: int
    newly_refused: int
    first_at: dt.datetime
    last_at: dt.datetime


ADD = text("""
    INSERT INTO quota_shadow_counts AS c (revision, limit_name, asked, refused, newly_refused, first_at, last_at)
    SELECT revision, limit_name, asked, refused, newly_refused, now(), now()
    FROM json_to_recordset(CAST(:counts AS json))
        AS n(revision int, limit_name text, asked bigint, refused bigint, newly_refused bigint)
    ORDER BY revision, limit_name
    ON CONFLICT (revision, limit_name) DO UPDATE SET
        asked = c.asked + excluded.asked, refused = c.refused + excluded.refused,
        newly_refused = c.newly_refused + excluded.newly_refused, last_at = excluded.last_at
""")
"""In order, so that two processes never wait for each other in a circle."""


async def shadow_counts(connection: AsyncConnection, revisions: Sequence[int]) -> dict[int, list[ShadowCount]]:
    """Return what was counted for each of these revisions, by the limit's name."""
    told: dict[int, list[ShadowCount]] = {revision: [] for revision in revisions}
    found = await connection.execute(
        select(QuotaShadowCount.__table__)
        .where(QuotaShadowCount.revision.in_(list(revisions)))
        .order_by(QuotaShadowCount.revision, QuotaShadowCount.limit_name)
    )
    for row in found:
        told[row.revision].append(
            ShadowCount(Limit(row.limit_name), row.asked, row.refused, row.newly_refused, row.first_at, row.last_at)
        )
    return told


class ShadowTally:
    """Gathers one process's observations and adds them to the database's sums."""

    def __init__(self, database: Database, add_every_s: float = ADD_EVERY_S) -> None:
        self._database = database
        self._add_every_s = add_every_s
        self._amounts: dict[tuple[int, Limit], list[int]] = {}
        self._task: asyncio.Task[None] | None = None

    def count(self, observations: Iterable[Observation]) -> None:
        """Take observations; they are in the database soon."""
        for revision, limit, refused, newly in observations:
            amounts = self._amounts.setdefault((revision, limit), [0, 0, 0])
            amounts[0] += 1
            amounts[1] += refused
            amounts[2] += newly
        if self._amounts and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._add_soon(), name="add shadow counts")

    async def close(self) -> None:
        """Add what is left."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._amounts:
            await self._add()

    async def _add_soon(self) -> None:
        while self._amounts:
            await asyncio.sleep(self._add_every_s)
            await self._add()
        self._task = None

    async def _add(self) -> None:
        """Add what was gathered; while the database is away it is kept, a few numbers for each limit."""
        taken, self._amounts = self._amounts, {}
        try:
            async with self._database.begin() as connection:
                await connection.execute(ADD, {"counts": rows(_row(key, amounts) for key, amounts in taken.items())})
        except Exception as fault:  # a figure to judge by; no request may suffer for it
            log.warning("shadow counts are added later", fault=str(getattr(fault, "orig", fault)))
            for key, amounts in taken.items():
                kept = self._amounts.setdefault(key, [0, 0, 0])
                kept[:] = [one + other for one, other in zip(kept, amounts, strict=True)]


def _row(key: tuple[int, Limit], amounts: list[int]) -> dict[str, object]:
    return {
        "revision": key[0],
        "limit_name": key[1],
        "asked": amounts[0],
        "refused": amounts[1],
        "newly_refused": amounts[2],
    }


class _Asked(NamedTuple):
    """One request and one rate of the shadow."""

    workspace_id: uuid.UUID
    revision: int
    limit: Limit
    rate: Rate
    admitted: bool  # by the active revision


class Gate:
    """Takes tokens of the active revision's rates, and has the shadow's opinion counted."""

    def __init__(self, rates: Rates, client: redis.asyncio.Redis, tally: ShadowTally) -> None:
        self._rates = rates
        self._client = client
        self._tally = tally
        self._script = (Path(__file__).parent / "gcra.lua").read_text()
        self._digest = hashlib.sha1(self._script.encode(), usedforsecurity=False).hexdigest()
        self._grouping: Grouping[_Asked, None] = Grouping(self._evaluate)
        self._waiting = 0

    async def take(self, workspace_id: uuid.UUID, quota: Quota, *limits: Limit) -> dict[str, str]:
        """Take one token of each limit that has a rate; returns the RateLimit fields of the answer.

        Raises QuotaExceeded when one of them has none left; then nothing was taken.
        """
        if quota.shadow is None:
            return await self._rates.take(workspace_id, quota.rates, *limits)
        try:
            fields = await self._rates.take(workspace_id, quota.rates, *limits)
        except QuotaExceeded:
            self._observe(workspace_id, quota.shadow, limits, admitted=False)
            raise
        self._observe(workspace_id, quota.shadow, limits, admitted=True)
        return fields

    async def drain(self) -> None:
        """Return when every observation so far was evaluated."""
        await self._grouping.drain()

    def _observe(self, workspace_id: uuid.UUID, shadow: Quota, limits: Sequence[Limit], *, admitted: bool) -> None:
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
                pipe.evalsha(self._digest, 1, key, int(each.rate.per_s * 1000), each.rate.burst)
            answers: list[object] = await pipe.execute(raise_on_error=False)
        return answers


def shadow_bucket(workspace_id: uuid.UUID, revision: int, limit: Limit) -> str:
    """Return the key of a bucket in which only a shadow counts."""
    return f"plimsoll:shadow:{{{workspace_id}}}:{revision}:{limit}"
