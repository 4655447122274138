"""The workers' figures, as /metrics shows them."""

from __future__ import annotations

import datetime as dt
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from service.announce import Announcer, connect_redis
from service.doorbell import Doorbell
from service.tallies import Tallies, worker_figures

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def samples(exposition: bytes) -> dict[str, float]:
    """Parse the text format as Prometheus does; a bucket is named by its bound."""
    found: dict[str, float] = {}
    families: Any = text_string_to_metric_families(exposition.decode())
    for family in families:
        for sample in family.samples:
            found[sample.name + (f"[{sample.labels['le']}]" if sample.labels else "")] = sample.value
    return found


async def test_what_two_workers_count_is_one_sum(redis_url: str) -> None:
    client = connect_redis(redis_url)
    announcer = Announcer(client, Doorbell(redis_url))
    for wait_s in (0.002, 0.25):
        tallies = Tallies()
        tallies.observe_wait(wait_s)
        tallies.count_ticks(ticks=5, fenced=1, write_s=0.5)
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
    }
    buckets = {name: value for name, value in figures.items() if "bucket" in name}
    assert buckets["plimsoll_tick_wait_seconds_bucket[0.001]"] == 0
    assert buckets["plimsoll_tick_wait_seconds_bucket[0.0025]"] == 1
    assert buckets["plimsoll_tick_wait_seconds_bucket[0.2]"] == 1
    assert buckets["plimsoll_tick_wait_seconds_bucket[0.3]"] == 2
    assert buckets["plimsoll_tick_wait_seconds_bucket[+Inf]"] == 2
    await client.aclose()


async def test_before_the_first_tick_every_figure_is_nought(redis_url: str) -> None:
    client = connect_redis(redis_url)

    assert set(samples(await worker_figures(client)).values()) == {0.0}
    await client.aclose()


async def test_figures_that_redis_did_not_take_are_added_later(redis_url: str) -> None:
    away, client = connect_redis("redis://127.0.0.1:1"), connect_redis(redis_url)
    tallies = Tallies()
    tallies.count_ticks(ticks=3, fenced=0, write_s=0.5)

    with capture_logs() as logged:
        await Announcer(away, Doorbell(redis_url)).announce([], NOW, due=False, tallies=tallies)
    tallies.count_ticks(ticks=4, fenced=0, write_s=0.5)
    await Announcer(client, Doorbell(redis_url)).announce([], NOW, due=False, tallies=tallies)

    assert [line["log_level"] for line in logged] == ["warning"]
    assert samples(await worker_figures(client))["plimsoll_ticks_total"] == 7
    await away.aclose()
    await client.aclose()


async def test_without_redis_there_are_no_figures() -> None:
    away = connect_redis("redis://127.0.0.1:1")

    assert await worker_figures(away) == b""
    await away.aclose()
