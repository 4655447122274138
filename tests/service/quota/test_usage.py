"""The quota page: what is used and left of each limit, by whom, and when a retry succeeds."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import redis.asyncio

from service.auth import issue_token
from service.errors import QuotaExceeded
from service.guarded import connect_redis
from service.quota.limits import DEFAULT, Limit, Quota, Rate
from service.quota.rates import Rates, bucket
from service.quota.socket_leases import Lease, Leases, keys
from service.quota.usage import LimitUse, Usage
from service.tick import Ticker
from tests.tenants import Tenant, drain

HOURLY = replace(DEFAULT, rates={Limit.RUN_CREATION: Rate(Fraction("0.001"), burst=3)}, revision=1)


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    opened = connect_redis(redis_url)
    yield opened
    await opened.aclose()


async def look(tenant: Tenant, client: redis.asyncio.Redis, quota: Quota = HOURLY) -> dict[Limit, LimitUse]:
    """Return each limit's use."""
    use = await Usage(tenant.database, client).of(tenant.workspace_id, quota)
    assert list(Limit) == sorted((each.limit for each in use.limits), key=list(Limit).index)
    return {each.limit: each for each in use.limits}


def figures(use: LimitUse) -> tuple[Any, int | None, int | None]:
    return use.value, use.used, use.remaining


async def test_looking_at_a_rate_spends_nothing_and_says_what_the_next_request_will_hear(
    tenant: Tenant, client: redis.asyncio.Redis
) -> None:
    rates = Rates(client)
    for left in (3, 2, 1):
        seen = (await look(tenant, client))[Limit.RUN_CREATION]
        assert (figures(seen), seen.retry_after_s, seen.retry_when) == ((0.001, 3 - left, left), 0.0, None)
        await rates.take(tenant.workspace_id, HOURLY.rates, Limit.RUN_CREATION)
    seen = (await look(tenant, client))[Limit.RUN_CREATION]
    assert figures(seen) == (0.001, 3, 0)
    with pytest.raises(QuotaExceeded) as refused:
        await rates.take(tenant.workspace_id, HOURLY.rates, Limit.RUN_CREATION)
    told_s = int(refused.value.headers()["retry-after"])
    assert seen.retry_after_s is not None
    assert seen.retry_at is not None
    assert told_s - 2 <= seen.retry_after_s <= told_s + 2
    assert abs(seen.retry_at - dt.datetime.now(dt.UTC) - dt.timedelta(seconds=seen.retry_after_s)).total_seconds() < 60
    assert await client.keys("*:run_creation:*") == []
    assert await client.exists(bucket(tenant.workspace_id, Limit.RUN_CREATION)) == 1


async def test_a_lifted_limit_is_used_by_nobody_that_is_counted(tenant: Tenant, client: redis.asyncio.Redis) -> None:
    seen = (await look(tenant, client))[Limit.SNAPSHOT_POLL]
    assert (figures(seen), seen.burst, seen.retry_after_s) == ((None, None, None), None, 0.0)


async def test_the_holders_of_run_caps_are_the_live_runs(tenant: Tenant, client: redis.asyncio.Redis) -> None:
    parents = await tenant.runs(2, expected_subruns=2)
    children = [await tenant.spawn(parents[0]) for _ in range(4)]
    seen = await look(tenant, client)
    assert figures(seen[Limit.LIVE_PARENT_RUNS]) == (5, 2, 3)
    assert {each.run_id for each in seen[Limit.LIVE_PARENT_RUNS].holders} == set(parents)
    assert figures(seen[Limit.LIVE_RUNS]) == (12, 6, 6)
    assert {each.run_id for each in seen[Limit.LIVE_RUNS].holders} == {*parents, *children}
    full = seen[Limit.PENDING_SUBRUNS]
    assert figures(full) == (4, 4, 0)
    assert [(each.run_id, each.holds) for each in full.holders] == [(parents[0], 4)]
    assert (full.retry_after_s, full.retry_at, full.retry_when) == (None, None, "when a subrun of that parent ends")


@pytest.mark.parametrize(
    ("cap", "when"),
    [
        (4, "when one of the holders ends"),
        (2, "when one of the holders ends; 3 have to, as more is held than the cap allows"),
        (0, "not under a cap of 0"),
    ],
)
async def test_a_lowered_cap_says_how_many_have_to_end(
    cap: int, when: str, tenant: Tenant, client: redis.asyncio.Redis
) -> None:
    await tenant.runs(4)
    seen = (await look(tenant, client, replace(HOURLY, live_runs=cap)))[Limit.LIVE_RUNS]
    assert (figures(seen), seen.retry_after_s, seen.retry_when) == ((cap, 4, 0), None, when)


async def test_ended_runs_hold_nothing(tenant: Tenant, client: redis.asyncio.Redis, ticker: Ticker) -> None:
    await tenant.runs(2)
    await drain(ticker)
    seen = await look(tenant, client)
    assert (figures(seen[Limit.LIVE_RUNS]), seen[Limit.LIVE_RUNS].holders) == ((12, 0, 12), [])


async def test_tool_calls_that_wait_are_named(tenant: Tenant, client: redis.asyncio.Redis, ticker: Ticker) -> None:
    await tenant.write(
        "INSERT INTO tool_definitions VALUES (:w, 'ask', 'echo', 'SAFE', true, '{}', 5, now())", w=tenant.workspace_id
    )
    agent_id = await tenant.agent({"kind": "TOOL_CALL", "tool": "ask"})
    run_ids = await tenant.runs(2, agent_id)
    await drain(ticker)
    seen = await look(tenant, client)
    calls = await tenant.rows("SELECT tool_call_id, run_id FROM tool_calls WHERE status = 'PENDING'")
    assert figures(seen[Limit.PENDING_TOOL_CALLS]) == (6, 2, 4)
    assert {(each.tool_call_id, each.run_id) for each in seen[Limit.PENDING_TOOL_CALLS].holders} == {
        (call["tool_call_id"], call["run_id"]) for call in calls
    }
    per_run = seen[Limit.PENDING_TOOL_CALLS_PER_RUN]
    assert (figures(per_run), per_run.retry_when) == ((1, 1, 0), "when that run's call is approved or rejected")
    assert {each.run_id for each in per_run.holders} == set(run_ids)


async def test_sockets_are_named_with_their_tokens(tenant: Tenant, client: redis.asyncio.Redis) -> None:
    async with tenant.database.begin() as connection:
        for _ in range(2):
            await issue_token(connection, tenant.workspace_id, "VIEWER")
    one, two = [row["token_id"] for row in await tenant.rows("SELECT token_id FROM tokens")]
    leases = Leases(client)
    for holder, user_id in (("a", one), ("b", one), ("c", two), ("d", uuid.uuid4())):
        assert await leases.take(Lease(holder, tenant.workspace_id, user_id), DEFAULT) is None
    seen = await look(tenant, client)
    assert figures(seen[Limit.WEBSOCKETS]) == (20, 4, 16)
    assert {(each.socket, each.user_id) for each in seen[Limit.WEBSOCKETS].holders} == {
        ("a", one), ("b", one), ("c", two), ("d", None),
    }  # fmt: skip
    assert figures(seen[Limit.WEBSOCKETS_PER_USER]) == (5, 2, 3)
    assert [(each.user_id, each.holds) for each in seen[Limit.WEBSOCKETS_PER_USER].holders] == [(one, 2), (two, 1)]


async def test_a_place_that_lapsed_is_held_by_nobody(tenant: Tenant, client: redis.asyncio.Redis) -> None:
    pool, _ = keys(Lease("", tenant.workspace_id, tenant.workspace_id))
    seconds, _ = await client.time()
    await client.zadd(pool, {"gone": seconds * 1000 - 1, "here": seconds * 1000 + 60_000})
    seen = (await look(tenant, client))[Limit.WEBSOCKETS]
    assert (figures(seen), [each.socket for each in seen.holders]) == ((20, 1, 19), ["here"])


async def test_while_redis_is_away_its_figures_are_unknown_and_the_others_are_told(tenant: Tenant) -> None:
    nowhere = connect_redis("redis://127.0.0.1:1")
    await tenant.run()
    seen = await look(tenant, nowhere)
    await nowhere.aclose()
    assert figures(seen[Limit.LIVE_RUNS]) == (12, 1, 11)
    for limit in (Limit.RUN_CREATION, Limit.WEBSOCKETS, Limit.WEBSOCKETS_PER_USER):
        assert (seen[limit].used, seen[limit].remaining, seen[limit].retry_after_s) == (None, None, None)
        assert "Redis does not answer" in (seen[limit].retry_when or "")
