"""JMeter's results file in both of its forms (JMeter 5.6)."""

from __future__ import annotations

from pathlib import Path

from harness.importers.formats import Format
from harness.sample import Endpoint, Outcome, Sample
from tests.harness.importers.reading import FILES, RUN, SECOND_NS, imported, rows_of, sample, written

MS = 1_000_000
ONE_LEFT_OUT = "Samples of controllers, which sum up others or contain them, left out: 1."


def row(key: str, endpoint: Endpoint, sent_ms: int, ms: int, waited_ms: int | None = None, **more: object) -> Sample:
    """Return a row of the thread group "Agents"."""
    sent = SECOND_NS + sent_ms * MS
    return sample(
        run_key=key, scenario="Agents", endpoint=endpoint, sent_at_ns=sent, done_at_ns=sent + ms * MS,
        first_byte_at_ns=None if waited_ms is None else sent + waited_ms * MS, service_ms=float(ms), **more,
    )  # fmt: skip


def test_each_sample_of_the_csv_becomes_a_row_and_a_transaction_none(tmp_path: Path) -> None:
    found = imported(Format.JMETER_JTL, FILES / "jmeter.csv", tmp_path)
    refused = (
        "Non HTTP response code: org.apache.http.conn.HttpHostConnectException Non HTTP response message: Connect to "
        "plimsoll.test:80 failed: Connection refused"
    )
    late = "Non HTTP response code: java.net.SocketTimeoutException Non HTTP response message: Read timed out"
    rejected = "Test failed: text expected to contain /run_id/ and does not"
    bad = Outcome.HTTP_ERROR
    assert rows_of(found) == [
        row("row-1", Endpoint.CREATE, 0, 13, 12, status=200, response_bytes=180),
        row(RUN, Endpoint.SNAPSHOT, 20, 3, 3, status=200, response_bytes=2400),
        row("row-3", Endpoint.CREATE, 30, 9, 9, status=200, response_bytes=20, outcome=bad, error=rejected),
        row("row-4", Endpoint.CREATE, 40, 2, outcome=Outcome.REFUSED, error=refused),
        row("row-5", Endpoint.CREATE, 50, 5000, outcome=Outcome.TIMEOUT, error=late),
    ]  # fmt: skip
    assert found.manifest.source.notes[-1] == ONE_LEFT_OUT


def test_each_request_of_the_xml_becomes_a_row_with_its_redirects_and_without_its_controller(tmp_path: Path) -> None:
    found = imported(Format.JMETER_JTL, FILES / "jmeter.xml", tmp_path)
    rejected = "Test failed: text expected to contain /child_run_id/"
    assert rows_of(found) == [
        row("row-1", Endpoint.CREATE, 0, 13, 12, status=200, response_bytes=180),
        row(RUN, Endpoint.SNAPSHOT, 20, 3, 3, status=200, response_bytes=2400),
        row(RUN, Endpoint.SPAWN, 23, 9, 9, status=200, response_bytes=20, outcome=Outcome.HTTP_ERROR, error=rejected),
        row("row-4", Endpoint.OTHER, 40, 7, status=200, response_bytes=0),
    ]
    assert found.manifest.source.notes[-1] == ONE_LEFT_OUT


def test_another_delimiter_is_found_in_the_header(tmp_path: Path) -> None:
    lines = ["timeStamp;elapsed;label;responseCode;success", "1700000000000;7;POST /api/runs/;200;true"]
    assert rows_of(imported(Format.JMETER_JTL, written(tmp_path / "a.jtl", lines), tmp_path)) == [
        sample(
            run_key="row-1", endpoint=Endpoint.CREATE, sent_at_ns=SECOND_NS, done_at_ns=SECOND_NS + 7 * MS,
            service_ms=7.0, status=200,
        )
    ]  # fmt: skip
