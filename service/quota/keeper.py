"""Keeps the places that this process's sockets hold: takes them, renews them, gives them back.

What a place is and what happens without Redis: `socket_leases`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog
from redis.exceptions import RedisError

from service.errors import QuotaExceeded, Unavailable
from service.quota.caps import observe_caps
from service.quota.limits import Limit, Quota
from service.quota.refusals import count_refusal
from service.quota.shadow import ShadowTally
from service.quota.socket_leases import RENEW_EVERY_S, Full, Lease, Leases
from service.telemetry import SHADOW_UNCHECKED

log = structlog.get_logger()

PAUSES_S = (0.1, 0.4)
"""Pauses before a full pool is asked again: a client that reconnects may be ahead of the end of its own last socket."""

FAILED_RETRY_S = 1.0
"""Pause before renewing is tried again when it failed, seconds."""


@dataclass(slots=True)
class _Held:
    """One socket's places."""

    quota: Quota  # as last known
    lost: Callable[[Full], None]


class Keeper:
    """Holds places for one process."""

    def __init__(
        self,
        leases: Leases,
        quota_of: Callable[[uuid.UUID], Awaitable[Quota]],
        renew_every_s: float = RENEW_EVERY_S,
        tally: ShadowTally | None = None,
    ) -> None:
        self._leases = leases
        self._quota_of = quota_of
        self._renew_every_s = renew_every_s
        self._tally = tally
        self._held: dict[Lease, _Held] = {}
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    @asynccontextmanager
    async def hold(self, lease: Lease, lost: Callable[[Full], None]) -> AsyncIterator[None]:
        """Hold places for as long as the block lasts; `lost` is called when they are gone before.

        Raises QuotaExceeded when a pool is full, NotFound for the workspace, Unavailable while Redis is away.
        """
        self._held[lease] = _Held(await self._take(lease), lost)
        if self._task is None:
            self._task = asyncio.create_task(self._renew_forever(), name="renew places")
        try:
            yield
        finally:
            del self._held[lease]
            await asyncio.shield(self._leases.give_back(lease))

    async def close(self) -> None:
        """Stop renewing."""
        self._closed = True  # besides the cancellation: a call of redis-py that is about to return may swallow it
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _take(self, lease: Lease) -> Quota:
        """Take the places; returns the quota under which they were taken."""
        quota = await self._quota_of(lease.workspace_id)
        try:
            full = await self._leases.take(lease, quota)
            for pause_s in PAUSES_S:
                if full is not None:
                    await asyncio.sleep(pause_s)
                    full = await self._leases.take(lease, quota)
        except Unavailable:
            if quota.websockets is not None or quota.websockets_per_user is not None:
                raise
            return quota  # nothing is counted against a lifted cap
        await self._observe(lease, quota, full)
        if full is not None:
            count_refusal(full.limit, lease.workspace_id)
            most = quota.websockets if full.limit is Limit.WEBSOCKETS else quota.websockets_per_user
            raise QuotaExceeded(full.limit, f"({full.used} of {most} open); close one first", 1, {})
        return quota

    async def _observe(self, lease: Lease, quota: Quota, full: Full | None) -> None:
        """Count what the shadow revision would have said; one more question to Redis, and only while there is one."""
        if quota.shadow is None or self._tally is None:
            return
        if full is not None:
            uses = [(full.limit, full.used)]
        else:
            try:
                held = await self._leases.held_beside(lease)
            except (RedisError, OSError):  # the socket has its places; only the figure is missing
                SHADOW_UNCHECKED.inc()
                return
            uses = list(zip((Limit.WEBSOCKETS, Limit.WEBSOCKETS_PER_USER), held, strict=True))
        self._tally.count(observe_caps(quota, uses, admitted=full is None))

    async def _renew_forever(self) -> None:
        """Renew all places of this process, in one round trip."""
        pause_s = self._renew_every_s
        while not self._closed:
            await asyncio.sleep(pause_s)
            pause_s = self._renew_every_s
            try:
                await self._renew()
            except Exception as fault:
                pause_s = min(FAILED_RETRY_S, self._renew_every_s)
                log.warning("places of sockets were not renewed", fault=str(fault))

    async def _renew(self) -> None:
        workspace_ids = list({lease.workspace_id for lease in self._held})
        found = await asyncio.gather(*map(self._quota_of, workspace_ids), return_exceptions=True)
        quotas = {each: quota for each, quota in zip(workspace_ids, found, strict=True) if isinstance(quota, Quota)}
        for lease, held in self._held.items():
            held.quota = quotas.get(lease.workspace_id, held.quota)  # the last known one, while the database is away
        asked = [(lease, held.quota) for lease, held in self._held.items()]
        if not asked:
            return
        answers = await self._leases.renew(asked)
        for lease, _ in asked:
            if lease not in self._held:  # it ended while the renewal was on its way, which may have come after the end
                await self._leases.give_back(lease)
        for (lease, _), full in zip(asked, answers, strict=True):
            if full is not None and lease in self._held:
                self._held[lease].lost(full)
