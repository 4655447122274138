"""The words and cells that every reader of a report gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.analysis import display
from harness.analysis.display import VerdictRow
from harness.analysis.layout import unbroken
from harness.evaluation import load
from harness.sample import Mode
from tests.harness.synthetic import Plan, write_sample_set

OURS = "20260101T000000Z-smoke"


def test_a_row_says_of_what_its_numbers_are(tmp_path: Path) -> None:
    found = {one.name: one for one in load([write_sample_set(tmp_path)]).verdicts}
    mean, p95 = found["create-mean"], found["snapshot-p95"]
    assert [display.verdict_row(found[name]) for name in ("snapshot-p95", "no-failed-responses", "burst-errors")] == [
        VerdictRow("PASS", "Snapshot poll (smoke)", "p95 < 375 ms", display.measured_text(p95),
                   "slow 0 % to 2.49 %, allowed 5 %", "128 snapshot requests, effective 119 for the p95"),
        VerdictRow("PASS", "Failed API responses (smoke)", "none failed", "0", "counted", "256 requests"),
        VerdictRow("NOT APPLICABLE", "Burst plan: errors", "errors < 1 %", "—", "—", "—"),
    ]  # fmt: skip
    assert display.measured_text(p95).startswith("p95 ")
    assert display.measured_text(mean).startswith("mean ")
    assert display.bounds_text(mean).startswith("mean ")
    assert display.bounds_text(found["tick-throughput"]).startswith("rate ")


def test_the_bounds_of_the_burst_plan_say_of_what_they_are(tmp_path: Path) -> None:
    plan = Plan(mode=Mode.BURST, runs=100, children=2, side_by_side=20)
    found = {one.name: one for one in load([write_sample_set(tmp_path, plan)]).verdicts}
    assert display.bounds_text(found["burst-errors"]).startswith("errors 0 % to ")
    assert display.bounds_text(found["burst-completion"]).startswith("slowest ")


def test_an_effective_size_says_for_which_statistic(tmp_path: Path) -> None:
    found = load([write_sample_set(tmp_path, Plan(children=3))]).verdicts
    said = {one.name: display.sample_text(one) for one in found if (one.effective_size or 1e9) < one.sample_size - 1}
    aside = {"create-mean": "mean", "spawn-mean": "mean", "snapshot-p95": "p95", "tick-throughput": "rate"}
    assert said
    assert all(text.endswith(f" for the {aside[name]}") and ", effective " in text for name, text in said.items())


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("below 9.5 ms at 95 % confidence in 3 s.", "below 9.5\u00a0ms at 95\u00a0% confidence in 3\u00a0s."),
        ("Duration, s", "Duration,\u00a0s"),
        # a unit stands alone
        ("5 seconds of 3 samples, so 2 mslots", "5 seconds of 3 samples, so 2 mslots"),
    ],
)
def test_no_line_breaks_between_a_number_and_its_unit(text: str, kept: str) -> None:
    assert unbroken(text) == kept


def test_mixed_measurements_are_told_once_with_short_names_and_their_folders(tmp_path: Path) -> None:
    commits = {"a": "c0ffee" * 6 + "c0ff", "b": "c3b9" * 10, "c": "c0ffee" * 6 + "c0ff"}
    plans = [Plan(runs=5, measurement_id=name * 32, commit=commit) for name, commit in commits.items()]
    found = load([write_sample_set(tmp_path, plan) for plan in plans])
    said = "These are no repetitions of one smoke measurement, judge them apart: "
    shortly = (
        "aaaaaaaa and cccccccc on commit c0ffeec0, quota revision 1; bbbbbbbb on commit c3b9c3b9, quota revision 1."
    )
    assert [finding.detail for finding in found.findings] == [said + shortly]
    assert display.sentences((), found.findings, found.folders)[1] == (
        f"{said}{OURS}-{'a' * 32} and {OURS}-{'c' * 32} on commit c0ffeec0, quota revision 1; {OURS}-{'b' * 32} on"
        " commit c3b9c3b9, quota revision 1."
    )


def test_a_finding_names_the_folder_that_it_is_about(tmp_path: Path) -> None:
    path = write_sample_set(tmp_path, Plan(), [lambda rows: rows.samples.__delitem__(-1)])
    found = load([path])
    assert display.sentences((), found.findings, found.folders)[1:] == [
        f"{path.name}: 1 row of 256 planned requests are missing."
    ]


def test_what_was_measured_has_its_folder_and_its_start(tmp_path: Path) -> None:
    path = write_sample_set(tmp_path)
    markup = display.measurements(load([path]).data).to_html()
    assert path.name in markup
    assert "2023-11-14 22:13:20" in markup


def test_every_cell_of_a_table_carries_its_heading_for_narrow_screens(tmp_path: Path) -> None:
    markup = display.verdicts(load([write_sample_set(tmp_path)]).verdicts).to_html()
    headings = (*display.VERDICT_COLUMNS, "Reason")
    told = [f'td.col{place} {{\n  --label: "{heading}";' in markup for place, heading in enumerate(headings)]
    assert told == [True] * 7
