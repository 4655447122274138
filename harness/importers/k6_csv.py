"""k6's CSV output (`k6 run --out csv=FILE`): one metric point in a row, its tags in columns.

The columns after the first three are the system tags that the test asked for; other tags are in `extra_tags`, the VU,
if asked for, in `metadata` (or in a column of its own before k6 0.44).
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator, Sequence

from harness.importers.fields import StampUnit, instant_ns, number, rfc3339_ns, shown, unit_of
from harness.importers.importer import Header, csv_records
from harness.importers.k6 import METRICS, Assembly, Point
from harness.importers.source import Lines, Unusable
from harness.sample import Sample
from harness.sampleset import Source

TAGS = ("check", "error", "error_code", "expected_response", "group", "method", "name", "scenario", "status", "url")


class K6Csv:
    """One CSV file of k6."""

    def __init__(self) -> None:
        self._assembly = Assembly()
        self._unit: StampUnit | None = None
        self._is_text: bool | None = None  # stamps as RFC 3339; null before the first one

    def rows(self, lines: Lines) -> Iterator[Sample]:
        """Yield each request."""
        records = csv_records(lines)
        header = Header(next(records))
        header.require(["metric_name"], ["timestamp"], ["metric_value"])
        for record in records:
            header.check(record)
            if header.cell(record, "metric_name") in METRICS:
                yield from self._assembly.take(self._point(header, record))
        yield from self._assembly.finish()

    def source(self) -> Source:
        """Return what k6 cannot know."""
        return self._assembly.source()

    def _point(self, header: Header, record: Sequence[str]) -> Point:
        tags = {tag: text for tag in TAGS if (text := header.cell(record, tag))}
        at_ns, exact = self._instant(header.cell(record, "timestamp"))
        value = float(number(header.cell(record, "metric_value"), "metric_value"))
        if value < 0:
            raise Unusable(f"{value:g} is negative", "metric_value")
        return Point(
            metric=header.cell(record, "metric_name"), at_ns=at_ns, exact=exact, value=value, tags=tags,
            vu=header.cell(record, "vu") or _vu(header.cell(record, "metadata")),
        )  # fmt: skip

    def _instant(self, text: str) -> tuple[int, bool]:
        """Return the stamp and whether it says more than the second; all stamps of a file have one unit."""
        unit = unit_of(text)
        is_text = unit is None and "T" in text
        if self._is_text is None:
            self._is_text, self._unit = is_text, unit
        if is_text != self._is_text or unit is not self._unit:
            if unit is None and not is_text:
                raise Unusable(f"{shown(text)} is no instant of this century", "timestamp")
            raise Unusable(f"{shown(text)} is in another unit than the stamps before it", "timestamp")
        if is_text:
            return rfc3339_ns(text, "timestamp")
        if unit is None:
            raise Unusable(f"{shown(text)} is no instant of this century", "timestamp")
        return instant_ns(text, "timestamp", unit), unit is not StampUnit.S


def _vu(metadata: str) -> str | None:
    """Return the VU out of "iter=0&vu=3"."""
    return dict(urllib.parse.parse_qsl(metadata)).get("vu") if "vu=" in metadata else None
