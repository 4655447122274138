"""What every importer is: rows out of lines, and a word on what its tool cannot know."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from typing import Protocol

from harness.importers.source import LINE_BYTES_MAX, Lines, Unusable
from harness.sample import Sample
from harness.sampleset import Source

FROM_SEND = "Latencies are from send; coordinated omission not excluded."
CLOCK = (
    "Instants are the tool's own wall-clock stamps, in nanoseconds since 1970, taken as one monotonic clock: a step of "
    "that clock during the load would show as an error of the instants, not of the durations."
)
UNKNOWN_EVERYWHERE = (
    "intended_at_ns", "latency_ms", "level", "trial", "worker", "connection_id",
    "server_db_ms", "server_quota_ms", "server_publish_ms", "server_app_ms",
)  # fmt: skip
"""Columns that no file of another tool tells; nor does any tell of runs, resources, machine or commit."""


class Importer(Protocol):
    """One file of one tool."""

    def rows(self, lines: Lines) -> Iterator[Sample]:
        """Yield each request in the order of the file. Raises Unusable."""
        ...

    def source(self) -> Source:
        """Return what the tool is and what it cannot know; complete once all rows were read."""
        ...


def source_of(tool: str, unknown: Sequence[str], notes: Sequence[str]) -> Source:
    """Return the manifest's word on an imported tool."""
    return Source(tool, (*UNKNOWN_EVERYWHERE, *unknown), (FROM_SEND, CLOCK, *notes))


def csv_records(lines: Lines, delimiter: str = ",") -> Iterator[list[str]]:
    """Yield the records of a CSV file; a record may span lines. Raises Unusable."""
    csv.field_size_limit(LINE_BYTES_MAX)
    reader = csv.reader(iter(lines), delimiter=delimiter, strict=True)
    while True:
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as fault:
            raise Unusable(f"is no CSV ({fault}): the file is damaged or cut off") from None
        if record:
            yield record


class Header:
    """The columns of a CSV file by their names."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = [name.strip() for name in names]
        self._at = {name: place for place, name in enumerate(self.names)}

    def require(self, *alternatives: Sequence[str]) -> None:
        """Refuse a header that lacks a column; each argument lists the names that one may have."""
        missing = [" or ".join(names) for names in alternatives if not any(name in self._at for name in names)]
        if missing:
            raise Unusable(f"lacks the column {', '.join(missing)}; it has {', '.join(self.names)[:200]}", shape=True)
        twice = {name for name in self.names if name and self.names.count(name) > 1}
        if twice:
            raise Unusable(f"names the column {min(twice)} twice", shape=True)

    def first(self, *names: str) -> str | None:
        """Return the first of these names that the header has."""
        return next((name for name in names if name in self._at), None)

    def check(self, record: Sequence[str]) -> None:
        """Refuse a record with more or fewer cells than the header."""
        if len(record) != len(self.names):
            raise Unusable(f"has {len(record)} of the header's {len(self.names)} columns: the file is cut off or mixed")

    def cell(self, record: Sequence[str], name: str | None) -> str:
        """Return a cell, or nothing where there is no such column."""
        place = None if name is None else self._at.get(name)
        return "" if place is None else record[place]
