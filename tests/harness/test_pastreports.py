"""Earlier reports of a checkout as a new one finds them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from harness.pastreports import past_reports
from harness.report import write_report
from harness.request import check_request
from tests.harness.synthetic import Plan, write_sample_set


@pytest.fixture
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the reports of two measurements, made without notebooks."""
    monkeypatch.setenv("PLIMSOLL_DATA", str(tmp_path / "data"))
    root = tmp_path / "data" / "reports"
    for number in (1, 2):
        samples = write_sample_set(tmp_path, Plan(runs=20, seed=number, measurement_id=f"019{number}-made"))
        write_report(check_request([samples], [], root / f"report-{number}"))
    return root


def test_a_second_report_has_a_page_that_shows_both(reports: Path) -> None:
    assert not (reports / "report-1" / "history.html").exists()
    page = (reports / "report-2" / "history.html").read_text(encoding="utf-8")
    assert "2 reports are too few to tell noise from change" in page
    assert '<a href="history.html">' in (reports / "report-2" / "index.html").read_text(encoding="utf-8")
    assert ("<script" in page, "http://" in page, "https://" in page) == (False, False, False)


def test_the_report_itself_is_none_of_its_past(reports: Path) -> None:
    assert [one.name for one in past_reports(reports, reports / "report-2")] == ["report-1"]


def test_what_cannot_be_read_is_told_and_left_out(reports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (reports / "report-1" / "tables" / "latencies.parquet").write_bytes(b"torn")
    assert past_reports(reports, reports / "report-2") == ()
    assert "history: report-1 cannot be read" in capsys.readouterr().err


def test_reports_that_do_not_tell_their_load_or_hold_no_figures_are_no_points(reports: Path) -> None:
    file = reports / "report-1" / "tables" / "measurements.parquet"
    pd.read_parquet(file).drop(columns="load").to_parquet(file)
    (reports / "report-2" / "tables" / "latencies.parquet").unlink()
    assert past_reports(reports, reports / "report-3") == ()
