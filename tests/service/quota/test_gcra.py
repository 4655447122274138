"""gcra.lua against the exact reference, instant by instant, on a real Redis.

The script that is tested is the one in the service but for one line: where it reads the server's clock, the test gives
the instant. Its buckets are kept from expiring, since expiry runs on the real clock; when they expire is tested apart.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

import service.quota
from service.embedded import Stack
from service.quota.limits import MOST, Limit, Rate
from service.quota.local import LocalBuckets
from service.quota.rates import whole_seconds
from tests.service.quota.exact import US, ExactLimiter, excess

SCRIPT = (Path(service.quota.__file__).parent / "gcra.lua").read_text()
CLOCK = "local time = redis.call('TIME')\n"
TIMED = SCRIPT.replace(CLOCK, "local time = {ARGV[#ARGV - 1], ARGV[#ARGV]}\n")

START_US = 1_800_000_000_000_000

THOUSANDTHS = st.one_of(
    st.sampled_from([10_290, 2_140, 18_490, 41_000, 1, MOST * 1000]),
    st.integers(1, 200_000),
)
BURSTS = st.one_of(st.integers(1, 50), st.just(MOST))
GAPS_US = st.one_of(st.integers(0, 200_000), st.integers(0, 3_000_000), st.just(86_400_000_000))

Answer = list[list[int]]
"""For each rate: whole tokens left, microseconds until one more fits, 1 if it refused."""


class Timed:
    """The script under a clock of the test's own, with buckets that nobody else has."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._script = client.register_script(TIMED)
        self._prefix = uuid.uuid4().hex

    def take(self, now_us: int, wanted: list[tuple[str, int, int]]) -> Answer:
        """Ask for one token of each (bucket, thousandths, burst) at an instant."""
        keys = [f"{{{self._prefix}}}:{name}" for name, _, _ in wanted]
        terms = [n for _, thousandths, burst in wanted for n in (thousandths, burst)]
        with self._client.pipeline(transaction=True) as pipe:  # in which no time passes for a bucket's expiry
            self._script(keys, [*terms, now_us // 1_000_000, now_us % 1_000_000], client=pipe)
            for key in keys:
                pipe.persist(key)
            answer: Answer = pipe.execute()[0]
        return answer


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(stack.redis_url) as opened:
        yield opened


def fractions(wanted: list[tuple[str, int, int]]) -> list[tuple[str, Fraction, int]]:
    """Return rates as the reference takes them."""
    return [(name, Fraction(thousandths, 1000), burst) for name, thousandths, burst in wanted]


def test_the_script_under_test_differs_from_the_services_in_the_line_that_reads_the_clock() -> None:
    theirs, ours = SCRIPT.splitlines(), TIMED.splitlines()
    assert [line for line, other in zip(theirs, ours, strict=True) if line != other] == [CLOCK.rstrip("\n")]


@given(thousandths=THOUSANDTHS, burst=BURSTS, gaps_us=st.lists(GAPS_US, min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_every_decision_and_every_wait_is_the_references(
    client: redis.Redis, thousandths: int, burst: int, gaps_us: list[int]
) -> None:
    timed, reference, now_us, wanted = Timed(client), ExactLimiter(), START_US, [("a", thousandths, burst)]
    for gap_us in gaps_us:
        now_us += gap_us
        ((_, wait_us, refused),) = timed.take(now_us, wanted)
        (wait_s,) = reference.take(now_us, fractions(wanted))
        assert refused == (wait_s > 0)
        if refused:
            assert wait_us * US >= wait_s > (wait_us - 1) * US


CHANGING = st.lists(
    st.tuples(
        st.one_of(GAPS_US, st.integers(-2_000_000, 0)),  # the server's clock may step back
        st.lists(
            st.tuples(st.sampled_from("abc"), st.sampled_from([1_000, 2_140, 10_290, 50_000]), st.integers(1, 12)),
            min_size=1,
            max_size=3,
            unique_by=lambda each: each[0],
        ),
    ),
    min_size=1,
    max_size=40,
)


@given(requests=CHANGING)
@settings(max_examples=50, deadline=None)
def test_several_rates_at_once_that_change_under_a_clock_that_steps_are_taken_all_or_none(
    client: redis.Redis, requests: list[tuple[int, list[tuple[str, int, int]]]]
) -> None:
    timed, reference, now_us = Timed(client), ExactLimiter(), START_US
    for gap_us, wanted in requests:
        now_us += gap_us
        answers = timed.take(now_us, wanted)
        waits_s = reference.take(now_us, fractions(wanted))
        assert [refused for _, _, refused in answers] == [int(wait_s > 0) for wait_s in waits_s]


@given(requests=CHANGING)
@settings(max_examples=200, deadline=None)
def test_the_buckets_of_a_process_decide_as_the_reference_does(
    requests: list[tuple[int, list[tuple[str, int, int]]]],
) -> None:
    names = {"a": Limit.RUN_CREATION, "b": Limit.SUBRUN_SPAWN, "c": Limit.SNAPSHOT_POLL}
    now_us, reference, workspace_id = START_US, ExactLimiter(), uuid.uuid4()
    buckets = LocalBuckets(monotonic_us=lambda: now_us)
    for gap_us, wanted in requests:
        now_us += abs(gap_us)  # a monotonic clock
        states = buckets.take(
            workspace_id, [(names[name], Rate(per_s, burst)) for name, per_s, burst in fractions(wanted)]
        )
        waits_s = reference.take(now_us, fractions(wanted))
        assert [state.refused for state in states] == [int(wait_s > 0) for wait_s in waits_s]
        for state, wait_s in zip(states, waits_s, strict=True):
            if state.refused:
                assert state.wait_us * US >= wait_s > (state.wait_us - 1) * US


@given(thousandths=THOUSANDTHS, burst=st.integers(1, 50), gaps_us=st.lists(GAPS_US, min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_no_window_of_any_length_admits_more_than_burst_and_rate_allow(
    client: redis.Redis, thousandths: int, burst: int, gaps_us: list[int]
) -> None:
    timed, now_us, admitted_us = Timed(client), START_US, []
    for gap_us in gaps_us:
        now_us += gap_us
        ((_, _, refused),) = timed.take(now_us, [("a", thousandths, burst)])
        if not refused:
            admitted_us.append(now_us)
    assert excess(admitted_us, Fraction(thousandths, 1000), burst) <= 0


@given(
    thousandths=st.sampled_from([10_290, 2_140, 18_490, 41_000, 333]),
    burst=st.integers(2, 20),
    lateness=st.lists(st.floats(0, 1), min_size=2, max_size=60),
)
@settings(max_examples=50, deadline=None)
def test_a_client_at_exactly_its_rate_is_never_refused_while_it_is_late_by_less_than_the_burst_makes_up_for(
    client: redis.Redis, thousandths: int, burst: int, lateness: list[float]
) -> None:
    timed, interval_us = Timed(client), Fraction(10**9, thousandths)
    most_late_us = int((burst - 1) * interval_us) - 1
    arrivals_us = [
        START_US - (-number * interval_us).__floor__() + int(late * most_late_us)
        for number, late in enumerate(lateness)
    ]
    refused = [timed.take(at_us, [("a", thousandths, burst)])[0][2] for at_us in sorted(arrivals_us)]
    assert refused == [0] * len(lateness)


@given(thousandths=THOUSANDTHS, burst=st.integers(1, 20), slew=st.integers(-500, 500))
@settings(max_examples=50, deadline=None)
def test_the_first_retry_after_retry_after_succeeds_by_a_clock_that_is_slewed(
    client: redis.Redis, thousandths: int, burst: int, slew: int
) -> None:
    timed, wanted = Timed(client), [("a", thousandths, burst)]
    wait_us = 0
    for _ in range(burst + 1):
        ((_, wait_us, refused),) = timed.take(START_US, wanted)
    assert refused == 1
    waited_us = whole_seconds(wait_us) * 1_000_000  # by the caller's clock
    ((_, _, refused),) = timed.take(START_US + waited_us * 1_000_000 // (1_000_000 + slew), wanted)
    assert refused == 0


def test_a_wait_is_rounded_up_to_a_second_that_surely_suffices() -> None:
    assert [whole_seconds(us) for us in (0, 1, 997_000, 999_500, 1_000_000, 1_500_000, 60_000_000)] == [
        0, 1, 1, 2, 2, 2, 61
    ]  # fmt: skip


def test_each_side_of_a_change_holds_its_own_rate(client: redis.Redis) -> None:
    """A greedy client asks every 10 ms for 20 s under each of three rates, the change being known to nobody."""
    timed, now_us = Timed(client), START_US
    for thousandths, burst in ((10_290, 11), (50_000, 5), (500, 3)):
        admitted_us = []
        started_us = now_us
        for _ in range(2_000):
            now_us += 10_000
            if not timed.take(now_us, [("a", thousandths, burst)])[0][2]:
                admitted_us.append(now_us)
        per_s = Fraction(thousandths, 1000)
        assert excess(admitted_us, per_s, burst) <= 0
        fills = per_s * (now_us - started_us) * US
        assert int(fills) - 1 <= len(admitted_us) <= int(fills + burst)


def test_a_smaller_burst_is_not_paid_off_with_the_debt_of_a_larger_one(client: redis.Redis) -> None:
    timed = Timed(client)
    for _ in range(100):
        timed.take(START_US, [("a", 100_000, 100)])
    ((_, wait_us, refused),) = timed.take(START_US, [("a", 1_000, 1)])
    assert (wait_us, refused) == (1_000_000, 1)
    assert timed.take(START_US + 1_000_000, [("a", 1_000, 1)])[0][2] == 0


def test_a_change_is_settled_also_by_a_request_that_is_refused(client: redis.Redis) -> None:
    timed = Timed(client)
    fast, slow = [("a", 100_000, 10)], [("a", 1_000, 10)]
    for _ in range(10):
        timed.take(START_US, fast)
    assert timed.take(START_US, slow)[0][2] == 1
    # From here on it drains at the slow rate: after 0.1 s there would be room at the fast one.
    assert timed.take(START_US + 100_000, slow)[0] == [0, 900_000, 1]


def test_after_a_clock_stepped_back_a_full_bucket_drains_by_the_new_time(client: redis.Redis) -> None:
    timed, one_per_s = Timed(client), [("a", 1_000, 1)]
    at_s = (1_800_003_600, 1_800_000_000, 1_800_000_000.5, 1_800_000_001)
    assert [timed.take(int(each * 1_000_000), one_per_s)[0][2] for each in at_s] == [0, 1, 1, 0]


EXPIRES = """
    local found = redis.call('HMGET', KEYS[1], 'level', 'at')
    local before, left, after = redis.call('TIME'), redis.call('PTTL', KEYS[1]), redis.call('TIME')
    local now, again = before[1] * 1000 + math.floor(before[2] / 1000), after[1] * 1000 + math.floor(after[2] / 1000)
    return {found[1], found[2], left, string.format('%.0f', now + left), now == again and 1 or 0}
"""
"""A bucket's level and instant, the milliseconds that it has left, when it expires, and whether that is exact."""


@pytest.mark.parametrize(("thousandths", "burst"), [(10_290, 11), (1, 1), (MOST * 1000, 1), (500, 2), (333, 3)])
def test_a_bucket_expires_when_it_is_drained_not_before_and_not_much_later(
    client: redis.Redis, thousandths: int, burst: int
) -> None:
    script, expires, key = client.register_script(SCRIPT), client.register_script(EXPIRES), uuid.uuid4().hex
    for _ in range(burst):
        ((_, _, refused),) = script([key], [thousandths, burst])
        assert refused == 0
        exact = 0
        while not exact:  # the millisecond changed between two readings of the clock
            found: Any = expires([key])
            level, at_us, left_ms, expires_at_ms, exact = found
        if left_ms < 0:
            continue  # a bucket of a microsecond
        drained_at_us = int(at_us) + Fraction(int(level), thousandths)
        assert drained_at_us <= int(expires_at_ms) * 1_000 <= drained_at_us + 3_000
