"""What is wrong with a connection to Redis is told as a RedisError, or not at all when the call can be made again."""

from __future__ import annotations

import asyncio

import pytest
import redis
import redis.asyncio
import uvloop

from service.rediswire import open_redis


async def end_below(client: redis.asyncio.Redis) -> None:
    """Let the connection of a pool end in the moment before it is written to: the library has not noticed yet."""
    assert await client.ping()
    (connection,) = client.connection_pool._available_connections
    writer = connection._writer
    assert writer is not None
    writer.transport.abort()


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_call_whose_connection_has_just_ended_is_made_again(loop_factory: object, redis_url: str) -> None:
    async def call() -> bool:
        async with open_redis(redis_url, retries=1) as client:
            await end_below(client)
            return bool(await client.ping())

    with asyncio.Runner(loop_factory=loop_factory) as runner:  # type: ignore[arg-type]
        assert runner.run(call())


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_without_retries_it_is_told_as_a_lost_connection(loop_factory: object, redis_url: str) -> None:
    async def call() -> None:
        async with open_redis(redis_url, retries=0) as client:
            await end_below(client)
            with pytest.raises(redis.ConnectionError):
                await client.ping()

    with asyncio.Runner(loop_factory=loop_factory) as runner:  # type: ignore[arg-type]
        runner.run(call())
