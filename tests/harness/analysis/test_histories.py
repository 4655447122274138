"""One figure over many reports: what is put beside what, and what a reader is told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from harness.analysis import history_shown
from harness.analysis.drawing import Drawing
from harness.analysis.histories import QUANTILES, Report, change_frame, series_of

START = pd.Timestamp("2026-01-01T00:00:00Z")


def report(day: int, ms: float | None = 100.0, **values: Any) -> Report:
    """Return a report of one smoke load of creates, measured on a day, at a p50 in ms and a p95 of twice that."""
    measured = {
        "measurement_id": f"m{day:03d}", "mode": "smoke", "load": "asked", "cpu": "made up", "cpu_count": 2,
        "started_at": START + pd.Timedelta(days=day), "commit": f"{day:03d}c0ffee000",
    }  # fmt: skip
    rows = [
        {"mode": "smoke", "endpoint": "create", "q": q, "latency_ms": None if ms is None else ms * (1 + (q > 0.5))}
        for q in (0.5, 0.95, 0.99)
    ]
    return Report(f"report-{day:03d}", pd.DataFrame([measured | values]), pd.DataFrame(rows))


def noisy(days: int, step: float = 0.0, at: int = 0) -> list[Report]:
    """Return reports with 2 % of noise, slower by `step` from the day `at` on."""
    noise = np.exp(0.02 * np.random.default_rng(5).standard_normal(days))
    return [report(day, float(100.0 * noise[day] * (1.0 + step * (day >= at)))) for day in range(days)]


def test_each_quantile_of_each_endpoint_is_a_series_in_the_order_of_measurement() -> None:
    *past, current = noisy(12)
    found = series_of(past[::-1], current)
    assert [(one.endpoint, one.q) for one in found] == [("create", q) for q in QUANTILES]
    assert found[0].points["report"].tolist() == [f"report-{day:03d}" for day in range(12)]
    assert found[0].history.changes == ()


@pytest.mark.parametrize(
    "other",
    [
        # another load, other parameters, another machine: another series
        {"mode": "burst"},
        {"load": "asked otherwise"},
        {"cpu": "another"},
        {"cpu_count": 64},
        # what was measured later is no past
        {"started_at": START + pd.Timedelta(days=99)},
    ],
)
def test_reports_that_are_not_alike_are_not_mixed(other: dict[str, Any]) -> None:
    found = series_of([report(1), report(2, **other)], report(3))
    assert found[0].points["report"].tolist() == ["report-001", "report-003"]


def test_a_measurement_that_was_reported_twice_counts_once_as_the_newest_has_it() -> None:
    again = Report("report-again", report(1).measurements, report(1, 50.0).latencies)
    found = series_of([report(1), again], report(2))
    assert found[0].points["report"].tolist() == ["report-again", "report-002"]


def test_a_step_is_found_and_told_with_its_report_and_its_commit() -> None:
    *past, current = noisy(30, step=0.2, at=18)
    found = series_of(past, current)
    frame = change_frame(found)
    assert frame[["q", "report", "commit"]].to_numpy().tolist() == [
        [q, "report-018", "018c0ffee000"] for q in QUANTILES
    ]
    assert frame["change"].to_numpy() == pytest.approx([0.2, 0.2], abs=0.02)
    first, *rest = str(history_shown.conclusion(found)).splitlines()
    assert first == "CHANGED. 2 of 2 figures changed for good."
    assert rest[0].startswith("create p50: +")
    assert "from 2026-01-19 00:00, commit 018c0ffe on" in rest[0]


def test_without_a_change_it_says_so() -> None:
    *past, current = noisy(30)
    found = series_of(past, current)
    assert str(history_shown.conclusion(found)) == (
        "STEADY. None of 2 figures has changed for good over these reports."
    )
    assert str(history_shown.changes(found)) == "No change was found."


def test_few_reports_and_failures_are_told_and_not_looked_at() -> None:
    few = series_of([report(1)], report(2))
    said = str(history_shown.conclusion(few))
    assert said.startswith("INCONCLUSIVE. No figure has been reported often enough")
    assert "create p50, create p95, because 2 reports are too few to tell noise from change: 10 are needed" in said
    *past, current = noisy(15)
    failed = series_of([*past, report(50, None)], Report("now", report(60).measurements, current.latencies))
    assert "because a report's figure is no finite number above 0" in str(history_shown.conclusion(failed))
    assert isinstance(history_shown.lines(failed), Drawing)


def test_the_picture_says_in_words_what_it_shows() -> None:
    *past, current = noisy(30, step=0.2, at=18)
    shown = history_shown.lines(series_of(past, current))
    assert isinstance(shown, Drawing)
    assert "create p50: 30 reports, " in shown.alt
    assert "from 2026-01-19 00:00, commit 018c0ffe on" in shown.alt


def test_a_figure_that_failed_in_every_report_is_drawn_at_the_edge() -> None:
    shown = history_shown.lines(series_of([report(1, None)], report(2, None)))
    assert isinstance(shown, Drawing)
    assert "all failed" in shown.alt
