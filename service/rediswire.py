"""The way to Redis: how a client is opened, and what it says when its connection is gone.

Whoever calls Redis here can go on without it, so calls fail fast, and all that can be wrong with a connection is told
as one thing: a RedisError. The event loop's own transport refuses to write on a connection that has just ended with a
RuntimeError, which the library passes on as it is; taken for a bug, it failed requests that need no Redis.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import redis.asyncio
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

ANSWER_PATIENCE_S, CONNECT_PATIENCE_S = 2.0, 0.5
"""Longest wait for an answer of Redis, and for a connection to it."""


def open_redis(url: str, *, retries: int, kind: type[redis.asyncio.Redis] = redis.asyncio.Redis) -> redis.asyncio.Redis:
    """Open a pool; a call whose connection was lost is made again so many times, over a new one.

    One that was too slow is not: it may have been done.
    """
    retry = Retry(NoBackoff(), retries, (redis.ConnectionError,) if retries else ())
    client = kind.from_url(
        url, socket_timeout=ANSWER_PATIENCE_S, socket_connect_timeout=CONNECT_PATIENCE_S, retry=retry, protocol=2
    )
    pool = client.connection_pool
    pool.connection_class = _telling(pool.connection_class)
    return client


def _telling(kind: type[AbstractConnection]) -> type[AbstractConnection]:
    """Return a kind of connection that says in Redis' own words that it is gone."""

    class Telling(kind):  # type: ignore[misc, valid-type]
        async def send_packed_command(self, command: bytes | str | Iterable[bytes], check_health: bool = True) -> None:
            try:
                await super().send_packed_command(command, check_health)
            except RuntimeError as fault:
                if self.is_connected:  # the library has dropped it, unless the fault is another one
                    raise
                raise redis.ConnectionError(f"the connection ended before it was written to: {fault}") from fault

    told: Any = Telling
    return told  # type: ignore[no-any-return]
