"""Vegeta's results after `vegeta encode` (Vegeta 12.13, and 12.8 with its shorter CSV)."""

from __future__ import annotations

from pathlib import Path

from harness.importers.formats import Format
from harness.sample import Endpoint, Outcome
from tests.harness.importers.reading import FILES, RUN, SECOND_NS, imported, rows_of, sample

MS = 1_000_000


def test_each_line_of_the_csv_becomes_a_row(tmp_path: Path) -> None:
    common = {"scenario": "baseline"}
    where = 'Post "http://plimsoll.test/api/runs/'
    assert rows_of(imported(Format.VEGETA_CSV, FILES / "vegeta.csv", tmp_path)) == [
        sample(
            run_key="row-1", endpoint=Endpoint.CREATE, sent_at_ns=SECOND_NS, done_at_ns=SECOND_NS + 12_500_000,
            service_ms=12.5, status=200, response_bytes=180, **common,
        ),
        sample(
            run_key=RUN, endpoint=Endpoint.SNAPSHOT, sent_at_ns=SECOND_NS + 10 * MS, done_at_ns=SECOND_NS + 13 * MS,
            service_ms=3.0, status=200, response_bytes=2400, **common,
        ),
        sample(
            run_key=RUN, endpoint=Endpoint.SPAWN, sent_at_ns=SECOND_NS + 20 * MS, done_at_ns=SECOND_NS + 20_900_000,
            service_ms=0.9, status=429, outcome=Outcome.HTTP_ERROR, error="429 Too Many Requests", response_bytes=120,
            **common,
        ),
        sample(
            run_key="row-4", endpoint=Endpoint.CREATE, sent_at_ns=SECOND_NS + 30 * MS,
            done_at_ns=SECOND_NS + 30_030 * MS, service_ms=30_000.0, outcome=Outcome.TIMEOUT,
            error=f'{where}?…": context deadline exceeded (Client.Timeout exceeded while awaiting headers)', **common,
        ),
        sample(
            run_key="row-5", endpoint=Endpoint.CREATE, sent_at_ns=SECOND_NS + 40 * MS,
            done_at_ns=SECOND_NS + 40_100_000, service_ms=0.1, outcome=Outcome.REFUSED,
            error=f'{where}": dial tcp 127.0.0.1:0->127.0.0.1:8000: connect: connection refused', **common,
        ),
        sample(
            run_key="row-6", endpoint=Endpoint.CREATE, sent_at_ns=SECOND_NS + 50 * MS,
            done_at_ns=SECOND_NS + 50_700_000, service_ms=0.7, status=200, outcome=Outcome.CONNECTION_ERROR,
            error="unexpected EOF", response_bytes=10, **common,
        ),
    ]  # fmt: skip


def test_each_line_of_the_json_becomes_a_row(tmp_path: Path) -> None:
    reset = "read tcp 127.0.0.1:1->127.0.0.1:2: read: connection reset by peer"
    assert rows_of(imported(Format.VEGETA_JSON, FILES / "vegeta.json", tmp_path)) == [
        sample(
            run_key="row-1", scenario="baseline", endpoint=Endpoint.CREATE, sent_at_ns=SECOND_NS + 1,
            done_at_ns=SECOND_NS + 12_500_001, service_ms=12.5, status=200, response_bytes=180,
        ),
        sample(
            run_key="row-2", scenario="baseline", endpoint=Endpoint.CREATE, sent_at_ns=SECOND_NS + 10 * MS,
            done_at_ns=SECOND_NS + 10_100_000, service_ms=0.1, outcome=Outcome.CONNECTION_ERROR,
            error=f'Post "http://plimsoll.test/api/runs/": {reset}',
        ),
    ]  # fmt: skip


def test_results_without_an_address_ask_for_the_endpoint_that_is_given(tmp_path: Path) -> None:
    path = FILES / "vegeta-12.8.csv"
    assert {row.endpoint for row in rows_of(imported(Format.VEGETA_CSV, path, tmp_path))} == {Endpoint.OTHER}
    found = imported(Format.VEGETA_CSV, path, tmp_path, endpoint=Endpoint.CREATE)
    assert {row.endpoint for row in rows_of(found)} == {Endpoint.CREATE}
    assert found.manifest.parameters["endpoint"] == "create"
