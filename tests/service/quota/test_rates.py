"""The rate limiter against an independent reference in exact fractions, on a real Redis."""

from __future__ import annotations

import uuid
from fractions import Fraction
from pathlib import Path

import pytest
import redis
import redis.asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

import service.quota
from service.errors import QuotaExceeded
from service.quota.limits import Limit, Rate
from service.quota.rates import Rates, bucket

SCRIPT = (Path(service.quota.__file__).parent / "gcra.lua").read_text()
AT = "local time = redis.call('TIME')"


class Reference:
    """GCRA by its definition (ITU-T I.371, virtual scheduling): one theoretical arrival time, in exact fractions."""

    def __init__(self, per_s: Fraction, burst: int) -> None:
        self.interval_us = Fraction(1_000_000) / per_s
        self.tolerance_us = self.interval_us * (burst - 1)
        self.expected_us: Fraction | None = None

    def admits(self, now_us: int) -> bool:
        expected = Fraction(now_us) if self.expected_us is None else max(self.expected_us, Fraction(now_us))
        if expected - now_us > self.tolerance_us:
            return False
        self.expected_us = expected + self.interval_us
        return True


@given(
    thousandths=st.integers(1, 100_000),
    burst=st.integers(1, 50),
    gaps_us=st.lists(st.integers(0, 3_000_000), min_size=1, max_size=60),
)
@settings(max_examples=60, deadline=None)
def test_every_decision_is_the_references(
    redis_for_module: redis.Redis, thousandths: int, burst: int, gaps_us: list[int]
) -> None:
    # The script's own clock is replaced by an argument, so that it can be compared instant by instant.
    timed = redis_for_module.register_script(SCRIPT.replace(AT, "local time = {ARGV[3], ARGV[4]}"))
    reference, key = Reference(Fraction(thousandths, 1000), burst), uuid.uuid4().hex
    now_us = 1_800_000_000_000_000
    for gap_us in gaps_us:
        now_us += gap_us
        redis_for_module.persist(key)  # the bucket's expiry runs on the real clock
        ((_, wait_us, refused),) = timed([key], [thousandths, burst, now_us // 1_000_000, now_us % 1_000_000])
        assert (refused == 0) == reference.admits(now_us)
        if refused:
            sooner = reference.expected_us or Fraction(0)
            assert now_us + wait_us >= sooner - reference.tolerance_us > now_us + wait_us - 1


@pytest.fixture(scope="module")
def redis_for_module(stack: object) -> redis.Redis:
    return redis.Redis.from_url(stack.redis_url)  # type: ignore[attr-defined]


def test_the_script_reads_the_servers_clock_where_the_test_replaces_it() -> None:
    assert SCRIPT.count(AT) == 1


RATE = {Limit.RUN_CREATION: Rate(Fraction("0.5"), burst=2), Limit.SUBRUN_SPAWN: Rate(Fraction(1), burst=100)}


async def test_a_rested_workspace_may_spend_its_burst_and_no_more(redis_url: str) -> None:
    async with redis.asyncio.from_url(redis_url) as client:
        rates, workspace_id = Rates(client), uuid.uuid4()
        first = await rates.take(workspace_id, RATE, Limit.RUN_CREATION)
        assert first == {"ratelimit-policy": '"run_creation";q=2;w=4', "ratelimit": '"run_creation";r=1;t=0'}
        last = await rates.take(workspace_id, RATE, Limit.RUN_CREATION)
        assert last["ratelimit"] == '"run_creation";r=0;t=2'
        with pytest.raises(QuotaExceeded) as refusal:
            await rates.take(workspace_id, RATE, Limit.RUN_CREATION)
        assert refusal.value.headers()["retry-after"] == "2"
        assert refusal.value.headers()["ratelimit"] == '"run_creation";r=0;t=2'


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


def test_after_a_clock_stepped_back_a_full_bucket_drains_by_the_new_time(redis_for_module: redis.Redis) -> None:
    timed, key = redis_for_module.register_script(SCRIPT.replace(AT, "local time = {ARGV[3], 0}")), uuid.uuid4().hex
    one_per_s = [1000, 1]
    # The clock steps back by an hour before the second request, and goes on.
    refused = [timed([key], [*one_per_s, at_s])[0][2] for at_s in (1_800_003_600, 1_800_000_000, 1_800_000_001)]
    assert refused == [0, 1, 0]


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


async def test_without_redis_requests_pass_and_are_counted() -> None:
    from service.telemetry import RATES_UNCHECKED

    before = RATES_UNCHECKED._value.get()
    async with redis.asyncio.from_url("redis://127.0.0.1:1") as nowhere:
        assert await Rates(nowhere).take(uuid.uuid4(), RATE, Limit.RUN_CREATION) == {}
    assert RATES_UNCHECKED._value.get() == before + 1


@pytest.mark.parametrize(
    ("per_s", "burst"), [(Fraction(1, 3), 1), (Fraction(0), 1), (Fraction(-1), 1), (Fraction(1), 0)]
)
def test_a_rate_that_cannot_be_kept_exactly_is_refused(per_s: Fraction, burst: int) -> None:
    with pytest.raises(ValueError, match="multiple of 1/1000"):
        Rate(per_s, burst)
