"""Vegeta's results after `vegeta encode`, as CSV without a header or as JSON lines (Vegeta 12).

A result is stamped when its worker picked it up, and its latency runs from there to the last byte. When every worker
is busy an arrival waits for one before it is stamped, and Vegeta does not say so. Columns of the CSV: Unix time in ns,
status, latency in ns, bytes out, bytes in, error, body in base64, attack, sequence number and, since 12.9, method, URL
and headers in base64. Bodies and headers are not kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from harness.importers.fields import DURATION_NS_MAX, StampUnit, duration_ns, instant_ns, rfc3339_ns, whole
from harness.importers.importer import csv_records, source_of
from harness.importers.jsonlines import decoded
from harness.importers.rows import outcome_of, request_row, target_of, unanswered
from harness.importers.source import Lines, Unusable
from harness.sample import Outcome, Sample
from harness.sampleset import Source

COLUMNS = (
    "timestamp", "code", "latency", "bytes_out", "bytes_in", "error",
    "body", "attack", "seq", "method", "url", "headers",
)  # fmt: skip
COLUMNS_MIN = 9  # before Vegeta 12.9: no method, URL and headers
BYTES_MAX = 2**62
STATUS_MAX = 999

NOTES = (
    "An arrival that waited for a free worker is stamped after that wait; a load with -max-workers can hide a stall.",
    "response_bytes counts the body only.",
    "A status outside of 2xx and 304 is http_error, also where Vegeta counted it as a success.",
)


class _Result(msgspec.Struct):
    """One line of JSON; body and headers are passed over."""

    timestamp: str
    latency: int
    code: int
    error: str = ""
    bytes_in: int | None = None
    attack: str = ""
    method: str = ""
    url: str = ""


class VegetaCsv:
    """One CSV file of Vegeta."""

    def rows(self, lines: Lines) -> Iterator[Sample]:
        """Yield each result."""
        for ordinal, record in enumerate(csv_records(lines), start=1):
            if not COLUMNS_MIN <= len(record) <= len(COLUMNS):
                raise Unusable(
                    f"{len(record)} of the {COLUMNS_MIN} or {len(COLUMNS)} columns of a result: the file is cut off, "
                    f"or not made by `vegeta encode --to csv`", shape=True,
                )  # fmt: skip
            cells = dict(zip(COLUMNS, record, strict=False))
            yield _row(
                ordinal,
                instant_ns(cells["timestamp"], "timestamp", StampUnit.NS),
                duration_ns(cells["latency"], "latency", 1),
                whole(cells["code"], "code", STATUS_MAX),
                whole(cells["bytes_in"], "bytes_in", BYTES_MAX),
                cells["error"], cells["attack"], cells.get("method", ""), cells.get("url", ""),
            )  # fmt: skip

    def source(self) -> Source:
        """Return what Vegeta cannot know."""
        return source_of("vegeta", ("first_byte_at_ns",), NOTES)


class VegetaJson:
    """One file of JSON lines of Vegeta."""

    def rows(self, lines: Lines) -> Iterator[Sample]:
        """Yield each result."""
        for ordinal, one in enumerate(decoded(lines, msgspec.json.Decoder(_Result)), start=1):
            if not 0 <= one.latency <= DURATION_NS_MAX:
                raise Unusable(f"{one.latency} is no latency in nanoseconds: negative, or longer than a day", "latency")
            if not 0 <= one.code <= STATUS_MAX:
                raise Unusable(f"{one.code} is no HTTP status", "code")
            if one.bytes_in is not None and not 0 <= one.bytes_in <= BYTES_MAX:
                raise Unusable(f"{one.bytes_in} is no number of bytes", "bytes_in")
            at_ns, _ = rfc3339_ns(one.timestamp, "timestamp")
            yield _row(ordinal, at_ns, one.latency, one.code, one.bytes_in, one.error, one.attack, one.method, one.url)

    def source(self) -> Source:
        """Return what Vegeta cannot know."""
        return source_of("vegeta", ("first_byte_at_ns",), NOTES)


def _row(
    ordinal: int,
    sent_at_ns: int,
    latency_ns: int,
    code: int,
    bytes_in: int | None,
    error: str,
    attack: str,
    method: str,
    url: str,
) -> Sample:
    status = code or None
    outcome = outcome_of(status, error, accepted=status is not None)
    if outcome is Outcome.OK and error:  # the head came, the body did not
        outcome = unanswered(error)
    return request_row(
        ordinal=ordinal, target=target_of(method or None, url), scenario=attack, service_ns=latency_ns,
        outcome=outcome, status=status, error=error or None,
        sent_at_ns=sent_at_ns, done_at_ns=sent_at_ns + latency_ns,
        response_bytes=bytes_in if status is not None else None,
    )  # fmt: skip
