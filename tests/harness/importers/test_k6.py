"""k6's CSV and JSON, as its `output/csv` and `output/json` write them (k6 0.49 to 2.x)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness.importers.formats import Format
from harness.sample import Endpoint, Outcome
from tests.harness.importers.reading import FILES, RUN, SECOND_NS, imported, rows_of, sample, written

DROPPED = "dropped iteration: no VU was free"
HEADER = "metric_name,timestamp,metric_value,check,group,method,name,scenario,status,url,metadata"


def points(
    seconds: float, *, ms: float = 5.0, status: int = 200, url: str = "http://x.test/", vu: str = ""
) -> list[str]:
    """Return the points of one request that ends so many seconds after the beginning."""
    at = SECOND_NS + round(seconds * 1e9)
    tags = f",,GET,{url},main,{status},{url},{vu and f'vu={vu}'}"
    return [f"http_reqs,{at},1.000000,{tags}", f"http_req_duration,{at},{ms:f},{tags}"]


def check(seconds: float, name: str, value: int, vu: str = "") -> str:
    """Return the point of one check."""
    return f"checks,{SECOND_NS + round(seconds * 1e9)},{value:f},{name},,,,main,,,{vu and f'vu={vu}'}"


def test_the_csv_becomes_a_row_for_each_request_and_each_dropped_iteration(tmp_path: Path) -> None:
    found = imported(Format.K6_CSV, FILES / "k6.csv", tmp_path)
    ends = {name: SECOND_NS + offset for name, offset in (("a", 123_456_789), ("b", 200_000_000), ("c", 210_000_000))}
    common = {"scenario": "agents"}
    assert rows_of(found) == [
        sample(
            run_key="row-1", endpoint=Endpoint.CREATE, status=200, service_ms=12.5, sent_at_ns=ends["a"] - 12_500_000,
            first_byte_at_ns=ends["a"] - 100_000, done_at_ns=ends["a"], **common,
        ),
        sample(
            run_key=RUN, endpoint=Endpoint.SNAPSHOT, status=200, service_ms=3.0, sent_at_ns=ends["c"] - 3_000_000,
            first_byte_at_ns=ends["c"] - 100_000, done_at_ns=ends["c"], **common,
        ),
        sample(
            run_key="row-3", endpoint=Endpoint.CREATE, status=200, service_ms=20.0, sent_at_ns=ends["b"] - 20_000_000,
            first_byte_at_ns=ends["b"] - 200_000, done_at_ns=ends["b"], outcome=Outcome.HTTP_ERROR,
            error="check failed: has a run_id", **common,
        ),
        *(
            sample(
                run_key=f"row-{number}", endpoint=Endpoint.CREATE, intended_at_ns=SECOND_NS + 450_000_000,
                outcome=Outcome.NOT_SENT, error=DROPPED, **common,
            )
            for number in (4, 5)
        ),
        sample(
            run_key="row-6", endpoint=Endpoint.CREATE, service_ms=0.0, sent_at_ns=SECOND_NS + 300_000_000,
            done_at_ns=SECOND_NS + 300_000_000, outcome=Outcome.REFUSED, error="dial: connection refused", **common,
        ),
        sample(
            run_key=RUN, endpoint=Endpoint.SPAWN, status=429, service_ms=4.0, sent_at_ns=SECOND_NS + 396_000_000,
            first_byte_at_ns=SECOND_NS + 399_900_000, done_at_ns=SECOND_NS + 400_000_000,
            outcome=Outcome.HTTP_ERROR, error="status 429", **common,
        ),
    ]  # fmt: skip
    assert found.manifest.source.notes[-1] == "Failed checks, put on the last request before them of the same VU: 1."


def test_the_json_becomes_a_row_for_each_request_and_each_dropped_iteration(tmp_path: Path) -> None:
    found = imported(Format.K6_JSON, FILES / "k6.json", tmp_path)
    end = SECOND_NS + 123_456_789
    assert rows_of(found) == [
        sample(
            run_key="row-1", scenario="agents", endpoint=Endpoint.CREATE, intended_at_ns=SECOND_NS,
            outcome=Outcome.NOT_SENT, error=DROPPED,
        ),
        sample(
            run_key="row-2", scenario="agents", endpoint=Endpoint.CREATE, status=200, service_ms=12.5,
            sent_at_ns=end - 12_500_000, first_byte_at_ns=end - 100_000, done_at_ns=end, outcome=Outcome.HTTP_ERROR,
            error="check failed: has a run_id",
        ),
        sample(
            run_key="row-3", scenario="agents", endpoint=Endpoint.OTHER, service_ms=500.0,
            sent_at_ns=SECOND_NS + 500_000_000, done_at_ns=SECOND_NS + 1_000_000_000, outcome=Outcome.TIMEOUT,
            error="request timeout",
        ),
    ]  # fmt: skip


def test_a_stamp_of_whole_seconds_says_when_a_request_was_done_and_not_when_it_was_sent(tmp_path: Path) -> None:
    text = re.sub(r"(?m)^([a-z_]+,\d{10})\d{9}", r"\1", (FILES / "k6.csv").read_text())
    found = imported(Format.K6_CSV, written(tmp_path / "seconds.csv", text), tmp_path)
    first = rows_of(found)[0]
    assert (first.sent_at_ns, first.first_byte_at_ns, first.done_at_ns, first.service_ms) == (
        None, None, SECOND_NS, 12.5,
    )  # fmt: skip
    assert {"sent_at_ns", "first_byte_at_ns"} <= set(found.manifest.source.cannot_know)


@pytest.mark.parametrize(
    ("stamp", "done_at_ns"),
    [
        ("1700000000123", SECOND_NS + 123_000_000),
        ("1700000000123456", SECOND_NS + 123_456_000),
        ("2023-11-14T23:13:20+01:00", SECOND_NS),
        ("2023-11-14T22:13:20.000000001Z", SECOND_NS + 1),
    ],
)
def test_every_time_format_of_k6_is_read(stamp: str, done_at_ns: int, tmp_path: Path) -> None:
    lines = [HEADER, f"http_req_duration,{stamp},5.0,,,GET,,main,200,http://x.test/,"]
    (row,) = rows_of(imported(Format.K6_CSV, written(tmp_path / "k6.csv", lines), tmp_path))
    assert row.done_at_ns == done_at_ns


def test_without_the_vu_each_failed_check_falls_on_a_request_of_its_own(tmp_path: Path) -> None:
    lines = [HEADER, *points(1.0, url="http://x.test/a"), *points(1.1, url="http://x.test/b")]
    lines += [check(1.2, "ok", 0), check(1.2, "ok", 0), check(1.2, "small", 0)]
    found = imported(Format.K6_CSV, written(tmp_path / "k6.csv", lines), tmp_path)
    assert [row.error for row in rows_of(found)] == ["check failed: ok", "check failed: ok, small"]


def test_a_check_that_passed_is_not_taken_for_that_of_another_request(tmp_path: Path) -> None:
    lines = [HEADER, *points(1.0), check(1.0, "ok", 0), *points(1.1), check(1.1, "ok", 1)]
    found = imported(Format.K6_CSV, written(tmp_path / "k6.csv", lines), tmp_path)
    assert [row.outcome for row in rows_of(found)] == [Outcome.HTTP_ERROR, Outcome.OK]


def test_a_failed_check_before_any_request_is_on_none_and_told(tmp_path: Path) -> None:
    found = imported(Format.K6_CSV, written(tmp_path / "k6.csv", [HEADER, check(0, "x", 0), *points(1.0)]), tmp_path)
    assert [row.outcome for row in rows_of(found)] == [Outcome.OK]
    assert "Failed checks that follow no request and are on none: 1." in found.manifest.source.notes


def test_dropped_iterations_of_a_scenario_without_requests_are_of_no_endpoint_of_ours(tmp_path: Path) -> None:
    dropped = f"dropped_iterations,{SECOND_NS},2.0,,,,,starved,,,"
    found = rows_of(imported(Format.K6_CSV, written(tmp_path / "k6.csv", [HEADER, dropped]), tmp_path))
    assert found == [
        sample(
            run_key=f"row-{number}", scenario="starved", endpoint=Endpoint.OTHER, intended_at_ns=SECOND_NS,
            outcome=Outcome.NOT_SENT, error=DROPPED,
        )
        for number in (1, 2)
    ]  # fmt: skip


def test_an_answer_that_k6_did_not_expect_is_an_error_although_its_status_is_good(tmp_path: Path) -> None:
    lines = [HEADER, *points(1.0), f"http_req_failed,{SECOND_NS + 10**9},1.0,,,GET,,main,200,http://x.test/,"]
    (row,) = rows_of(imported(Format.K6_CSV, written(tmp_path / "k6.csv", lines), tmp_path))
    assert (row.outcome, row.error) == (Outcome.HTTP_ERROR, "not the expected response")
