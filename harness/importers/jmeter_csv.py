"""JMeter's results file (JTL): its CSV form with a header, or, if it is XML, handed to `jmeter_xml`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from harness.importers.importer import Header, csv_records
from harness.importers.jmeter import JmeterSample, jmeter_source, row_of
from harness.importers.jmeter_xml import XmlSamples
from harness.importers.source import Lines, Unusable
from harness.sample import Sample
from harness.sampleset import Source

DELIMITERS = ",;\t|"
FIELDS = tuple(field.name for field in dataclasses.fields(JmeterSample))


class JmeterJtl:
    """One results file of JMeter."""

    def __init__(self) -> None:
        self._left_out = 0

    def rows(self, lines: Lines) -> Iterator[Sample]:
        """Yield each sample."""
        ordinal = 0
        for one in self._samples(lines):
            if one.sums_up:
                self._left_out += 1
                continue
            ordinal += 1
            yield row_of(ordinal, one)

    def source(self) -> Source:
        """Return what JMeter cannot know."""
        return jmeter_source(self._left_out)

    def _samples(self, lines: Lines) -> Iterator[JmeterSample]:
        head = lines.head().removeprefix(b"\xef\xbb\xbf").lstrip()
        if head.startswith(b"<"):
            found = XmlSamples(lines)
            yield from found.samples()
            self._left_out += found.containers
            return
        first = head.split(b"\n", 1)[0].decode("utf-8", errors="replace")
        delimiter = max(DELIMITERS, key=first.count)
        records = csv_records(lines, delimiter)
        header = Header(next(records))
        if header.names and header.names[0].isdigit():
            raise Unusable(
                "the file has no header: set jmeter.save.saveservice.print_field_names=true and measure again, or "
                "write the names of its columns into its first line", shape=True,
            )  # fmt: skip
        header.require(["timeStamp"], ["elapsed"], ["success"], ["label", "URL"])
        for record in records:
            header.check(record)
            yield JmeterSample(**{name: header.cell(record, name).strip() for name in FIELDS})
