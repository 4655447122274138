"""A file that is not what was asked for is refused as bad usage, with the sentence that helps."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import pytest

from harness.errors import ExitCode
from harness.importers.formats import Format
from harness.importers.intake import import_file
from harness.importers.source import NotThisFile
from tests.harness.importers.reading import FILES, written

ROWS = {
    Format.K6_CSV: "k6.csv",
    Format.K6_JSON: "k6.json",
    Format.VEGETA_CSV: "vegeta.csv",
    Format.VEGETA_JSON: "vegeta.json",
    Format.LOCUST_CSV: "locust.csv",
    Format.JMETER_JTL: "jmeter.csv",
    Format.HDR_LOG: "tagged-non-monotonic.hlog",
}


def refusal(kind: Format, path: Path, root: Path) -> str:
    """Return what is said of a file that is refused, and see that nothing was made of it."""
    with pytest.raises(NotThisFile) as refused:
        import_file(kind, path, root / "samples")
    assert refused.value.exit_code is ExitCode.USAGE
    assert not list((root / "samples").glob("*"))
    return str(refused.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(("kind", "wanted"), [pair for pair in itertools.product(ROWS, Format) if pair[0] != pair[1]])
def test_the_rows_of_another_tool_are_named(kind: Format, wanted: Format, tmp_path: Path) -> None:
    said = refusal(wanted, FILES / ROWS[kind], tmp_path)
    assert said == f"looks like {kind}, not {wanted}: give --from {kind}"


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (
            "Type,Name,Request Count,Failure Count,Median Response Time",
            "is Locust's _stats.csv, which holds no",
        ),
        ('"Method","Name","# requests","# failures"', "is Locust's _stats.csv"),
        ("Timestamp,User Count,Type,Name,Requests/s", "is Locust's _stats_history.csv"),
        ("Method,Name,Error,Occurrences", "is Locust's _failures.csv"),
        ("Count,Message,Traceback,Nodes", "is Locust's _exceptions.csv"),
        ("       Value     Percentile TotalCount 1/(1-Percentile)", "is a percentile distribution (.hgrm)"),
        ('"Value","Percentile","TotalCount","1/(1-Percentile)"', "is a percentile distribution (.hgrm)"),
        ("Value(ms)  Percentile  TotalCount  1/(1-Percentile)", "is a percentile distribution (.hgrm)"),
        ('{"root_group": {"name": ""}, "metrics": {}}', "is k6's summary, no rows: export the rows with `k6 run"),
        ('{\n    "metrics": {"http_reqs": {"count": 1}}}', "is k6's summary"),
        (
            '{"latencies":{"total":1},"bytes_in":{}}',
            "is a JSON report of Vegeta, no rows: export",
        ),
        ("Requests      [total, rate, throughput]  1, 1, 1", "is a report of Vegeta"),
        ("Bucket           #   %       Histogram", "is a histogram report of Vegeta"),
        ("Label,# Samples,Average,Median", "is an aggregate or summary report of JMeter"),
        ('{\n "Total" : {\n "transaction" : "Total"', "is JMeter's statistics.json"),
    ],
)
@pytest.mark.parametrize("kind", [Format.K6_CSV, Format.LOCUST_CSV])
def test_aggregates_are_refused_with_what_to_export_instead(head: str, said: str, kind: Format, tmp_path: Path) -> None:
    assert refusal(kind, written(tmp_path / "file", [head, "1,2,3,4,5"]), tmp_path).startswith(said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty: make it with vegeta encode --to csv results.bin > FILE"),
        (b" \n\n", "is empty"),
        (b"\x7f\x03\x01\x01\x06Result\x00Attack Seq Code Timestamp Latency", "holds Vegeta's own binary results (gob)"),
        (b"PK\x03\x04\x00\x00", "is no text"),
        ("1,2,3\n".encode("utf-16"), "is UTF-16, as PowerShell redirects it"),
        (gzip.compress(b"", mtime=0), "is empty"),
        (gzip.compress(b"1,2", mtime=0)[:5] + b"damaged", "cannot be unpacked"),
        (b"hello world\n", "line 1: 1 of the 9 or 12 columns of a result"),
    ],
)
def test_what_is_no_such_text_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    assert refusal(Format.VEGETA_CSV, written(tmp_path / "file", content), tmp_path).startswith(said)


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        (Format.K6_CSV, "metric_name,timestamp\na,1\n", "line 1: lacks the column metric_value; it has metric"),
        (Format.K6_CSV, "metric_name,timestamp,metric_value,url,url\n", "line 1: names the column url twice"),
        (Format.K6_CSV, "metric_name,timestamp,metric_value\nvus,1700000000,1\n", "holds no request: make it with k6"),
        (Format.LOCUST_CSV, "timestamp,request_type,name,response_time\n", "line 1: lacks the column status_code"),
        (Format.JMETER_JTL, "timeStamp,elapsed,label\n", "line 1: lacks the column success"),
        (Format.JMETER_JTL, "1700000000000,13,POST,200,OK\n", "line 1: the file has no header"),
        (Format.JMETER_JTL, "<html></html>", "line 1: the root is <html>"),
        (Format.JMETER_JTL, '<!DOCTYPE a [<!ENTITY b "c">]><testResults/>', "line 1: declares a document type"),
        (Format.K6_JSON, "nonsense\n", "line 1: is no JSON object"),
        (Format.HDR_LOG, "a,b\n", "line 1: 2 of an interval's 4 columns"),
        (Format.HDR_LOG, "#[StartTime: 1700000000.000 (seconds since epoch)]\n", "holds no request"),
    ],
)  # fmt: skip
def test_a_file_without_the_form_of_its_format_is_refused(kind: Format, text: str, said: str, tmp_path: Path) -> None:
    assert refusal(kind, written(tmp_path / "file", text), tmp_path).startswith(said)


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    assert (
        refusal(Format.K6_CSV, tmp_path / "none.csv", tmp_path) == "does not exist: give the file that the tool wrote"
    )
    assert refusal(Format.K6_CSV, tmp_path, tmp_path).startswith("is no regular file")
