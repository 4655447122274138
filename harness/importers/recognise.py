"""Tells what a file is by its beginning, so that a wrong one is refused with the sentence that helps.

Aggregates are refused whatever was asked for: no quantile, interval or verdict can be had from percentiles that
somebody else computed. Next: the module of each tool.
"""

from __future__ import annotations

import re
from pathlib import Path

from harness.importers.formats import EXPORTS, Format
from harness.importers.source import UTF16_MARKS, NotThisFile

_STATS = re.compile(r'"?(Type|Method)"?,"?Name"?,"?(# requests|Request Count)"?')
_PERCENTILES = re.compile(r'\s*"?Value(\(ms\))?"?[\s,]+"?Percentile"?[\s,]+"?TotalCount"?')
_JTL_HEAD = re.compile(r"(?=[^\n]*\btimeStamp\b)[^\n]*\belapsed\b")
_LOCUST = (
    "holds no request of its own: log each one with locust.contrib.csv_request_logger (Locust 2.47 or later, or the "
    "listener in docs/importing.md) and import that file"
)
_K6 = "export the rows with `k6 run --out csv=FILE` or `--out json=FILE`"
_VEGETA = "export the rows with `vegeta encode --to csv results.bin`"
_HDR = "import the log of interval histograms (.hlog) instead, or the rows of the tool that made it"
_JMETER = "import the results file itself (`jmeter -l FILE`)"

AGGREGATES: tuple[tuple[re.Pattern[str], str], ...] = (
    (_STATS, f"is Locust's _stats.csv, which {_LOCUST}"),
    (re.compile(r'"?Timestamp"?,"?User Count"?,'), f"is Locust's _stats_history.csv, which {_LOCUST}"),
    (re.compile(r'"?Method"?,"?Name"?,"?Error"?,"?Occurrences"?'), f"is Locust's _failures.csv, which {_LOCUST}"),
    (re.compile(r'"?Count"?,"?Message"?,"?Traceback"?'), f"is Locust's _exceptions.csv, which {_LOCUST}"),
    (re.compile(r'"?Name"?,"?# requests"?,"?50%"?'), f"is Locust's _distribution.csv, which {_LOCUST}"),
    (_PERCENTILES, f"is a percentile distribution (.hgrm), no rows: {_HDR}"),
    (re.compile(r"Requests\s+\[total, rate"), f"is a report of Vegeta, no rows: {_VEGETA}"),
    (re.compile(r"Bucket\s+#\s+%"), f"is a histogram report of Vegeta, no rows: {_VEGETA}"),
    (re.compile(r'\{\s*"latencies"\s*:'), f"is a JSON report of Vegeta, no rows: {_VEGETA}"),
    (re.compile(r'\{\s*"(root_group|metrics|options|state)"\s*:'), f"is k6's summary, no rows: {_K6}"),
    (re.compile(r"Label[,;\t]# Samples"), f"is an aggregate or summary report of JMeter, no rows: {_JMETER}"),
    (re.compile(r'\{\s*"[^"]*"\s*:\s*\{\s*"transaction"'), f"is JMeter's statistics.json, no rows: {_JMETER}"),
)  # fmt: skip

_ROWS: tuple[tuple[re.Pattern[str], Format], ...] = (
    (re.compile(r'"?metric_name"?,'), Format.K6_CSV),
    (re.compile(r'\{.{0,2000}?"type"\s*:\s*"(Point|Metric)"', re.DOTALL), Format.K6_JSON),
    (re.compile(r'\{.{0,2000}?"latency"\s*:\s*-?\d', re.DOTALL), Format.VEGETA_JSON),
    (re.compile(r'"?\d{16,19}"?,"?\d{1,3}"?,"?-?\d+"?,"?\d+"?,"?\d+"?,'), Format.VEGETA_CSV),
    (_JTL_HEAD, Format.JMETER_JTL),
    (re.compile(r"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<testResults", re.DOTALL), Format.JMETER_JTL),
    (re.compile(r'(?=[^\n]*\brequest_type\b)[^\n]*\bresponse_time'), Format.LOCUST_CSV),
    (re.compile(r'#\[|"StartTimestamp"|(Tag=[^,\n]*,)?[\d.]+,[\d.]+,[\d.]+,HIST'), Format.HDR_LOG),
)  # fmt: skip


def require(path: Path, head: bytes, wanted: Format) -> None:
    """Refuse a file that is empty, no text, an aggregate, or plainly another format. Raises NotThisFile."""
    if not head.strip():
        raise NotThisFile(path, f"is empty: make it with {EXPORTS[wanted]}")
    if head.startswith(UTF16_MARKS):
        raise NotThisFile(path, "is UTF-16, as PowerShell redirects it: save it as UTF-8")
    if _binary(head):
        if b"Attack" in head and b"Latency" in head:
            raise NotThisFile(path, f"holds Vegeta's own binary results (gob), which only Vegeta reads: {_VEGETA}")
        raise NotThisFile(path, f"is no text: {wanted} is made with {EXPORTS[wanted]}")
    text = head.decode("utf-8", errors="replace").removeprefix("\ufeff").lstrip()
    for pattern, sentence in AGGREGATES:
        if pattern.match(text):
            raise NotThisFile(path, sentence)
    found = next((kind for pattern, kind in _ROWS if pattern.match(text)), None)
    if found is not None and found is not wanted:
        raise NotThisFile(path, f"looks like {found}, not {wanted}: give --from {found}")


def _binary(head: bytes) -> bool:
    """Say whether these bytes are no UTF-8 text; a character cut at their end is none of their faults."""
    if b"\0" in head:
        return True
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as fault:
        return fault.start < len(head) - 3
    return False
