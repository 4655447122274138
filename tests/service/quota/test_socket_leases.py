"""Places for sockets on a real Redis: all or none, never above the cap, free again when given back or lapsed."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import redis.asyncio
from redis.exceptions import RedisError

from service.errors import QuotaExceeded, Unavailable
from service.quota.keeper import Keeper
from service.quota.limits import DEFAULT, LIFTED, Limit, Quota
from service.quota.socket_leases import Full, Lease, Leases, keys

QUOTA = replace(DEFAULT, websockets=3, websockets_per_user=2)


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    async with redis.asyncio.from_url(redis_url) as opened:
        yield opened


def lease(workspace_id: uuid.UUID, user_id: uuid.UUID | None = None) -> Lease:
    """Return what one more socket asks for; by default a user of its own."""
    return Lease(uuid.uuid4().hex, workspace_id, user_id or uuid.uuid4())


async def test_the_pool_that_is_full_is_named_and_nothing_is_taken_of_the_other(client: redis.asyncio.Redis) -> None:
    leases, workspace_id, user_id = Leases(client), uuid.uuid4(), uuid.uuid4()
    assert [await leases.take(lease(workspace_id, user_id), QUOTA) for _ in range(3)] == [
        None, None, Full(Limit.WEBSOCKETS_PER_USER, 2)
    ]  # fmt: skip
    other = lease(workspace_id)
    assert await leases.take(other, QUOTA) is None
    refused = lease(workspace_id)
    assert await leases.take(refused, QUOTA) == Full(Limit.WEBSOCKETS, 3)
    assert await client.exists(keys(refused)[1]) == 0
    await leases.give_back(other)
    assert await leases.take(refused, QUOTA) is None


async def test_of_many_at_once_as_many_get_a_place_as_there_are(redis_url: str) -> None:
    workspace_id = uuid.uuid4()
    async with redis.asyncio.from_url(redis_url) as one, redis.asyncio.from_url(redis_url) as two:
        processes = [Leases(one), Leases(two)]
        answers = await asyncio.gather(*(processes[n % 2].take(lease(workspace_id), QUOTA) for n in range(200)))
    assert answers.count(None) == 3


async def test_taking_again_renews_and_is_never_refused_to_a_holder(client: redis.asyncio.Redis) -> None:
    leases, workspace_id = Leases(client), uuid.uuid4()
    held = [(lease(workspace_id), QUOTA) for _ in range(3)]
    assert await leases.renew(held) == [None] * 3
    before = await client.zscore(keys(held[0][0])[0], held[0][0].holder)
    lowered = [(each, replace(QUOTA, websockets=1)) for each, _ in held]
    assert await leases.renew(lowered) == [None] * 3
    after = await client.zscore(keys(held[0][0])[0], held[0][0].holder)
    assert before is not None
    assert after is not None
    assert after >= before
    assert await client.zcard(keys(held[0][0])[0]) == 3


async def test_a_place_that_is_not_renewed_lapses(client: redis.asyncio.Redis) -> None:
    leases, workspace_id = Leases(client, lease_s=0.2), uuid.uuid4()
    assert [await leases.take(lease(workspace_id), QUOTA) for _ in range(4)] == [None] * 3 + [Full(Limit.WEBSOCKETS, 3)]
    while await leases.take(lease(workspace_id), QUOTA) is not None:
        pass


async def test_a_lapse_frees_its_own_place_only(client: redis.asyncio.Redis) -> None:
    leases, short, workspace_id = Leases(client), Leases(client, lease_s=0.05), uuid.uuid4()
    await leases.renew([(lease(workspace_id), QUOTA) for _ in range(2)])
    await short.take(lease(workspace_id), QUOTA)
    while (full := await leases.take(lease(workspace_id), QUOTA)) is not None:
        assert full == Full(Limit.WEBSOCKETS, 3)
    assert await leases.take(lease(workspace_id), QUOTA) == Full(Limit.WEBSOCKETS, 3)


async def test_after_the_clock_stepped_back_by_an_hour_a_dead_holders_place_lapses_as_any_other(
    client: redis.asyncio.Redis,
) -> None:
    leases, workspace_id = Leases(client, lease_s=0.2), uuid.uuid4()
    dead, living = lease(workspace_id), lease(workspace_id)
    seconds, _ = await client.time()
    pool = keys(dead)[0]
    await client.zadd(pool, {each.holder: (seconds + 3600) * 1000 for each in (dead, living)})
    assert await leases.take(lease(workspace_id), QUOTA) is None
    while await leases.take(lease(workspace_id), QUOTA) is not None:
        assert await leases.take(living, QUOTA) is None
    assert await client.zscore(pool, dead.holder) is None
    assert await client.zscore(pool, living.holder) is not None


async def test_a_lifted_cap_is_counted_and_never_full(client: redis.asyncio.Redis) -> None:
    leases, workspace_id = Leases(client), uuid.uuid4()
    assert await asyncio.gather(*(leases.take(lease(workspace_id), LIFTED) for _ in range(50))) == [None] * 50
    assert await client.zcard(keys(lease(workspace_id))[0]) == 50


async def test_a_keeper_renews_what_it_holds_and_gives_it_back(client: redis.asyncio.Redis) -> None:
    asked = asyncio.Semaphore(0)

    async def quota_of(workspace_id: uuid.UUID) -> Quota:
        asked.release()
        return QUOTA

    keeper, mine = Keeper(Leases(client, lease_s=0.3), quota_of, renew_every_s=0.05), lease(uuid.uuid4())
    async with keeper.hold(mine, lambda full: None):
        first = await client.zscore(keys(mine)[0], mine.holder)
        for _ in range(10):  # the first take and nine renewals: longer than the place would last
            await asked.acquire()
        last = await client.zscore(keys(mine)[0], mine.holder)
    assert first is not None
    assert last is not None
    assert last > first
    assert await client.exists(*keys(mine)) == 0
    await keeper.close()


async def test_a_full_pool_is_looked_at_again_before_it_refuses(client: redis.asyncio.Redis) -> None:
    async def quota_of(workspace_id: uuid.UUID) -> Quota:
        return replace(QUOTA, websockets=1)

    keeper, workspace_id = Keeper(Leases(client), quota_of), uuid.uuid4()
    first, second, third = (lease(workspace_id) for _ in range(3))
    await Leases(client).take(first, QUOTA)

    async def wait_in_line(mine: Lease) -> None:
        async with keeper.hold(mine, lambda full: None):
            assert await client.zcard(keys(mine)[0]) == 1

    waiting = asyncio.create_task(wait_in_line(second))
    await asyncio.sleep(0)
    await Leases(client).give_back(first)
    await waiting
    await Leases(client).take(first, QUOTA)
    with pytest.raises(QuotaExceeded, match=r"websockets \(1 of 1 open\); close one first"):
        await wait_in_line(third)
    await keeper.close()


async def test_who_lost_its_place_in_an_emptied_redis_takes_it_again_or_is_told(client: redis.asyncio.Redis) -> None:
    quota, told = replace(QUOTA, websockets=1), asyncio.get_running_loop().create_future()

    async def quota_of(workspace_id: uuid.UUID) -> Quota:
        return quota

    keeper, workspace_id = Keeper(Leases(client), quota_of, renew_every_s=0.02), uuid.uuid4()
    mine = lease(workspace_id)
    async with keeper.hold(mine, told.set_result):
        await client.flushdb()
        await client.script_flush()
        while await client.zscore(keys(mine)[0], mine.holder) is None:
            pass
        async with client.pipeline(transaction=True) as pipe:  # in one step: somebody else was faster
            pipe.delete(keys(mine)[0])
            pipe.zadd(keys(mine)[0], {"another": 10**15})
            await pipe.execute()
        assert await told == Full(Limit.WEBSOCKETS, 1)
    await keeper.close()


async def test_without_redis_capped_sockets_are_refused_and_lifted_ones_are_not() -> None:
    quota = QUOTA

    async def quota_of(workspace_id: uuid.UUID) -> Quota:
        return quota

    async with redis.asyncio.from_url("redis://127.0.0.1:1") as nowhere:
        keeper, mine = Keeper(Leases(nowhere), quota_of), lease(uuid.uuid4())
        with pytest.raises(Unavailable, match="cannot be counted"):
            async with keeper.hold(mine, lambda full: None):
                raise AssertionError("it was let in")
        with pytest.raises(RedisError):
            await Leases(nowhere).renew([(mine, quota)])
        quota = LIFTED
        async with keeper.hold(mine, lambda full: None):
            pass
        await keeper.close()
