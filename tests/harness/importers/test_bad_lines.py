"""A damaged line is named with its file, line and column, and what stood before it is kept as an incomplete set."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from harness.errors import ExitCode
from harness.importers import source
from harness.importers.formats import Format, Unit
from harness.importers.intake import import_file
from harness.importers.source import BadLine
from harness.sampleset import read_sample_set
from tests.harness.importers.reading import FILES, written

VEGETA = "1700000000000000000,200,1000,0,0,,,a,0\n"
RESULT = '{{"timestamp":"2023-11-14T22:13:20Z","latency":{},"code":{},"bytes_in":{}}}\n'
HISTOGRAM = "HISTFAAAAD942pNpmSzMwMAgwwABTBDKT4GBgdnNYMcCBvsPEBE+Ph4OLgk5OSkeIS4+LgEeswIDo1+MbmdYNASYAA51CSo="


def point(time: str = '"2023-11-14T22:13:20Z"', value: str = "1", metric: str = "http_req_duration") -> str:
    """Return one line of k6's JSON; time and value as they stand in it."""
    return f'{{"metric":"{metric}","type":"Point","data":{{"time":{time},"value":{value},"tags":{{}}}}}}\n'


def vegeta(old: str, new: str) -> str:
    """Return a result of which something was changed."""
    return VEGETA.replace(old, new)


GOOD = {
    Format.K6_CSV: "metric_name,timestamp,metric_value,status,url\nhttp_req_duration,1700000000,1,200,u\n",
    Format.K6_JSON: point(),
    Format.VEGETA_CSV: VEGETA,
    Format.VEGETA_JSON: RESULT.format(1, 200, 0),
    Format.LOCUST_CSV: (
        "timestamp,request_type,name,response_time_ms,status_code,success\n1700000000.5,GET,/,1,200,true\n"
    ),
    Format.JMETER_JTL: "timeStamp,elapsed,label,responseCode,success\n1700000000000,1,a,200,true\n",
    Format.HDR_LOG: f"#[x]\n1700000000.0,1.0,0.4,{HISTOGRAM}\n",
}
"""What each bad line stands behind."""

DURATION = "http_req_duration"
DECLARED = '{"metric":"http_req_duration","type":"Metric","data":{"contains":"data"}}\n'
COUNTS = "Interval_Compressed_Histogram"

FAULTS: dict[Format, list[tuple[str, str | None, str]]] = {
    Format.K6_CSV: [
        (f"{DURATION},1700000000,NaN,200,u\n", "metric_value", "'NaN' is no finite number"),
        (f"{DURATION},1700000000,-1,200,u\n", "metric_value", "-1 is negative"),
        (f"{DURATION},1700000000,1e12,200,u\n", "metric_value", "1e+12 is no duration in milliseconds"),
        (f"{DURATION},1700000000000,1,200,u\n", "timestamp", "'1700000000000' is in another unit"),
        (f"{DURATION},2023-11-14T22:13:20Z,1,200,u\n", "timestamp", "'2023-11-14T22:13:20Z' is in another unit"),
        (f"{DURATION},yesterday,1,200,u\n", "timestamp", "'yesterday' is no instant"),
        (f"{DURATION},1700000000,1,2x0,u\n", "status", "'2x0' is no HTTP status"),
        (f"{DURATION},17000", None, "has 2 of the header's 5 columns"),
        ("dropped_iterations,1700000000,1e9,,\n", "metric_value", "1e+09 is no number of dropped_iterations"),
        ("http_reqs,1700000000,2,200,u\n", None, "of 2 counted requests (http_reqs), 1 are without"),
        ('http_reqs,1700000000,1,200,"u\n', None, "is no CSV (unexpected end of data)"),
    ],
    Format.K6_JSON: [
        (point()[:40], None, "is no JSON object"),
        ("[1, 2]\n", None, "Expected `object`, got `array`"),
        (point(time="5"), "data.time", "Expected `str | null`, got `int`"),
        (point(time='"now"'), "data.time", "'now' is no instant such as"),
        (point(time="null"), "data", "a point lacks its time"),
        (point(value="-1"), "data.value", "-1 is negative"),
        (point(value="NaN"), None, "is no JSON object"),
        (DECLARED, "data.contains", "http_req_duration is declared as 'data'"),
    ],
    Format.VEGETA_CSV: [
        (vegeta("000000000,200", ",200"), "timestamp", "'1700000000' is no Unix time in nanoseconds"),
        (vegeta(",1000,", ",-5,"), "latency", "'-5' is a negative duration"),
        (vegeta(",1000,", ",1.2e20,"), "latency", "'1.2e20' is longer than a day"),
        (vegeta(",200,", ",20000,"), "code", "'20000' is more than 999"),
        (vegeta(",0,0,", ",0,0.5,"), "bytes_in", "'0.5' is no whole number"),
        (vegeta(",0,0,", ",0,-1,"), "bytes_in", "'-1' is negative"),
        ("1700000000", None, "1 of the 9 or 12 columns of a result"),
    ],
    Format.VEGETA_JSON: [
        (RESULT.format(-1, 200, 0), "latency", "-1 is no latency in nanoseconds"),
        (RESULT.format(1, 2000, 0), "code", "2000 is no HTTP status"),
        (RESULT.format(1, 200, -1), "bytes_in", "-1 is no number of bytes"),
        (RESULT.format('"1s"', 200, 0), "latency", "Expected `int`, got `str`"),
        ('{"latency": 1}', None, "Object missing required field `timestamp`"),
    ],
    Format.LOCUST_CSV: [
        ("1700000000500,GET,/,1,200,true\n", "timestamp", "'1700000000500' is no Unix time in seconds"),
        ("1700000000.5,GET,/,fast,200,true\n", "response_time_ms", "'fast' is no number"),
        ("1700000000.5,GET,/,1,200,yes\n", "success", "'yes' is neither true nor false"),
        ("1700000000.5,GET,/,1,OK,true\n", "status_code", "'OK' is no number"),
    ],
    Format.JMETER_JTL: [
        ("1700000000,1,a,200,true\n", "timeStamp", "'1700000000' is no Unix time in milliseconds"),
        ("1700000000000,-1,a,200,true\n", "elapsed", "'-1' is a negative duration"),
        ("1700000000000,1,a,200,maybe\n", "success", "'maybe' is neither true nor false"),
    ],
    Format.HDR_LOG: [
        ("1700000001.0,1.0\n", None, "2 of an interval's 4 columns"),
        (f"1700000001.0,-1.0,0.4,{HISTOGRAM}\n", "Interval_Length", "'-1.0' is a negative duration"),
        (f"-5,1.0,0.4,{HISTOGRAM}\n", "StartTimestamp", "'-5' is no instant"),
        (f"1700000001.0,1.0,0.4,{HISTOGRAM[:-9]}\n", COUNTS, "is no base64"),
    ],
}

XML = '<testResults>\n<httpSample t="1" ts="1700000000000" s="true" lb="a" rc="200"/>\n'
WHOLE_FILES: list[tuple[Format, str | bytes, int, str | None, str]] = [
    (Format.JMETER_JTL, XML, 3, None, "is no XML (no element found)"),
    (Format.JMETER_JTL, XML + '<sample ts="1" s="true"/></testResults>', 3, "t", "a <sample> lacks its attribute t"),
    (Format.JMETER_JTL, XML + "</wrong>", 3, None, "is no XML (mismatched tag)"),
    (Format.VEGETA_CSV, VEGETA.encode() * 9_000 + b"17\xff\n", 9_001, None, "byte 3 is not UTF-8"),
    (Format.VEGETA_CSV, VEGETA * 9_000 + "17\0\n", 9_001, None, "holds a zero byte"),
    (Format.VEGETA_CSV, gzip.compress(VEGETA.encode() * 9, mtime=0)[:-9], 9, None, "the compressed data end early"),
]


@pytest.mark.parametrize(
    ("kind", "content", "line", "column", "said"),
    [
        *(
            (kind, GOOD[kind] + bad, GOOD[kind].count("\n") + 1, column, said)
            for kind, faults in FAULTS.items() for bad, column, said in faults
        ),
        *WHOLE_FILES,
    ],
)  # fmt: skip
def test_a_bad_line_is_named(
    kind: Format, content: str | bytes, line: int, column: str | None, said: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "file", content)
    with pytest.raises(BadLine) as refused:
        import_file(kind, path, tmp_path / "samples")
    fault = refused.value
    assert fault.exit_code is ExitCode.INVALID
    assert (fault.path, fault.line, fault.column) == (path, line, column)
    assert fault.text.startswith(said)
    assert "\n" not in str(fault)
    for folder in (tmp_path / "samples").glob("*"):
        assert read_sample_set(folder).manifest.complete is False


def test_what_stood_before_it_is_kept_as_an_incomplete_set(tmp_path: Path) -> None:
    with pytest.raises(BadLine) as refused:
        import_file(Format.VEGETA_CSV, written(tmp_path / "cut.csv", VEGETA * 3 + "17"), tmp_path / "samples")
    (folder,) = (tmp_path / "samples").iterdir()
    kept = read_sample_set(folder)
    assert str(refused.value).endswith(f"(rows kept from before it: 3, in {folder}, which is not complete)")
    assert (len(kept.samples), kept.manifest.planned_requests, kept.manifest.complete) == (3, 3, False)


def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "LINE_BYTES_MAX", 100)
    path = written(tmp_path / "long.csv", VEGETA + VEGETA.replace(",a,", f",{'a' * 200},"))
    with pytest.raises(BadLine, match="line 2: is longer than 100 bytes"):
        import_file(Format.VEGETA_CSV, path, tmp_path / "samples")


def test_values_in_the_wrong_unit_are_told(tmp_path: Path) -> None:
    with pytest.raises(BadLine, match="longer than a day: give the right --unit"):
        import_file(Format.HDR_LOG, FILES / "jHiccup-2.0.7S.logV2.hlog", tmp_path / "samples", unit=Unit.MS)
