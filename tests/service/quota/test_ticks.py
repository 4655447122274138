"""The tick rate's arithmetic, in Redis and in a process, against the exact reference; and what is promised of it."""

from __future__ import annotations

import heapq
import math
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from fractions import Fraction

import pytest
import redis
import redis.asyncio
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.typing import EventDict

from service.embedded import Stack
from service.guarded import connect_redis
from service.quota import ticks
from service.quota.limits import MOST, Limit, Rate
from service.quota.rates import bucket
from service.quota.ticks import Asked, LocalLines, TickRates, Verdict
from tests.service.quota.exact import US, ExactLine, excess

CLOCK = "local time = redis.call('TIME')\n"
TIMED = ticks.SCRIPT.replace(CLOCK, "local time = {ARGV[5], ARGV[6]}\n")

START_US = 1_800_000_000_000_000

Take = Callable[[int, Rate, int, int], Verdict]
"""Asks for tokens at an instant, microseconds: the rate, how many turns waited, how many are fresh."""


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(stack.redis_url) as opened:
        yield opened


def in_redis(client: redis.Redis) -> Take:
    """Return a bucket in Redis under a clock of the test's own, that does not expire on the real one."""
    script, key = client.register_script(TIMED), uuid.uuid4().hex

    def take(now_us: int, rate: Rate, returned: int, fresh: int) -> Verdict:
        thousandths = rate.thousandths
        with client.pipeline(transaction=True) as pipe:
            terms = [thousandths, rate.burst, returned, fresh, now_us // 1_000_000, now_us % 1_000_000]
            script([key], terms, client=pipe)
            pipe.persist(key)
            back, first, _, early, short = map(int, pipe.execute()[0])
        return Verdict(back, first, early, short, ticks.TOKEN, thousandths)

    return take


def in_process(_: redis.Redis) -> Take:
    """Return a bucket in memory."""
    now, workspace_id = [0], uuid.uuid4()
    lines = LocalLines(monotonic_us=lambda: now[0])

    def take(now_us: int, rate: Rate, returned: int, fresh: int) -> Verdict:
        now[0] = now_us
        return lines.take(Asked(workspace_id, rate, returned, fresh))

    return take


BOTH = pytest.mark.parametrize("where", [in_redis, in_process])

RATES = st.builds(
    lambda thousandths, burst: Rate(Fraction(thousandths, 1000), burst),
    st.one_of(st.sampled_from([41_000, 10_290, 1, MOST * 1000]), st.integers(1, 200_000)),
    st.one_of(st.integers(1, 50), st.just(MOST)),
)
GAPS_US = st.one_of(st.integers(0, 200_000), st.integers(0, 3_000_000), st.just(86_400_000_000))
BATCHES = st.lists(st.tuples(GAPS_US, st.integers(0, 5), st.integers(0, 130)), min_size=1, max_size=40)


def test_the_script_under_test_differs_from_the_services_in_the_line_that_reads_the_clock() -> None:
    theirs, ours = ticks.SCRIPT.splitlines(), TIMED.splitlines()
    assert [line for line, other in zip(theirs, ours, strict=True) if line != other] == [CLOCK.rstrip("\n")]


@BOTH
@given(rates=st.lists(RATES, min_size=1, max_size=2), batches=BATCHES, changes=st.lists(st.booleans(), min_size=40))
@settings(max_examples=60, deadline=None)
def test_every_decision_and_every_wait_is_the_references(
    client: redis.Redis,
    where: Callable[[redis.Redis], Take],
    rates: list[Rate],
    batches: list[tuple[int, int, int]],
    changes: list[bool],
) -> None:
    take, reference, now_us = where(client), ExactLine(), START_US
    for (gap_us, returned, fresh), other in zip(batches, changes, strict=False):
        now_us += gap_us
        rate = rates[-1 if other else 0]
        verdict = take(now_us, rate, returned, fresh)
        back, first, waits_s = reference.take(now_us, rate.per_s, rate.burst, returned, fresh)
        assert (verdict.returned, verdict.fresh) == (back, first)
        for place, wait_s in enumerate(waits_s):
            assert verdict.wait_us(place) * US >= wait_s > (verdict.wait_us(place) - 1) * US


def play(take: Take, rate: Rate, arrivals_us: list[int], late_us: int) -> tuple[list[int], list[int]]:
    """Let runs come, be delayed and come again, each up to so much late; returns when they got their tokens, and how
    often each was claimed.
    """
    coming = [(at_us, number, False) for number, at_us in enumerate(arrivals_us)]
    heapq.heapify(coming)
    admitted_us, claims = [], [0] * len(arrivals_us)
    while coming:
        now_us, number, waited = heapq.heappop(coming)
        claims[number] += 1
        verdict = take(now_us, rate, int(waited), int(not waited))
        if verdict.returned + verdict.fresh:
            admitted_us.append(now_us)
        else:
            heapq.heappush(coming, (now_us + verdict.wait_us(0) + number * 7919 % (late_us + 1), number, True))
    return admitted_us, claims


@BOTH
@given(
    rate=st.builds(lambda r, b: Rate(Fraction(r, 1000), b), st.integers(100, 200_000), st.integers(1, 50)),
    gaps_us=st.lists(st.one_of(st.just(0), st.integers(0, 300_000)), min_size=1, max_size=120),
)
@settings(max_examples=30, deadline=None)
def test_who_comes_when_told_is_delayed_once_and_no_token_is_left_lying(
    client: redis.Redis, where: Callable[[redis.Redis], Take], rate: Rate, gaps_us: list[int]
) -> None:
    arrivals_us = [START_US + sum(gaps_us[:number]) for number in range(len(gaps_us))]

    admitted_us, claims = play(where(client), rate, arrivals_us, late_us=0)

    assert excess(admitted_us, rate.per_s, rate.burst) <= 0
    # A time is rounded up to a microsecond; with a burst of 1 that makes the next one early, who then keeps its place.
    assert max(claims) <= (2 if rate.burst > 1 else 3)
    # As a bucket in exact fractions would have served a line: each as soon as it was there and a token was, in whole
    # microseconds. With a burst of 1 no two turns are closer than 1 / R, and so none closer than that rounded up.
    level, at_us = Fraction(0), START_US
    for arrived_us, served_us in zip(arrivals_us, admitted_us, strict=True):
        now_us = max(at_us, arrived_us)
        over = max(Fraction(0), level - (now_us - at_us) * US * rate.per_s) + 1 - rate.burst
        exact_us = now_us + math.ceil(max(Fraction(0), over) / rate.per_s / US)
        level, at_us = max(Fraction(0), level - (exact_us - at_us) * US * rate.per_s) + 1, exact_us
        assert 0 <= served_us - exact_us < 3


@BOTH
@given(
    rate=st.builds(lambda r, b: Rate(Fraction(r, 1000), b), st.integers(100, 200_000), st.integers(1, 50)),
    gaps_us=st.lists(st.integers(0, 100_000), min_size=1, max_size=80),
    late_us=st.integers(0, 500_000),
)
@settings(max_examples=30, deadline=None)
def test_no_window_holds_more_turns_than_burst_and_rate_allow_however_late_they_come(
    client: redis.Redis, where: Callable[[redis.Redis], Take], rate: Rate, gaps_us: list[int], late_us: int
) -> None:
    arrivals_us = [START_US + sum(gaps_us[:number]) for number in range(len(gaps_us))]

    admitted_us, _ = play(where(client), rate, arrivals_us, late_us)

    assert excess(sorted(admitted_us), rate.per_s, rate.burst) <= 0
    assert len(admitted_us) == len(arrivals_us)


@BOTH
def test_a_line_under_another_rate_is_void(client: redis.Redis, where: Callable[[redis.Redis], Take]) -> None:
    take, slow, fast = where(client), Rate(Fraction(1), 1), Rate(Fraction(1000), 1)
    assert take(START_US, slow, 0, 61).wait_us(59) == 60_000_000
    assert take(START_US + 1, fast, 0, 1).wait_us(0) <= 1_000


@BOTH
def test_who_waited_goes_before_who_comes_for_the_first_time(
    client: redis.Redis, where: Callable[[redis.Redis], Take]
) -> None:
    take, rate = where(client), Rate(Fraction(1), 1)
    assert take(START_US, rate, 0, 3).wait_us(1) == 2_000_000
    fresh = take(START_US + 1_000_000, rate, 0, 1)
    assert (fresh.fresh, fresh.wait_us(0)) == (0, 2_000_000)
    assert take(START_US + 1_000_000, rate, 1, 0).returned == 1


async def test_an_emptied_redis_is_taught_the_script_again(redis_url: str) -> None:
    async with connect_redis(redis_url) as opened:
        rates, asked = TickRates(opened), Asked(uuid.uuid4(), Rate(Fraction(1, 1000), 2), 0, 3)
        await opened.script_flush()
        (verdict,), away = await rates.take([asked])
    assert ((verdict.returned, verdict.fresh), away) == ((0, 2), False)


async def test_the_bucket_is_the_one_that_the_quota_page_looks_at_and_expires_when_its_line_has_passed(
    redis_url: str,
) -> None:
    async with connect_redis(redis_url) as opened:
        workspace_id = uuid.uuid4()
        await TickRates(opened).take([Asked(workspace_id, Rate(Fraction(1), 1), 0, 10)])
        left_ms = await opened.pttl(bucket(workspace_id, Limit.TICK))
    assert 9_000 < left_ms <= 10_001


async def test_what_was_promised_can_be_forgotten_and_what_was_spent_stays(redis_url: str) -> None:
    rate, workspace_id = Rate(Fraction(1, 1000), 1), uuid.uuid4()
    async with connect_redis(redis_url) as opened:
        rates = TickRates(opened)
        await rates.take([Asked(workspace_id, rate, 0, 10)])
        await rates.forget_lines([workspace_id])
        (verdict,), _ = await rates.take([Asked(workspace_id, rate, 1, 1)])
    assert (verdict.returned, verdict.fresh) == (0, 0)
    assert 0.9e9 < verdict.wait_us(0) <= 1e9


@pytest.fixture
async def away() -> AsyncIterator[redis.asyncio.Redis]:
    """A Redis that does not answer."""
    async with connect_redis("redis://127.0.0.1:1") as nobody:
        yield nobody


@pytest.mark.parametrize(("percent", "wait_us"), [(100, 1_000_000), (50, 2_000_000)])
async def test_without_redis_a_process_keeps_its_part_of_the_rate(
    away: redis.asyncio.Redis, logged: list[EventDict], percent: int, wait_us: int
) -> None:
    rates = TickRates(away, LocalLines(percent, monotonic_us=lambda: 0))
    asked = Asked(uuid.uuid4(), Rate(Fraction(1), 3), 0, 5)

    (verdict,), is_away = await rates.take([asked])

    assert (verdict.fresh, verdict.wait_us(0), is_away) == (3, wait_us, True)
    assert [line["event"] for line in logged] == ["redis is away; going on without it", "tick rates are checked here"]


def test_of_too_many_lines_the_one_used_longest_ago_goes() -> None:
    lines, ids = LocalLines(most=2, monotonic_us=lambda: 0), [uuid.uuid4() for _ in range(3)]
    for index in (0, 1, 0, 2):
        lines.take(Asked(ids[index], Rate(Fraction(1), 1), 0, 1))
    assert [lines.take(Asked(ids[index], Rate(Fraction(1), 1), 0, 1)).fresh for index in (0, 2, 1)] == [0, 0, 1]
