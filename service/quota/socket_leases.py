"""Leases: how many sockets a workspace and a user hold, in Redis, since sockets die with processes and leave no row.

A place is a member of a sorted set, scored by the instant at which it lapses. Its holder renews it every
`RENEW_EVERY_S`; one that was killed renews nothing, and its place is free `LEASE_S` later. The arithmetic is in
socket_leases.lua: one script looks at all pools and takes a place in each, or in none. `keeper` does it for a process.

Without Redis nobody can count, so a new place is refused (fail closed). Those who hold one keep it: while Redis is away
nobody else can get one either. When Redis comes back empty every holder takes its places again at its next renewal, and
one that finds its pool full by then is told that its place is lost. When Redis' clock steps back by more than a minute,
a dead holder's place lasts `LEASE_S` from the next time that somebody asks; by less, as much longer as it stepped.
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

from service.errors import Unavailable
from service.grouping import Grouping
from service.quota.limits import Limit, Quota

log = structlog.get_logger()

LEASE_S = 15.0
"""How long a place outlives its holder's last sign of life, seconds."""

RENEW_EVERY_S = 5.0
"""How often a holder renews: two renewals may be lost before a place lapses."""

NO_END = -1


class Lease(NamedTuple):
    """One socket's places."""

    holder: str  # unique for each socket
    workspace_id: uuid.UUID
    user_id: uuid.UUID  # a token is a user


class Full(NamedTuple):
    """Why a place was refused."""

    limit: Limit
    used: int


Asked = tuple[Lease, Quota]


class Leases:
    """Takes, renews and gives back places for one process."""

    def __init__(self, client: redis.asyncio.Redis, lease_s: float = LEASE_S) -> None:
        self._client = client
        self._lease_ms = int(lease_s * 1000)
        self._script = (Path(__file__).parent / "socket_leases.lua").read_text()
        self._digest = hashlib.sha1(self._script.encode(), usedforsecurity=False).hexdigest()
        # A thousand sockets that open or end at once are a few round trips, and need no thousand connections.
        self._takes: Grouping[Asked, Full | None] = Grouping(self.renew, lanes=2)
        self._ends: Grouping[Lease, None] = Grouping(self._give_back, lanes=2)

    async def take(self, lease: Lease, quota: Quota) -> Full | None:
        """Take a place in both pools, or none and say which is full; raises Unavailable while Redis is away."""
        try:
            return await self._takes.submit((lease, quota))
        except (RedisError, OSError) as fault:
            raise Unavailable("open sockets cannot be counted while Redis does not answer") from fault

    async def renew(self, held: Sequence[Asked]) -> Sequence[Full | None]:
        """Renew places, or take them anew where they had lapsed; raises RedisError or OSError while Redis is away."""
        answers = await self._ask(held)
        if any(isinstance(answer, NoScriptError) for answer in answers):  # a new or emptied Redis
            await self._client.script_load(self._script)
            answers = await self._ask(held)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        limits = (Limit.WEBSOCKETS, Limit.WEBSOCKETS_PER_USER)
        return [Full(limits[number - 1], used) if number else None for number, used in answers]

    async def held_beside(self, lease: Lease) -> tuple[int, int]:
        """Return how many places others hold in the pools of a lease that was just taken."""
        async with self._client.pipeline(transaction=False) as pipe:
            for key in keys(lease):
                pipe.zcard(key)
            workspace, user = await pipe.execute()
        return workspace - 1, user - 1

    async def give_back(self, lease: Lease) -> None:
        """Free a socket's places at once; while Redis is away, they lapse by themselves."""
        await self._ends.submit(lease)

    async def _give_back(self, leases: Sequence[Lease]) -> Sequence[None]:
        try:
            async with self._client.pipeline(transaction=False) as pipe:
                for lease in leases:
                    for key in keys(lease):
                        pipe.zrem(key, lease.holder)
                await pipe.execute()
        except (RedisError, OSError) as fault:
            log.warning("places of sockets lapse by themselves", fault=str(fault), sockets=len(leases))
        return [None] * len(leases)

    async def _ask(self, held: Sequence[Asked]) -> list[Any]:
        async with self._client.pipeline(transaction=False) as pipe:
            for lease, quota in held:
                most = (quota.websockets, quota.websockets_per_user)
                pipe.evalsha(
                    self._digest, 2, *keys(lease), lease.holder, self._lease_ms,
                    *(NO_END if each is None else each for each in most),
                )  # fmt: skip
            answers: list[Any] = await pipe.execute(raise_on_error=False)
        return answers


def keys(lease: Lease) -> tuple[str, str]:
    """Return the pools' keys; the braces keep all of them on one node of a Redis Cluster, as one script needs them."""
    return (
        f"plimsoll:{{sockets}}:workspace:{lease.workspace_id}",
        f"plimsoll:{{sockets}}:user:{lease.user_id}",
    )
