from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.analysis.slo import Status, Verdict
from harness.analysis.throughput import busy_spans
from harness.evaluation import load
from tests.harness.synthetic import Plan, Rows, Spoil, write_sample_set

SECOND = 1_000_000_000


def runs_of(*spans: tuple[float, float]) -> pd.DataFrame:
    """Return a frame of runs, each from a start to an end in seconds, of two ticks."""
    columns = {
        "measurement_id": "m", "trial": 0, "root_key": [f"r{n}" for n in range(len(spans))],
        "created_at_ns": pd.array([int(start * SECOND) for start, _ in spans], dtype="Int64"),
        "server_completion_ms": pd.array([(end - start) * 1e3 for start, end in spans], dtype="Float64"),
        "first_finished_at_ns": pd.array([None] * len(spans), dtype="Int64"),
        "last_unfinished_at_ns": pd.array([None] * len(spans), dtype="Int64"),
        "ticks": pd.array([2] * len(spans), dtype="Int64"),
    }  # fmt: skip
    return pd.DataFrame(columns)


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        # alone, a run has its whole time
        ([(0.0, 4.0)], [4.0]),
        # side by side, two runs share it
        ([(0.0, 4.0), (0.0, 4.0)], [2.0, 2.0]),
        # 0..2 alone, 2..4 shared, 4..6 alone
        ([(0.0, 4.0), (2.0, 6.0)], [3.0, 3.0]),
        # idle time in between belongs to nobody
        ([(0.0, 1.0), (5.0, 7.0)], [1.0, 2.0]),
    ],
)
def test_busy_time_is_shared_by_the_runs_unfinished_then(
    spans: list[tuple[float, float]], expected: list[float]
) -> None:
    assert list(busy_spans(runs_of(*spans))["busy_s"]) == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), min_size=1, max_size=30))
def test_the_shares_add_up_to_the_time_with_an_unfinished_run(spans: list[tuple[int, int]]) -> None:
    ends = [(float(start), float(start + length)) for start, length in spans]
    busy = np.zeros(71, dtype=bool)
    for start, length in spans:
        busy[start : start + length] = True
    assert busy_spans(runs_of(*ends))["busy_s"].sum() == pytest.approx(busy.sum())


def throughput(path: Path, plan: Plan, *spoil: Spoil) -> Verdict:
    evaluation = load([write_sample_set(path, plan, spoil)])
    return next(one for one in evaluation.verdicts if one.name == "tick-throughput")


def due(depth: float | None) -> Spoil:
    """Return a spoil that says so many ticks were due in every second; null says nothing."""

    def spoil(rows: Rows) -> None:
        rows.resources[:] = [
            dataclasses.replace(row, queue_depth=depth, oldest_due_tick_s=None) for row in rows.resources
        ]

    return spoil


def forget(**fields: object) -> Spoil:
    def spoil(rows: Rows) -> None:
        change: Callable[..., object] = dataclasses.replace
        rows.runs[:] = [change(row, **fields) for row in rows.runs]  # type: ignore[misc]

    return spoil


SLOW = Plan(runs=10, side_by_side=1, completion_ms=4000.0)


def test_many_ticks_per_busy_second_pass(tmp_path: Path) -> None:
    assert throughput(tmp_path, Plan()).verdict is Status.PASS


def test_few_ticks_while_ticks_were_due_fail(tmp_path: Path) -> None:
    found = throughput(tmp_path, SLOW, due(3.0))
    assert found.verdict is Status.FAIL
    assert "A tick was due in 100 % of" in found.reason


def test_few_ticks_while_none_was_due_are_the_runs_own_waiting(tmp_path: Path) -> None:
    found = throughput(tmp_path, SLOW, due(0.0))
    assert found.verdict is Status.INCONCLUSIVE
    assert found.reason.endswith("so runs were mostly waiting for something else.")


def test_few_ticks_prove_nothing_where_no_record_says_whether_any_was_due(tmp_path: Path) -> None:
    found = throughput(tmp_path, SLOW, due(None))
    assert found.verdict is Status.INCONCLUSIVE
    assert found.reason.endswith("no record says whether a tick was due.")


def test_runs_that_do_not_tell_their_ticks_leave_the_question_open(tmp_path: Path) -> None:
    found = throughput(tmp_path, Plan(runs=5), forget(ticks=None))
    assert (found.verdict, found.sample_size) == (Status.INCONCLUSIVE, 0)


def test_without_the_services_clock_the_last_sight_of_a_run_ends_its_time(tmp_path: Path) -> None:
    found = throughput(tmp_path, Plan(), forget(server_completion_ms=None))
    assert (found.verdict, found.sample_size) == (Status.PASS, 64)
