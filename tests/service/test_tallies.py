"""The workers' figures, as /metrics shows them."""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis.asyncio
from prometheus_client.parser import text_string_to_metric_families
from structlog.typing import EventDict

from service.announce import Announcer
from service.doorbell import Doorbell
from service.guarded import connect_redis
from service.tallies import Tallies, worker_figures

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def samples(exposition: bytes) -> dict[str, float]:
    """Parse the text format as Prometheus does; a bucket is named by its bound."""
    found: dict[str, float] = {}
    families: Any = text_string_to_metric_families(exposition.decode())
    for family in families:
        for sample in family.samples:
            found[sample.name + "".join(f"[{value}]" for value in sample.labels.values())] = sample.value
    return found


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    """The test's own Redis."""
    async with connect_redis(redis_url) as connected:
        yield connected


@pytest.fixture
async def away() -> AsyncIterator[redis.asyncio.Redis]:
    """A Redis that does not answer."""
    async with connect_redis("redis://127.0.0.1:1") as nobody:
        yield nobody


async def test_what_two_workers_count_is_one_sum(client: redis.asyncio.Redis, redis_url: str) -> None:
    announcer = Announcer(client, Doorbell(redis_url))
    for wait_s in (0.002, 0.25):
        tallies = Tallies()
        tallies.observe_wait(wait_s)
        tallies.count_ticks(ticks=5, fenced=1, write_s=0.5)
        tallies.count_delayed("w", 3)
        tallies.count_local_turns(admitted=2, delayed=1)
        await announcer.announce([], NOW, due=False, tallies=tallies)
        assert tallies.take() == {}

    figures = samples(await worker_figures(client))

    assert {name: value for name, value in figures.items() if "bucket" not in name} == {
        "plimsoll_ticks_total": 10,
        "plimsoll_ticks_fenced_total": 2,
        "plimsoll_tick_write_seconds_sum": 1.0,
        "plimsoll_tick_write_seconds_count": 2,
        "plimsoll_tick_wait_seconds_sum": 0.252,
        "plimsoll_tick_wait_seconds_count": 2,
        "plimsoll_ticks_delayed_total[w]": 6,
        "plimsoll_ticks_local_total[admitted]": 4,
        "plimsoll_ticks_local_total[delayed]": 2,
    }
    claimed = [figures[f"plimsoll_tick_wait_seconds_bucket[{le}]"] for le in ("0.001", "0.0025", "0.2", "0.3", "+Inf")]
    assert claimed == [0, 1, 1, 2, 2]


async def test_before_the_first_tick_every_figure_is_nought(client: redis.asyncio.Redis) -> None:
    assert set(samples(await worker_figures(client)).values()) == {0.0}


async def test_figures_that_redis_did_not_take_are_added_later(
    client: redis.asyncio.Redis, away: redis.asyncio.Redis, redis_url: str, logged: list[EventDict]
) -> None:
    tallies = Tallies()
    tallies.count_ticks(ticks=3, fenced=0, write_s=0.5)

    await Announcer(away, Doorbell(redis_url)).announce([], NOW, due=False, tallies=tallies)
    tallies.count_ticks(ticks=4, fenced=0, write_s=0.5)
    await Announcer(client, Doorbell(redis_url)).announce([], NOW, due=False, tallies=tallies)

    assert [(line["log_level"], line["event"]) for line in logged] == [
        ("warning", "redis is away; going on without it"),
        ("warning", "announcement lost; the sweeper will find what is due"),
    ]
    assert samples(await worker_figures(client))["plimsoll_ticks_total"] == 7


async def test_without_redis_there_are_no_figures(away: redis.asyncio.Redis) -> None:
    assert await worker_figures(away) == b""
