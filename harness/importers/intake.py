"""From another tool's file to a closed sample set.

The file is read twice: once for its hash, which names the measurement (so the same file imported twice is one
measurement, and a report that is given both refuses them), and once for its rows, `PART_ROWS` at a time, so that memory
stays flat. What was read before a damaged line is kept as an incomplete set, as after a harness that was killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.errors import BadUsage, HarnessError
from harness.importers.formats import EXPORTS, Format, Unit
from harness.importers.hdr_log import HdrLog
from harness.importers.importer import Importer
from harness.importers.jmeter_csv import JmeterJtl
from harness.importers.k6_csv import K6Csv
from harness.importers.k6_json import K6Json
from harness.importers.locust import LocustCsv
from harness.importers.recognise import require
from harness.importers.rows import SCENARIO
from harness.importers.shown import Tell, shown
from harness.importers.source import BadLine, Lines, NotThisFile, Unusable, opened
from harness.importers.vegeta import VegetaCsv, VegetaJson
from harness.measurement import Interrupted
from harness.recorder import Recorder, require_writable, unwritable
from harness.sample import Endpoint, Mode, Outcome, Sample
from harness.sampleset import Clock, Instant
from harness.tablefiles import PART_ROWS

IMPORTERS: dict[Format, Callable[[], Importer]] = {
    Format.K6_CSV: K6Csv,
    Format.K6_JSON: K6Json,
    Format.VEGETA_CSV: VegetaCsv,
    Format.VEGETA_JSON: VegetaJson,
    Format.LOCUST_CSV: LocustCsv,
    Format.JMETER_JTL: JmeterJtl,
}
"""Those that need to be told nothing; HdrLog takes the unit of its values."""


@dataclasses.dataclass(frozen=True, slots=True)
class Imported:
    """What was made of a file."""

    samples: str  # the set's folder
    tool: str
    rows: int
    endpoints: dict[str, dict[str, int]]  # rows by endpoint and outcome; an endpoint that none asked for is not listed
    notes: tuple[str, ...]  # what the tool cannot know

    def lines(self) -> list[str]:
        """Return a short table and the notes."""
        head = f"{'endpoint':<10}{'rows':>10}{'failed':>10}{'not sent':>10}"
        table = [
            f"{name:<10}{sum(by.values()):>10}{sum(by.values()) - by.get('ok', 0):>10}{by.get('not_sent', 0):>10}"
            for name, by in self.endpoints.items()
        ]
        return [head, *table, *(f"note: {note}" for note in self.notes)]


def import_file(
    kind: Format, path: Path, samples_root: Path, *, unit: Unit | None = None, endpoint: Endpoint | None = None
) -> Imported:
    """Read a file of another tool into a new sample set under `samples_root`.

    `endpoint` is what those requests asked for whose address or name tells none of our endpoints. Raises BadUsage for
    a file that is not of this kind and for a folder that cannot be written, another HarnessError for a damaged file.
    """
    if unit is not None and kind is not Format.HDR_LOG:
        raise BadUsage(f"--unit is for hdr-log only: {kind} says in which unit its durations are")
    with opened(path) as lines:
        require(path, lines.head(), kind)
        require_writable(samples_root)
        digest = _digest(path)
        importer = HdrLog(unit) if kind is Format.HDR_LOG else IMPORTERS[kind]()
        rows = _placed(importer.rows(lines), lines)
        if endpoint is not None:
            rows = (_asking_for(endpoint, row) for row in rows)
        first = next(rows, None)
        if first is None:
            raise NotThisFile(path, f"holds no request: make it with {EXPORTS[kind]}")
        parameters = {"from": str(kind), "file": path.name, "sha256": digest, "bytes": lines.size}
        if kind is Format.HDR_LOG:
            parameters["unit"] = str(unit or Unit.NS)
        if endpoint is not None:
            parameters["endpoint"] = str(endpoint)
        intake = _Intake(importer, samples_root, parameters)
        with shown(lines.size) as tell:
            intake.record(itertools.chain([first], rows), lines, tell)
        if lines.size != path.stat().st_size:
            raise HarnessError(f"{path} grew while it was read; {intake.path} is not complete: import it again")
        return intake.finish()


class _Intake:
    """Writes the rows and counts them."""

    def __init__(self, importer: Importer, samples_root: Path, parameters: dict[str, Any]) -> None:
        content = {name: value for name, value in parameters.items() if name != "file"}  # whatever it is called
        identity = hashlib.sha256(repr(sorted(content.items())).encode()).hexdigest()[:32]
        self._importer, self._root = importer, samples_root
        self._recorder = Recorder(
            samples_root, Mode.IMPORT, SCENARIO, parameters, imported_as=identity, source=importer.source()
        )
        self._counts: Counter[tuple[Endpoint, Outcome]] = Counter()
        self._first_ns: int | None = None
        self._last_ns: int | None = None

    @property
    def path(self) -> Path:
        """Return the set's folder."""
        return self._recorder.path

    def record(self, rows: Iterator[Sample], lines: Lines, tell: Tell) -> None:
        """Write all rows; on a fault, keep those before it and raise it with the set's folder."""
        batch: list[Sample] = []
        try:
            for row in rows:
                batch.append(row)
                if len(batch) == PART_ROWS:
                    full, batch = batch, []
                    self._write(full)
                    tell(lines.bytes_read, self._counts.total())
            rest, batch = batch, []
            self._write(rest)
        except OSError as fault:
            raise unwritable(self._root, fault) from None
        except (HarnessError, KeyboardInterrupt) as fault:
            with contextlib.suppress(OSError):  # a full disk: the parts before it are readable as they are
                self._write(batch)
                self._recorder.finish(complete=False)
            if isinstance(fault, BadLine):
                kept = f"rows kept from before it: {self._counts.total():,}, in {self.path}, which is not complete"
                raise BadLine(fault.path, fault.line, fault.column, f"{fault.text} ({kept})") from None
            if isinstance(fault, KeyboardInterrupt):
                raise Interrupted(self.path) from None
            raise

    def finish(self) -> Imported:
        """Close the set."""
        source = self._importer.source()
        self._recorder.source = source
        try:
            manifest = self._recorder.finish(complete=True)
        except OSError as fault:
            raise unwritable(self._root, fault) from None
        if not manifest.complete:
            raise HarnessError(f"{self.path} lacks rows of the file: the import is not valid")
        by_endpoint: dict[str, dict[str, int]] = {}
        for endpoint in Endpoint:
            counts = {str(outcome): self._counts[endpoint, outcome] for outcome in Outcome}
            if any(counts.values()):
                by_endpoint[str(endpoint)] = {name: count for name, count in counts.items() if count}
        return Imported(str(self.path), source.tool, self._counts.total(), by_endpoint, source.notes)

    def _write(self, batch: Sequence[Sample]) -> None:
        for row in batch:
            self._counts[row.endpoint, row.outcome] += 1
            begun = next((at for at in (row.intended_at_ns, row.sent_at_ns, row.done_at_ns) if at is not None), None)
            ended = row.done_at_ns if row.done_at_ns is not None else begun
            if begun is not None and ended is not None:
                self._first_ns = begun if self._first_ns is None else min(self._first_ns, begun)
                self._last_ns = ended if self._last_ns is None else max(self._last_ns, ended)
        start, end = self._first_ns or 0, self._last_ns or 0
        self._recorder.write_rows(batch, Clock(Instant(start, start), Instant(end, end)))


def _placed(rows: Iterator[Sample], lines: Lines) -> Iterator[Sample]:
    """Yield the rows, and say of what cannot be used in which line it stands."""
    any_row = False
    try:
        for row in rows:
            any_row = True
            yield row
    except Unusable as fault:
        if fault.shape and not any_row:
            raise NotThisFile(lines.path, f"line {max(lines.line, 1)}: {fault.text}") from None
        raise BadLine(lines.path, max(lines.line, 1), fault.column, fault.text) from None


def _asking_for(endpoint: Endpoint, row: Sample) -> Sample:
    return dataclasses.replace(row, endpoint=endpoint) if row.endpoint is Endpoint.OTHER else row


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
