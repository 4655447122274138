"""Rates over a real Redis and without one: what is taken, what is told, what is counted. The arithmetic: test_gcra."""

from __future__ import annotations

import uuid
from fractions import Fraction

import pytest
import redis.asyncio

from service.errors import QuotaExceeded
from service.quota.limits import Limit, Rate
from service.quota.local import LocalBuckets
from service.quota.rates import Rates, bucket
from service.telemetry import QUOTA_REFUSALS, RATES_LOCAL

RATE = {Limit.RUN_CREATION: Rate(Fraction("0.5"), burst=2), Limit.SUBRUN_SPAWN: Rate(Fraction(1), burst=100)}


async def test_a_rested_workspace_may_spend_its_burst_and_no_more(redis_url: str) -> None:
    async with redis.asyncio.from_url(redis_url) as client:
        rates, workspace_id = Rates(client), uuid.uuid4()
        first = await rates.take(workspace_id, RATE, Limit.RUN_CREATION)
        assert first == {"ratelimit-policy": '"run_creation";q=2;w=4', "ratelimit": '"run_creation";r=1;t=0'}
        last = await rates.take(workspace_id, RATE, Limit.RUN_CREATION)
        assert last["ratelimit"] in ('"run_creation";r=0;t=2', '"run_creation";r=0;t=3')  # rounded up
        with pytest.raises(QuotaExceeded) as refusal:
            await rates.take(workspace_id, RATE, Limit.RUN_CREATION)
        assert refusal.value.headers()["retry-after"] == refusal.value.headers()["ratelimit"][-1]
        assert refusal.value.headers()["retry-after"] in ("2", "3")


async def test_a_request_under_two_rates_takes_of_both_or_of_none(redis_url: str) -> None:
    async with redis.asyncio.from_url(redis_url) as client:
        rates, workspace_id = Rates(client), uuid.uuid4()
        both = (Limit.SUBRUN_SPAWN, Limit.RUN_CREATION)
        for _ in range(2):
            await rates.take(workspace_id, RATE, *both)
        level = await client.hget(bucket(workspace_id, Limit.SUBRUN_SPAWN), "at")
        with pytest.raises(QuotaExceeded):
            await rates.take(workspace_id, RATE, *both)
        assert await client.hget(bucket(workspace_id, Limit.SUBRUN_SPAWN), "at") == level


async def test_workspaces_do_not_share_a_bucket(redis_url: str) -> None:
    async with redis.asyncio.from_url(redis_url) as client:
        rates = Rates(client)
        for _ in range(5):
            fields = await rates.take(uuid.uuid4(), RATE, Limit.RUN_CREATION)
            assert fields["ratelimit"] == '"run_creation";r=1;t=0'


async def test_an_emptied_redis_gets_its_script_again(redis_url: str) -> None:
    async with redis.asyncio.from_url(redis_url) as client:
        rates, workspace_id = Rates(client), uuid.uuid4()
        await rates.take(workspace_id, RATE, Limit.SUBRUN_SPAWN)
        await client.script_flush()
        fields = await rates.take(workspace_id, RATE, Limit.SUBRUN_SPAWN)
        assert fields["ratelimit"].startswith('"subrun_spawn";r=')  # checked, not let through


async def test_a_lifted_limit_costs_no_call() -> None:
    async with redis.asyncio.from_url("redis://127.0.0.1:1") as nowhere:
        assert await Rates(nowhere).take(uuid.uuid4(), {}, Limit.RUN_CREATION) == {}


async def test_two_rates_that_refuse_are_both_named_and_the_longer_wait_is_told(redis_url: str) -> None:
    slow = {Limit.RUN_CREATION: Rate(Fraction("0.4"), 1), Limit.SUBRUN_SPAWN: Rate(Fraction("0.08"), 1)}
    async with redis.asyncio.from_url(redis_url) as client:
        rates, workspace_id = Rates(client), uuid.uuid4()
        await rates.take(workspace_id, slow, *slow)
        with pytest.raises(QuotaExceeded) as refusal:
            await rates.take(workspace_id, slow, *slow)
    assert refusal.value.headers() == {
        "retry-after": "13",
        "ratelimit-policy": '"run_creation";q=1;w=3, "subrun_spawn";q=1;w=13',
        "ratelimit": '"run_creation";r=0;t=3, "subrun_spawn";r=0;t=13',
    }
    assert refusal.value.extensions["violated-policies"] == [Limit.RUN_CREATION, Limit.SUBRUN_SPAWN]
    assert [figure(limit, workspace_id) for limit in slow] == [1, 1]


def figure(limit: Limit, workspace_id: uuid.UUID) -> float:
    """Return how many refusals were counted."""
    return float(QUOTA_REFUSALS.labels(limit, str(workspace_id))._value.get())


def local_figures() -> dict[str, float]:
    """Return how many requests were decided in this process."""
    return {outcome: float(RATES_LOCAL.labels(outcome)._value.get()) for outcome in ("admitted", "refused")}


async def test_without_redis_each_process_keeps_the_rate_by_itself_and_counts_that_it_does() -> None:
    before, workspace_id = local_figures(), uuid.uuid4()
    async with redis.asyncio.from_url("redis://127.0.0.1:1") as nowhere:
        rates = Rates(nowhere, LocalBuckets(monotonic_us=lambda: 0))
        assert [await rates.take(workspace_id, RATE, Limit.RUN_CREATION) for _ in range(2)] == [
            {"ratelimit-policy": '"run_creation";q=2;w=4', "ratelimit": '"run_creation";r=1;t=0'},
            {"ratelimit-policy": '"run_creation";q=2;w=4', "ratelimit": '"run_creation";r=0;t=3'},
        ]
        with pytest.raises(QuotaExceeded) as refusal:
            await rates.take(workspace_id, RATE, Limit.RUN_CREATION)
    assert refusal.value.headers()["retry-after"] == refusal.value.headers()["ratelimit"][-1] == "3"
    assert local_figures() == {"admitted": before["admitted"] + 2, "refused": before["refused"] + 1}


async def test_an_error_of_redis_itself_is_met_like_its_absence(redis_url: str) -> None:
    before, workspace_id = local_figures(), uuid.uuid4()
    async with redis.asyncio.from_url(redis_url) as client:
        await client.set(bucket(workspace_id, Limit.RUN_CREATION), "no bucket")
        await Rates(client).take(workspace_id, RATE, Limit.RUN_CREATION)
    assert local_figures() == {**before, "admitted": before["admitted"] + 1}


@pytest.mark.parametrize(
    ("per_s", "burst"),
    [
        (Fraction(1, 3), 1),
        (Fraction(0), 1),
        (Fraction(-1), 1),
        (Fraction(1), 0),
        (Fraction(1_000_001), 1),
        (Fraction(1), 1_000_001),
    ],
)
def test_a_rate_that_cannot_be_kept_exactly_is_refused(per_s: Fraction, burst: int) -> None:
    with pytest.raises(ValueError, match="multiple of 1/1000"):
        Rate(per_s, burst)
