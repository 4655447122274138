"""What is read of the service's metrics and of this machine."""

import asyncio
import dataclasses
import os
from pathlib import Path

import pytest

from harness.api import Api
from harness.client import Client
from harness.resources import Resources, gauge, increase, mean_ms, read_metrics
from harness.selfwatch import Strain
from tests.harness.fake_service import always, http, serving

UNSTRAINED = Strain(lag_ms=None, gc_ms=None, wait_percent=None, cpu_s=0.0)
TEXT = """\
# HELP plimsoll_queue_depth Due runs.
# TYPE plimsoll_queue_depth gauge
plimsoll_queue_depth 3.0
# TYPE plimsoll_db_write_seconds histogram
plimsoll_db_write_seconds_bucket{writer="commits",le="0.1"} 7.0
plimsoll_db_write_seconds_count{writer="commits"} 10.0
plimsoll_db_write_seconds_sum{writer="commits"} 0.5
plimsoll_db_write_seconds_count{writer="tick"} 30.0
plimsoll_db_write_seconds_sum{writer="tick"} 1.5
plimsoll_ticks_total 40.0
plimsoll_ticks_created 1.7e9
process_cpu_seconds_total 12.0
"""


def test_only_what_is_recorded_is_read_with_a_value_for_each_label_set() -> None:
    assert read_metrics(TEXT) == {
        "plimsoll_queue_depth": [3.0],
        "plimsoll_db_write_seconds_count": [10.0, 30.0],
        "plimsoll_db_write_seconds_sum": [0.5, 1.5],
        "plimsoll_ticks_total": [40.0],
    }


@pytest.mark.parametrize("text", ["", "<html>", "plimsoll_queue_depth three\n", "plimsoll_queue_depth{ 3\n"])
def test_text_that_tells_nothing_readable_is_no_metric(text: str) -> None:
    assert read_metrics(text) == {}


def test_rates_need_two_looks_and_a_counter_that_did_not_begin_anew() -> None:
    before = {"ticks": [10.0], "w_sum": [1.0, 1.0], "w_count": [10.0, 10.0]}
    now = {"ticks": [4.0, 9.0], "w_sum": [1.5, 1.5], "w_count": [15.0, 25.0]}
    assert increase(before, now, "ticks") == 3.0
    assert mean_ms(before, now, "w") == pytest.approx(50.0)
    assert increase(now, before, "ticks") is None  # it fell: another process
    assert increase({}, now, "ticks") is None  # there was no look before
    assert increase({"w_sum": [1.0]}, now, "ticks") == 13.0  # it has counted for the first time
    assert increase(before, now, "absent") is None
    assert mean_ms(now, now, "w") is None  # nothing was written in between
    both = {**now, "t_sum": [9.0], "t_count": [180.0]}
    assert mean_ms({**before, "t_sum": [0.0], "t_count": [0.0]}, both, "w", "t", "absent") == pytest.approx(50.0)
    assert gauge(now, "ticks", max) == 9.0
    assert gauge(now, "absent") is None


async def test_a_look_tells_what_is_known_and_leaves_the_rest_null() -> None:
    async with serving(always(http(200, TEXT.encode()))) as url:
        client = Client(url)
        resources = Resources(Api(client, "token"), lambda: {os.getpid()})
        first = await resources.look(UNSTRAINED)
        second = await resources.look(dataclasses.replace(UNSTRAINED, lag_ms=0.5))
        await client.close()
    assert (first.service_cpu_percent, first.ticks_per_s, first.generator_lag_ms) == (None, None, None)
    assert (second.ticks_per_s, second.queue_depth, second.generator_lag_ms) == (0.0, 3.0, 0.5)
    assert (second.oldest_due_tick_s, second.redis_publish_lag_ms, second.db_write_ms) == (None, None, None)
    assert second.service_rss_bytes is not None
    assert second.service_rss_bytes > 1_000_000
    assert second.service_cpu_percent is not None
    assert second.at_ns > first.at_ns


async def test_a_service_without_metrics_costs_their_columns_only() -> None:
    async def hangs(asked: object, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async with serving(hangs) as url:
        client = Client(url, timeout_s=0.05)
        row = await Resources(Api(client, "token"), set).look(UNSTRAINED)
        await client.close()
    assert (row.queue_depth, row.ticks_per_s, row.service_rss_bytes) == (None, None, None)
    assert row.load1 is not None


async def test_a_process_that_has_ended_is_left_out(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec("true")
    await process.wait()
    async with serving(always(http(404, {}))) as url:
        client = Client(url)
        row = await Resources(Api(client, "token"), lambda: {process.pid}).look(UNSTRAINED)
        await client.close()
    assert (row.service_rss_bytes, row.service_cpu_percent) == (None, None)
