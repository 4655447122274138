"""One injected fault each: found by name, and nothing is judged."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from harness.analysis.validity import Fault, Finding
from harness.errors import ExitCode
from harness.evaluation import load
from harness.sample import Mode, Outcome
from tests.harness.synthetic import ORIGIN_NS, WALL_NS, Plan, Rows, Spoil, change, write_sample_set


def lose(count: int) -> Spoil:
    def spoil(rows: Rows) -> None:
        del rows.samples[-count:]

    return spoil


def repeat_first(rows: Rows) -> None:
    rows.samples.append(rows.samples[0])


def swap_last_for_first(rows: Rows) -> None:
    rows.samples[-1] = rows.samples[0]


def forget_run(rows: Rows) -> None:
    del rows.runs[0]


def repeat_run(rows: Rows) -> None:
    rows.runs.append(rows.runs[0])


def send_late(late_ms: float, share: float) -> Spoil:
    """Return a spoil that sends a share of the requests that much too late."""

    def spoil(rows: Rows) -> None:
        for index, row in enumerate(rows.samples[: int(share * len(rows.samples))]):
            shift = int(late_ms * 1e6)
            assert row.intended_at_ns is not None
            assert row.latency_ms is not None
            rows.samples[index] = dataclasses.replace(
                row, intended_at_ns=row.intended_at_ns - shift, latency_ms=row.latency_ms + late_ms
            )

    return spoil


def stall(rows: Rows) -> None:
    rows.resources[0] = dataclasses.replace(rows.resources[0], generator_lag_ms=400.0)


def clock(wall_step_s: float) -> dict[str, Any]:
    start = {"monotonic_ns": ORIGIN_NS, "wall_ns": WALL_NS}
    end = {"monotonic_ns": ORIGIN_NS + 2_000_000_000, "wall_ns": WALL_NS + int((2.0 + wall_step_s) * 1e9)}
    return {"clock": {"start": start, "end": end}}


@pytest.mark.parametrize(
    ("spoil", "manifest", "fault", "rows"),
    [
        # the harness was killed
        ([], {"complete": False}, Fault.INCOMPLETE, 0),
        # three planned requests have no row
        ([lose(3)], {}, Fault.LOST_ROWS, 3),
        # a create whose run nobody recorded
        ([forget_run], {}, Fault.LOST_ROWS, 1),
        # one request twice
        ([repeat_first], {}, Fault.DUPLICATE_ROWS, 1),
        # one request twice and another lost: the count alone would not tell
        ([swap_last_for_first], {}, Fault.DUPLICATE_ROWS, 1),
        ([repeat_run], {}, Fault.DUPLICATE_ROWS, 1),
        # a row of another load
        ([change(0, mode=Mode.SOAK)], {}, Fault.MIXED_MEASUREMENTS, 1),
        # someone set the wall clock
        ([], clock(wall_step_s=3.0), Fault.CLOCK_STEP, 0),
        ([], clock(wall_step_s=-0.5), Fault.CLOCK_STEP, 0),
        # rows long before the measurement began
        ([change(0, intended_at_ns=ORIGIN_NS - 10**10, sent_at_ns=None, latency_ms=None, outcome=Outcome.TIMEOUT,
                 status=None, service_ms=None)], {}, Fault.CLOCK_SKEW, 1),
        # an answer before the question
        ([change(0, sent_at_ns=ORIGIN_NS + 900_000_000, service_ms=None, outcome=Outcome.TIMEOUT, status=None)], {},
         Fault.CLOCK_ORDER, 1),
        # sent before it was due
        ([change(0, intended_at_ns=ORIGIN_NS + 55_000_000, latency_ms=None, outcome=Outcome.TIMEOUT, status=None)], {},
         Fault.CLOCK_ORDER, 1),
        # a latency that its instants do not give
        ([change(0, latency_ms=1.0)], {}, Fault.LATENCY_MISMATCH, 1),
        # an ok without its latency
        ([change(0, service_ms=None)], {}, Fault.LATENCY_MISMATCH, 1),
        # an ok with an error's status
        ([change(0, status=500)], {}, Fault.OUTCOME_MISMATCH, 1),
        # an error with a good status
        ([change(0, outcome=Outcome.HTTP_ERROR)], {}, Fault.OUTCOME_MISMATCH, 1),
        # a refused connection that answered
        ([change(0, outcome=Outcome.REFUSED)], {}, Fault.OUTCOME_MISMATCH, 1),
        # a request that was never sent, and yet was
        ([change(0, outcome=Outcome.NOT_SENT, status=None)], {}, Fault.OUTCOME_MISMATCH, 1),
        # a tenth of the requests left 0.3 s late
        ([send_late(300.0, 0.10)], {}, Fault.GENERATOR_LATE, 25),
    ],
)  # fmt: skip
def test_each_fault_is_found_by_name(
    tmp_path: Path, spoil: list[Spoil], manifest: dict[str, Any], fault: Fault, rows: int
) -> None:
    found = load([write_sample_set(tmp_path, Plan(), spoil, manifest)])
    assert (fault, rows) in {(finding.fault, finding.rows) for finding in found.findings}
    assert (found.verdicts, found.exit_code) == ((), ExitCode.INVALID)


def test_a_whole_measurement_has_no_fault(tmp_path: Path) -> None:
    assert load([write_sample_set(tmp_path)]).findings == ()


@pytest.mark.parametrize("seed", range(5))
def test_whole_bursts_have_no_fault(tmp_path: Path, seed: int) -> None:
    plan = Plan(mode=Mode.BURST, runs=40, side_by_side=10, children=2, seed=seed)
    assert load([write_sample_set(tmp_path, plan)]).findings == ()


def test_an_incomplete_set_is_judged_when_asked(tmp_path: Path) -> None:
    path = write_sample_set(tmp_path, Plan(), [lose(3)], {"complete": False})
    found = load([path], partial=True)
    assert (found.findings, found.exit_code) == ((), ExitCode.PASSED)


def test_one_measurement_given_twice_is_not_two(tmp_path: Path) -> None:
    path = write_sample_set(tmp_path)
    assert Finding(
        Fault.DUPLICATE_ROWS, "0190-synthetic-1", "The same measurement was given twice.", 0
    ) in load([path, path]).findings  # fmt: skip


def test_sets_of_different_commits_are_no_repetitions(tmp_path: Path) -> None:
    one = write_sample_set(tmp_path, Plan(measurement_id="one", commit="aaa"))
    two = write_sample_set(tmp_path, Plan(measurement_id="two", commit="bbb"))
    assert load([one, two]).findings == (
        Finding(
            Fault.MIXED_MEASUREMENTS, "two",
            "These are no repetitions of one smoke measurement, judge them apart: one on commit aaa, quota revision 1; "
            "two on commit bbb, quota revision 1.", 0,
        ),
    )  # fmt: skip


def test_an_open_loop_generator_may_be_late_less_often(tmp_path: Path) -> None:
    late = [send_late(80.0, 0.02)]
    closed = write_sample_set(tmp_path, Plan(measurement_id="closed"), late)
    opened = write_sample_set(tmp_path, Plan(mode=Mode.OPEN, measurement_id="open"), late)
    assert load([closed]).findings == ()
    assert [finding.fault for finding in load([opened]).findings] == [Fault.GENERATOR_LATE]


def test_a_stall_of_an_open_loop_generator_is_found(tmp_path: Path) -> None:
    path = write_sample_set(tmp_path, Plan(mode=Mode.OPEN), [stall])
    assert [(finding.fault, finding.rows) for finding in load([path]).findings] == [(Fault.GENERATOR_LATE, 1)]
