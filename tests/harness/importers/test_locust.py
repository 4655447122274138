"""Locust's request log: the columns of locust.contrib.csv_request_logger (Locust 2.47), and the event's own names."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.importers.formats import Format
from harness.sample import Endpoint, Outcome
from tests.harness.importers.reading import FILES, RUN, SECOND_NS, imported, rows_of, sample, written

MS = 1_000_000


def test_each_request_of_the_log_becomes_a_row(tmp_path: Path) -> None:
    def row(number: int, sent_ms: int, ms: float, endpoint: Endpoint, **more: object) -> object:
        sent = SECOND_NS + sent_ms * MS
        return sample(
            run_key=f"row-{number}", endpoint=endpoint, sent_at_ns=sent, done_at_ns=sent + int(ms * MS),
            service_ms=ms, **more,
        )  # fmt: skip

    first, *rest = rows_of(imported(Format.LOCUST_CSV, FILES / "locust.csv", tmp_path))
    assert first == sample(
        run_key="row-1", endpoint=Endpoint.CREATE, sent_at_ns=SECOND_NS + 123_456_000,
        done_at_ns=SECOND_NS + 135_956_000, service_ms=12.5, status=200, response_bytes=180,
    )  # fmt: skip
    too_many = "429 Client Error: Too Many Requests for url: /api/runs/[id]/spawn_subrun/"
    rejected = "CatchResponseError('no run_id, at all')"
    late = "ReadTimeout(ReadTimeoutError('Read timed out. (read timeout=60)'))"
    bad = Outcome.HTTP_ERROR
    assert rest == [
        row(2, 200, 3.25, Endpoint.SNAPSHOT, status=200, response_bytes=2400),
        row(3, 300, 4.0, Endpoint.SPAWN, status=429, response_bytes=120, outcome=bad, error=too_many),
        row(4, 400, 9.75, Endpoint.CREATE, status=200, response_bytes=20, outcome=bad, error=rejected),
        row(5, 500, 0.4, Endpoint.CREATE, outcome=Outcome.REFUSED, error="ConnectionRefusedError(111)"),
        row(6, 600, 60_000.0, Endpoint.OTHER, outcome=Outcome.TIMEOUT, error=late),
    ]


def test_a_listener_that_writes_the_names_of_the_event_is_read_too(tmp_path: Path) -> None:
    assert rows_of(imported(Format.LOCUST_CSV, FILES / "locust-event-names.csv", tmp_path)) == [
        sample(
            run_key=RUN, endpoint=Endpoint.SNAPSHOT, sent_at_ns=SECOND_NS + 500 * MS, done_at_ns=SECOND_NS + 503 * MS,
            service_ms=3.0,
        ),
        sample(
            run_key="row-2", endpoint=Endpoint.OTHER, sent_at_ns=SECOND_NS + 1_250 * MS,
            done_at_ns=SECOND_NS + 1_258_500_000, service_ms=8.5,
        ),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "cells", "outcome"),
    [
        ("success", "false", Outcome.CONNECTION_ERROR),
        ("success", "true", Outcome.OK),
        ("status_code", "200", Outcome.OK),
        ("status_code", "0", Outcome.CONNECTION_ERROR),  # without exceptions, no status is no answer
        ("status_code,exception", "0,CatchResponseError('empty')", Outcome.HTTP_ERROR),
    ],
)
def test_a_failure_is_told_by_what_the_log_has(columns: str, cells: str, outcome: Outcome, tmp_path: Path) -> None:
    lines = [f"timestamp,request_type,name,response_time_ms,{columns}", f"1700000000.5,GET,/,5,{cells}"]
    (row,) = rows_of(imported(Format.LOCUST_CSV, written(tmp_path / "log.csv", lines), tmp_path))
    assert row.outcome is outcome
