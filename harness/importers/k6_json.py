"""k6's JSON output (`k6 run --out json=FILE`): one JSON object in a line, a `Metric` that declares or a `Point`."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from harness.importers.fields import rfc3339_ns
from harness.importers.jsonlines import decoded
from harness.importers.k6 import METRICS, Assembly, Point
from harness.importers.source import Lines, Unusable
from harness.sample import Sample
from harness.sampleset import Source


class _Data(msgspec.Struct):
    """What a point says; of a declaration, only the unit of the metric is read."""

    time: str | None = None
    value: float | None = None
    tags: dict[str, str] | None = None
    metadata: dict[str, str] | None = None
    contains: str | None = None


class _Line(msgspec.Struct):
    type: str
    metric: str
    data: _Data


class K6Json:
    """One JSON file of k6."""

    def __init__(self) -> None:
        self._assembly = Assembly()

    def rows(self, lines: Lines) -> Iterator[Sample]:
        """Yield each request."""
        for line in decoded(lines, msgspec.json.Decoder(_Line)):
            if line.metric not in METRICS:
                continue
            if line.type == "Point":
                yield from self._assembly.take(_point(line))
            elif line.metric.startswith("http_req_") and line.data.contains not in {None, "time", "default"}:
                raise Unusable(f"{line.metric} is declared as {line.data.contains!r}, not as a time", "data.contains")
        yield from self._assembly.finish()

    def source(self) -> Source:
        """Return what k6 cannot know."""
        return self._assembly.source()


def _point(line: _Line) -> Point:
    data, tags = line.data, line.data.tags or {}
    if data.time is None or data.value is None:
        raise Unusable("a point lacks its time or its value", "data")
    if data.value < 0:
        raise Unusable(f"{data.value:g} is negative", "data.value")
    vu = (data.metadata or {}).get("vu") or tags.get("vu")
    # Go leaves out a fraction that is zero; the stamp is exact all the same.
    return Point(line.metric, rfc3339_ns(data.time, "data.time")[0], exact=True, value=data.value, tags=tags, vu=vu)
