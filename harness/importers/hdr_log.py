"""HdrHistogram's interval log (.hlog, format 1.2 and 1.3): a histogram of each interval, in lines.

A histogram keeps how often each value came, to so many significant digits, and neither order nor instant within its
interval. So each counted value becomes a row whose `service_ms` is the highest value of its slot: what HdrHistogram
itself reports as a percentile, and never faster than the truth. `done_at_ns` is the end of the interval. All rows of an
interval form one group, in an arbitrary but fixed order, because their own is not known.

Neither the unit of the values nor failures are in a log: the first is given (`--unit`, nanoseconds by default as in
jHiccup), the second stay unknown, and no verdict is made on them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from harness.importers.fields import DURATION_NS_MAX, duration_ns, number, shown
from harness.importers.formats import Unit
from harness.importers.hdr_codec import COLUMN, decode
from harness.importers.importer import source_of
from harness.importers.rows import Target, request_row, target_of
from harness.importers.source import Lines, Unusable
from harness.sample import Outcome, Sample
from harness.sampleset import Source

COLUMNS = ("StartTimestamp", "Interval_Length", "Interval_Max", COLUMN)
UNKNOWN = ("outcome", "status", "error", "sent_at_ns", "first_byte_at_ns", "response_bytes")
NOTES = (
    "Each counted value is a row with the highest value of its histogram slot: no request is made faster than it was.",
    "Rows of an interval are one group in arbitrary order, done at its end: their own order and instants are unknown.",
    "Failures are not in a log of histograms: every row counts as answered, and no verdict is made on failures.",
    "Whether values were corrected for coordinated omission when they were recorded is not in the log.",
)
YEAR_S = 365 * 86_400  # a stamp so much before the log's start counts from it (HistogramLogReader)
INTERVAL_VALUES_MAX = 50_000_000  # rows of one interval; more would fill a disk

_STARTS = re.compile(r"#\[(StartTime|BaseTime):\s*([0-9.]+)")


class HdrLog:
    """One interval log."""

    def __init__(self, unit: Unit | None) -> None:
        self._unit = unit or Unit.NS
        self._unit_given = unit is not None
        self._start_s: dict[str, float] = {}
        self._interval = 0
        self._ordinal = 0
        self._digits: int | None = None  # the fewest significant ones of a histogram
        self._step = 1  # the coarsest of a histogram
        self._absolute = True

    def rows(self, lines: Lines) -> Iterator[Sample]:
        """Yield a row for each counted value, interval by interval."""
        for line in lines:
            text = line.strip()
            if text.startswith("#"):
                if found := _STARTS.match(text):
                    self._start_s[found[1]] = float(number(found[2], found[1]))
            elif text and not text.startswith('"StartTimestamp"'):
                yield from self._of_interval(text)

    def source(self) -> Source:
        """Return what a log of histograms cannot know."""
        assumed = "was given" if self._unit_given else "is assumed, for the log does not say it (--unit)"
        notes = [
            f"The unit of the values, {self._unit}, {assumed}.",
            f"Values have {self._digits} significant digits and are no finer than {self._step:,} {self._unit}.",
            *NOTES,
        ]
        if not self._absolute:
            notes.append("The log says not when it began: instants count from its own zero.")
        return source_of("hdrhistogram", UNKNOWN, notes)

    def _of_interval(self, text: str) -> Iterator[Sample]:
        tag = None
        if text.startswith("Tag="):
            tag, _, text = text.removeprefix("Tag=").partition(",")
        cells = text.split(",")
        if len(cells) != len(COLUMNS):
            raise Unusable(f"{len(cells)} of an interval's {len(COLUMNS)} columns: cut off, or no log", shape=True)
        start_s = float(number(cells[0], COLUMNS[0]))
        length_ns = duration_ns(cells[1], COLUMNS[1], 10**9)
        number(cells[2], COLUMNS[2])
        self._interval += 1
        ends_at_ns = round((start_s + self._offset_s(start_s)) * 1000) * 1_000_000 + length_ns
        if not 0 <= ends_at_ns <= 2**62:
            raise Unusable(f"{shown(cells[0])} is no instant", COLUMNS[0])
        target = target_of(None, tag)
        for service_ns in self._values(cells[3]):
            yield self._row(service_ns, ends_at_ns, target, tag)

    def _offset_s(self, start_s: float) -> float:
        """Return what a stamp counts from: the log's base, or its start, unless it is a Unix time itself."""
        base = self._start_s.get("BaseTime")
        if base is not None:
            return base
        began = self._start_s.get("StartTime", 0.0)
        self._absolute &= began > 0.0 or start_s > YEAR_S
        return began if start_s < began - YEAR_S else 0.0

    def _values(self, encoded: str) -> list[int]:
        """Return the values of one histogram in nanoseconds, in a fixed order that says nothing."""
        values: list[int] = []
        histogram = decode(encoded)
        self._digits = min(histogram.digits, self._digits or histogram.digits)
        self._step = max(histogram.step, self._step)
        for low, high, count in histogram.slots():
            if len(values) + count > INTERVAL_VALUES_MAX:
                raise Unusable(f"counts more than {INTERVAL_VALUES_MAX:,} values in one interval", COLUMN)
            if low * self._unit.in_ns > DURATION_NS_MAX:
                raise Unusable(f"counts {high} {self._unit}, longer than a day: give the right --unit", COLUMN)
            values += [high * self._unit.in_ns] * count
        random.Random(self._interval).shuffle(values)  # noqa: S311 - a fixed order, no secret
        return values

    def _row(self, service_ns: int, ends_at_ns: int, target: Target, tag: str | None) -> Sample:
        self._ordinal += 1
        return request_row(
            ordinal=self._ordinal, target=target, scenario=tag, service_ns=service_ns, outcome=Outcome.OK, status=None,
            error=None, done_at_ns=ends_at_ns, run_key=f"interval-{self._interval}",
        )  # fmt: skip
