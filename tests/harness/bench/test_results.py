"""Figures, ratios, aims and the page: pure."""

from __future__ import annotations

import numpy as np
import pytest

from harness.bench.results import (
    Aim,
    Bench,
    Figure,
    Repeat,
    Spread,
    aim_at_least,
    aim_at_most,
    figure,
    page,
    ratio,
    repeat_of,
    spread,
)


def nanoseconds(*milliseconds: float) -> bytes:
    return np.array([round(one * 1e6) for one in milliseconds], np.int64).tobytes()


def rates(name: str, *rates_per_s: float, floor: bool = False) -> Figure:
    repeats = [Repeat(rate_per_s=rate, count=int(rate), seconds=1.0) for rate in rates_per_s]
    return figure(name, 32, "requests/s", repeats, floor=floor)


def test_a_load_is_summed_up_by_observed_latencies() -> None:
    assert repeat_of(nanoseconds(*range(1, 101)), 2.0) == Repeat(
        rate_per_s=50.0, count=100, seconds=2.0, latency_ms_p50=50.0, latency_ms_p95=95.0, latency_ms_p99=99.0
    )


def test_a_load_without_an_answer_has_no_latencies() -> None:
    assert repeat_of(b"", 2.0) == Repeat(rate_per_s=0.0, count=0, seconds=2.0)


def test_repeats_are_summed_up_by_median_least_and_greatest() -> None:
    assert spread([5.0, 1.0, 9.0]) == Spread(5.0, 1.0, 9.0)


def test_a_figure_keeps_every_repeat() -> None:
    repeats = [repeat_of(nanoseconds(1), 1.0), repeat_of(nanoseconds(3, 3), 1.0)]
    assert figure("create", 32, "requests/s", repeats, floor=False) == Figure(
        name="create",
        connections=32,
        unit="requests/s",
        floor=False,
        rate_per_s=Spread(1.5, 1.0, 2.0),
        latency_ms_p50=Spread(2.0, 1.0, 3.0),
        latency_ms_p95=Spread(2.0, 1.0, 3.0),
        latency_ms_p99=Spread(2.0, 1.0, 3.0),
        repeats=repeats,
    )


def test_a_ratio_is_taken_within_each_repeat_so_that_a_slower_machine_does_not_bend_it() -> None:
    compared = ratio(rates("create", 500, 50), rates("bare POST", 1000, 100, floor=True))
    assert (compared.ratio, compared.repeats) == (Spread(0.5, 0.5, 0.5), [0.5, 0.5])


def test_a_floor_that_did_nothing_gives_no_ratio_above_zero() -> None:
    assert ratio(rates("create", 500), rates("bare POST", 0)).repeats == [0.0]


@pytest.mark.parametrize(
    ("aim", "reached"),
    [
        (aim_at_least("at the bound", 0.3, 0.3), True),
        (aim_at_least("below it", 0.29, 0.3), False),
        (aim_at_most("at the bound", 40.0, 40.0), True),
        (aim_at_most("above it", 41.0, 40.0), False),
        (aim_at_least("not measured", None, 0.3), None),
        (aim_at_most("not measured", None, 40.0), None),
    ],
    ids=lambda value: value.aim if isinstance(value, Aim) else "",
)
def test_an_aim_is_reached_at_its_bound(aim: Aim, reached: bool | None) -> None:
    assert aim.reached is reached


def test_the_page_shows_every_figure_ratio_and_aim_in_tables_that_line_up() -> None:
    create, floor = rates("create", 2000, 1000, 3000), rates("bare POST", 4000, 4000, 4000, floor=True)
    bench = Bench(
        bench_id="20260101T000000Z-0000",
        started_at="2026-01-01T00:00:00+00:00",
        ended_at="2026-01-01T00:01:00+00:00",
        commit="abc",
        versions={"python": "3.11"},
        machine={"cpu": "a processor", "cpu_count": 2},
        load_average_before=(0.5, 0.4, 0.3),
        load_average_after=(1.5, 0.4, 0.3),
        parameters={"repeats": 3, "only": ["create"]},
        figures=[floor, create],
        ratios=[ratio(create, floor)],
        aims=[aim_at_least("create at least 0.3", 0.5, 0.3), aim_at_least("ticks", None, 1.0)],
    )
    assert page(bench).splitlines() == [
        "# Bench 20260101T000000Z-0000",
        "",
        "Commit abc; a processor, 2 cores; load average 0.50 before and 1.50 after.",
        "Parameters: repeats 3, only create. Each cell is the median of the repeats [their least to their greatest].",
        "",
        "| figure            | connections |                        per second | p50 ms | p95 ms | p99 ms |",
        "|-------------------|------------:|----------------------------------:|-------:|-------:|-------:|",
        "| bare POST (floor) |          32 | 4,000 [4,000 to 4,000] requests/s |      - |      - |      - |",
        "| create            |          32 | 2,000 [1,000 to 3,000] requests/s |      - |      - |      - |",
        "",
        "| path   |    beside | connections |               ratio |",
        "|--------|----------:|------------:|--------------------:|",
        "| create | bare POST |          32 | 0.50 [0.25 to 0.75] |",
        "",
        "| aim                 | found |              |",
        "|---------------------|------:|-------------:|",
        "| create at least 0.3 |  0.50 |      reached |",
        "| ticks               |     - | not measured |",
    ]
