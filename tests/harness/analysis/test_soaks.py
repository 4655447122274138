"""Soaks judged: the SLO's verdict, the notebook's words and its picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from harness.analysis import drift_shown
from harness.analysis.drawing import Drawing
from harness.analysis.slo import Status, Verdict
from harness.evaluation import Evaluation, load
from harness.sample import Mode
from tests.harness.synthetic import ORIGIN_NS, WALL_NS, Plan, one_second, synthetic_rows, write_sample_set

MINUTE_NS = 60_000_000_000


def soak(root: Path, minutes: int, *, drift: float = 0.0, name: str = "soak0001") -> Path:
    """Write a soak with two runs a minute, whose creation is slower by `drift` at its end than at its beginning."""
    plan = Plan(mode=Mode.SOAK, runs=2 * minutes + 1, children=0, polls=1, side_by_side=1, measurement_id=name)
    rows = synthetic_rows(plan)
    random = np.random.default_rng(5)
    for index, row in enumerate(rows.samples):
        number = int(row.run_key.split("-")[1])
        level = 10.0 * (1.0 + drift * number / plan.runs) * float(np.exp(random.normal(0.0, 0.01)))
        due = ORIGIN_NS + 50_000_000 + number * MINUTE_NS // 2 + (0 if row.endpoint == "create" else 200_000_000)
        done = due + 1_000 + int(level * 1e6)
        rows.samples[index] = dataclasses.replace(
            row, intended_at_ns=due, sent_at_ns=due + 1_000, first_byte_at_ns=done, done_at_ns=done,
            latency_ms=(done - due) / 1e6, service_ms=(done - due - 1_000) / 1e6,
        )  # fmt: skip
    end = max(row.done_at_ns or 0 for row in rows.samples) + 5_000_000
    rows.resources[:] = [one_second(at, random) for at in range(ORIGIN_NS, end, 5_000_000_000)]
    clock = {
        "start": {"monotonic_ns": ORIGIN_NS, "wall_ns": WALL_NS},
        "end": {"monotonic_ns": end, "wall_ns": WALL_NS + end - ORIGIN_NS},
    }
    return write_sample_set(root, plan, (), {"clock": clock}, rows)


def verdict(found: Evaluation) -> Verdict:
    (one,) = [one for one in found.verdicts if one.name == "soak-drift"]
    return one


def test_a_steady_soak_of_ninety_minutes_is_proven_steady(tmp_path: Path) -> None:
    one = verdict(load([soak(tmp_path, 90)]))
    assert (one.verdict, one.sample_size, one.sample_unit) == (Status.PASS, 90, "minutes")
    assert one.requirement == "drift of p50 within 5 %"


def test_a_soak_that_ends_a_fifth_slower_drifts(tmp_path: Path) -> None:
    one = verdict(load([soak(tmp_path, 90, drift=0.2)]))
    assert one.verdict is Status.FAIL
    assert one.interval is not None
    assert one.interval.lower is not None
    assert one.interval.lower > 0.05


def test_a_short_soak_says_how_many_minutes_it_lacks(tmp_path: Path) -> None:
    one = verdict(load([soak(tmp_path, 30)]))
    assert (one.verdict, one.more_needed) == (Status.INCONCLUSIVE, 50)
    assert one.reason.endswith("50 more minutes would settle it.")


def test_of_two_soaks_the_worse_counts(tmp_path: Path) -> None:
    steady, drifting = soak(tmp_path, 90), soak(tmp_path, 90, drift=0.2, name="soak0002")
    one = verdict(load([steady, drifting]))
    assert (one.verdict, "The worst of 2 soaks, soak0002: " in one.reason) == (Status.FAIL, True)


def test_the_notebook_shows_the_minutes_and_says_what_they_prove(tmp_path: Path) -> None:
    found = load([soak(tmp_path, 90, drift=0.2)])
    drawing = drift_shown.minutes(found.data, 0.05)
    assert isinstance(drawing, Drawing)
    assert "create: 90 minutes around" in drawing.alt
    assert str(drift_shown.conclusion(found.data, 0.05)).startswith("FAIL. Creation drifts.")
    assert "FAIL" in str(getattr(drift_shown.verdicts(found.data, 0.05), "to_html")())  # noqa: B009 - or a passage


def test_samples_without_a_soak_say_so_everywhere(tmp_path: Path) -> None:
    data = load([write_sample_set(tmp_path)]).data
    shown = [drift_shown.conclusion(data, 0.05), drift_shown.minutes(data, 0.05), drift_shown.verdicts(data, 0.05)]
    assert [drift_shown.NONE in str(one) for one in shown] == [True, True, True]
