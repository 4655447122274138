"""Which files of which tools are imported, by the names that `--from` takes."""

from __future__ import annotations

import enum


class Format(enum.StrEnum):
    """What wrote the file, and how."""

    K6_CSV = "k6-csv"  # k6 run --out csv=FILE
    K6_JSON = "k6-json"  # k6 run --out json=FILE
    VEGETA_CSV = "vegeta-csv"  # vegeta encode --to csv
    VEGETA_JSON = "vegeta-json"  # vegeta encode --to json
    LOCUST_CSV = "locust-csv"  # the request log of locust.contrib.csv_request_logger, or of a listener like it
    JMETER_JTL = "jmeter-jtl"  # jmeter -n -l FILE, as CSV or XML
    HDR_LOG = "hdr-log"  # HdrHistogram's interval log (.hlog)


class Unit(enum.StrEnum):
    """In what the values of a histogram were counted: its log does not say."""

    NS = "ns"
    US = "us"
    MS = "ms"

    @property
    def in_ns(self) -> int:
        """Return how many nanoseconds one is."""
        return {"ns": 1, "us": 1_000, "ms": 1_000_000}[self.value]


EXPORTS = {
    Format.K6_CSV: "k6 run --out csv=FILE",
    Format.K6_JSON: "k6 run --out json=FILE",
    Format.VEGETA_CSV: "vegeta encode --to csv results.bin > FILE",
    Format.VEGETA_JSON: "vegeta encode --to json results.bin > FILE",
    Format.LOCUST_CSV: "locust.contrib.csv_request_logger.CsvRequestLogger(FILE)",
    Format.JMETER_JTL: "jmeter -n -t PLAN -l FILE",
    Format.HDR_LOG: "HistogramLogWriter, one line per interval",
}
"""How each is made."""
