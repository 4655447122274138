"""Locust's request log: a CSV file with a row for each `request` event.

Locust's own files hold aggregates. Rows come from a listener: `locust.contrib.csv_request_logger` (Locust 2.47), whose
columns are `timestamp, request_type, name, response_time_ms, response_length, status_code, exception`, or one that
writes the event's own names (`start_time`, `response_time`, …). A header is required. Accepted, in any order:

    start_time or timestamp           when it was sent: Unix seconds, or RFC 3339 with its zone
    request_type or method            GET, POST, …
    name                              Locust's name of the request; `url`, where there is one, tells before it
    response_time_ms or response_time milliseconds
    status_code, exception, success   at least one of them: without, a failure could not be told
    response_length                   bytes of the body

Locust is a closed loop: while a user waits, the requests that others would have made are not in the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from harness.importers.fields import StampUnit, duration_ns, instant_ns, rfc3339_ns, shown, unit_of, whole
from harness.importers.importer import Header, csv_records, source_of
from harness.importers.rows import outcome_of, request_row, target_of
from harness.importers.source import Lines, Unusable
from harness.sample import Outcome, Sample
from harness.sampleset import Source

BYTES_MAX = 2**62
STATUS_MAX = 999
NOTHING = frozenset({"", "none", "null"})  # how listeners write that there is no exception
TRUTHS = {"true": True, "1": True, "success": True, "false": False, "0": False, "failure": False}
REJECTED = "CatchResponseError"  # an answer came, and the test's own code rejected it


class LocustCsv:
    """One request log of Locust."""

    def rows(self, lines: Lines) -> Iterator[Sample]:
        """Yield each request."""
        records = csv_records(lines)
        header = Header(next(records))
        header.require(
            ["start_time", "timestamp"],
            ["request_type", "method"],
            ["name"],
            ["response_time_ms", "response_time"],
            ["status_code", "exception", "success"],
        )
        for ordinal, record in enumerate(records, start=1):
            header.check(record)
            yield _row(ordinal, header, record)

    def source(self) -> Source:
        """Return what Locust cannot know."""
        return source_of(
            "locust",
            ("scenario", "first_byte_at_ns"),
            (
                "Locust is a closed loop: requests that were not made while users waited are not in the file.",
                "response_bytes counts the body only.",
                "A row of a client that gives Locust no start time is stamped at its end.",
            ),
        )


def _row(ordinal: int, header: Header, record: Sequence[str]) -> Sample:
    def cell(*names: str) -> str:
        return header.cell(record, header.first(*names)).strip()

    sent_at_ns = _instant(cell("start_time", "timestamp"), header.first("start_time", "timestamp") or "timestamp")
    column = header.first("response_time_ms", "response_time") or "response_time"
    service_ns = duration_ns(cell(column), column, StampUnit.MS)
    code = cell("status_code")
    status = (None if code.lower() in NOTHING else whole(code, "status_code", STATUS_MAX)) or None
    exception = "" if cell("exception").lower() in NOTHING else cell("exception")
    accepted = not exception and _success(cell("success"))
    if header.first("exception", "success") is None:
        accepted = status is not None  # the status is all there is
    outcome = outcome_of(status, exception, accepted=accepted)
    if status is None and exception.startswith(REJECTED):
        outcome = Outcome.HTTP_ERROR
    length = cell("response_length")
    size = None if length.lower() in NOTHING or status is None else whole(length, "response_length", BYTES_MAX)
    return request_row(
        ordinal=ordinal, target=target_of(cell("request_type", "method"), cell("url"), cell("name")), scenario=None,
        service_ns=service_ns, outcome=outcome, status=status, error=exception or None,
        sent_at_ns=sent_at_ns, done_at_ns=sent_at_ns + service_ns, response_bytes=size,
    )  # fmt: skip


def _instant(text: str, column: str) -> int:
    if unit_of(text) is StampUnit.S:
        return instant_ns(text, column, StampUnit.S)
    if "T" in text or " " in text:
        return rfc3339_ns(text, column)[0]
    raise Unusable(f"{shown(text)} is no Unix time in seconds of this century", column)


def _success(text: str) -> bool:
    if not text:
        return True
    if text.lower() not in TRUTHS:
        raise Unusable(f"{shown(text)} is neither true nor false", "success")
    return TRUTHS[text.lower()]
