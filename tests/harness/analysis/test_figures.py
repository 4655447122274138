from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.analysis import figures, tables
from harness.analysis.drawing import Drawing
from harness.analysis.slo import number
from harness.evaluation import Evaluation, load
from harness.sample import Outcome
from tests.harness.synthetic import Plan, Rows, change, write_sample_set

ALL: dict[str, Callable[[Evaluation], Drawing]] = {
    "percentiles": lambda one: figures.percentiles(one.data, one.slos),
    "latency_over_time": lambda one: figures.latency_over_time(one.data),
    "server_timing": lambda one: figures.server_timing(one.data),
    "resources": lambda one: figures.resources(one.data),
    "limits_used": lambda one: figures.limits_used(one.verdicts),
}


def fail_first(rows: Rows) -> None:
    for index, row in enumerate(rows.samples[:8]):
        if row.endpoint == "create":
            change(index, outcome=Outcome.TIMEOUT, status=None, error="no answer")(rows)


def forget_all(rows: Rows) -> None:
    rows.resources.clear()
    rows.samples[:] = [
        dataclasses.replace(
            row, server_db_ms=None, server_quota_ms=None, server_publish_ms=None, server_app_ms=None, status=503,
            outcome=Outcome.HTTP_ERROR,
        )
        for row in rows.samples
    ]  # fmt: skip


@pytest.fixture
def whole(tmp_path: Path) -> Evaluation:
    return load([write_sample_set(tmp_path, Plan(), [fail_first])])


@pytest.mark.parametrize("name", ALL)
def test_a_figure_is_the_same_twice_and_says_in_words_what_it_shows(whole: Evaluation, name: str) -> None:
    one, two = ALL[name](whole), ALL[name](whole)
    assert one == two
    assert len(one.alt) > 40
    assert f'alt="{one.alt}"' in one.markup
    assert one.svg.rstrip().endswith(b"</svg>")


@pytest.mark.parametrize("name", ALL)
def test_a_figure_of_a_load_that_failed_wholly_is_drawn_all_the_same(tmp_path: Path, name: str) -> None:
    assert ALL[name](load([write_sample_set(tmp_path, Plan(runs=4), [forget_all])])).alt


@pytest.mark.parametrize("name", ALL)
def test_a_figure_of_a_single_run_is_drawn(tmp_path: Path, name: str) -> None:
    assert ALL[name](load([write_sample_set(tmp_path, Plan(runs=1, children=0, polls=1))])).alt


def test_the_alt_text_has_the_numbers_of_the_table(whole: Evaluation) -> None:
    frame = tables.latency_frame(whole.data)
    spawn = frame[(frame["endpoint"] == "spawn") & (frame["q"] == 0.95)]["latency_ms"].iloc[0]
    assert f"p95 {number(spawn)} ms" in figures.percentiles(whole.data, whole.slos).alt.split("spawn")[1]


def test_failures_are_counted_in_the_picture_of_time(whole: Evaluation) -> None:
    failed = int((whole.data.samples["outcome"] == "timeout").sum())
    assert failed > 0
    assert f"create: {64 - failed} requests between" in figures.latency_over_time(whole.data).alt
    assert f"{failed} failures" in figures.latency_over_time(whole.data).alt
