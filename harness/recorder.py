"""Writes a sample set so that a killed harness loses at most the last second, and recording costs next to nothing.

On the hot path a request is only packed into memory (`samplebuffer`). Every `FLUSH_INTERVAL_S` the caller takes what
gathered (`collect`, on the event loop) and writes it (`write`, in a thread, where Arrow lets go of the interpreter).

On disk each table has closed files and one open file. The open file is rewritten whole under a temporary name and
renamed over the old one, so at every instant each file is complete Parquet and no row is in two of them. At `PART_ROWS`
it is closed: hashed, listed in the manifest, never touched again. Runs and resources are merged into one file at the
end. The manifest says `complete: true` only after everything else is on disk. `sampleset` reads all this.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from harness import machine
from harness.errors import BadUsage
from harness.sample import Mode, ResourceSample, RunRecord, Sample, arrow_schema
from harness.samplebuffer import Batch, SampleBuffer, sample_table
from harness.sampleset import (
    MANIFEST,
    WHOLE_KEY,
    Clock,
    Instant,
    Manifest,
    SampleSetError,
    Source,
    read_manifest,
    sha256_of,
)

FLUSH_INTERVAL_S = 0.5  # half of what a kill may cost, so that a slow disk has the other half
PART_ROWS = 20_000  # rewriting so many rows takes some 20 ms of a thread


def _row_table(rows: Sequence[object], schema: pa.Schema) -> pa.Table:
    """Turn row dataclasses into columns."""
    columns = [pa.array([getattr(row, field.name) for row in rows], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _write_parquet(table: pa.Table, file: Path) -> None:
    """Write the file whole under a temporary name, then rename it into place."""
    hidden = file.with_name(f".{file.name}.tmp")
    integers = [field.name for field in table.schema if pa.types.is_int64(field.type)]
    floats = [field.name for field in table.schema if pa.types.is_float64(field.type)]
    # A key is different in every row, but it begins like the one before.
    keys = [name for name in table.schema.names if name == "run_key"]
    repeated = [name for name in table.schema.names if name not in {*integers, *floats, *keys}]
    pq.write_table(
        table,
        hidden,
        compression="zstd",
        use_dictionary=repeated,
        column_encoding=dict.fromkeys(integers, "DELTA_BINARY_PACKED")
        | dict.fromkeys(floats, "BYTE_STREAM_SPLIT")
        | dict.fromkeys(keys, "DELTA_BYTE_ARRAY"),
    )
    os.replace(hidden, file)


class _TableFiles:
    """One table of the set on disk: closed files with their hashes, and one open file."""

    def __init__(self, folder: Path, stem: str, schema: pa.Schema, *, ends_as_one: bool) -> None:
        self.closed: dict[str, str] = {}
        self._folder = folder
        self._stem = stem
        self._schema = schema
        self._ends_as_one = ends_as_one
        self._open = schema.empty_table()
        self._write_open(self._open)

    def _open_name(self) -> str:
        return f"{self._stem}.parquet" if self._ends_as_one else self._part_name()

    def _part_name(self) -> str:
        return f"{self._stem}-{len(self.closed) + 1:05d}.parquet"

    def _write_open(self, table: pa.Table) -> None:
        _write_parquet(table, self._folder / self._open_name())

    def extend(self, table: pa.Table, passing: pa.Table | None = None) -> None:
        """Add rows; `passing` rows are written too, and replaced at the next call (runs that are still live)."""
        if len(table):
            self._open = pa.concat_tables([self._open, table]).combine_chunks()
        elif passing is None:
            return
        self._write_open(self._open if passing is None else pa.concat_tables([self._open, passing]))
        if len(self._open) >= PART_ROWS and not (passing is not None and len(passing)):
            self._close_part()

    def _close_part(self) -> None:
        name = self._part_name()
        os.replace(self._folder / self._open_name(), self._folder / name)
        self.closed[name] = sha256_of(self._folder / name)
        self._open = self._schema.empty_table()
        self._write_open(self._open)

    def finish(self) -> dict[str, str]:
        """Bring the table into its final files and return each with its hash."""
        name = self._open_name()
        if not self._ends_as_one:
            if self.closed and not len(self._open):
                (self._folder / name).unlink()  # the last part was just closed: no empty one after it
                return self.closed
            return self.closed | {name: sha256_of(self._folder / name)}
        if self.closed:
            self._merge(self._folder / name)
        return {name: sha256_of(self._folder / name)}

    def _merge(self, whole: Path) -> None:
        """Join all parts into one file. The mark on it makes parts that a kill left behind harmless."""
        hidden = whole.with_name(f".{whole.name}.tmp")
        schema = self._schema.with_metadata({**self._schema.metadata, WHOLE_KEY: b"true"})
        with pq.ParquetWriter(hidden, schema, compression="zstd") as writer:
            for part in [*self.closed, whole.name]:
                table = pq.read_table(self._folder / part, partitioning=None).cast(schema)
                writer.write_table(table)
        os.replace(hidden, whole)
        for part in self.closed:
            (self._folder / part).unlink()


@dataclasses.dataclass(frozen=True, slots=True)
class Collected:
    """What gathered since the last collection, ready to be written by a thread."""

    batch: Batch
    runs: list[RunRecord]
    live: list[RunRecord]
    resources: list[ResourceSample]
    planned_requests: int
    at: Instant


class Recorder:
    """Writes one sample set. `write` may run in a thread, one call at a time; all else belongs to the event loop."""

    def __init__(
        self,
        root: Path,
        mode: Mode,
        scenario: str,
        parameters: dict[str, Any],
        *,
        imported_as: str | None = None,
        source: Source | None = None,
    ) -> None:
        """Make the folder and its first, empty files; raises BadUsage when that is not possible.

        `imported_as` is the identity of rows that another tool measured: they are of no commit and no machine of ours,
        and their clock is the one that comes with them.
        """
        self.samples = SampleBuffer()
        self.planned_requests = 0
        self.live_runs: Callable[[], Iterable[RunRecord]] = tuple  # asked at each collection
        self.on_look: Callable[[ResourceSample], None] = lambda row: None  # told each look at the machine
        self._written = 0  # sample rows on disk
        self._runs: list[RunRecord] = []
        self._resources: list[ResourceSample] = []
        self._mode, self._scenario = mode, scenario
        self._is_imported = imported_as is not None
        self.source = source or Source()  # of imported rows, more is known when all were read
        commit, now = None if self._is_imported else machine.commit(), _now()
        identity = imported_as or uuid.uuid4().hex
        self._manifest = Manifest(
            measurement_id=identity,
            mode=mode,
            parameters=parameters,
            planned_requests=0,
            attempt=1 + _earlier_attempts(root, mode, parameters, commit),
            commit=commit,
            versions=machine.versions(),
            machine={} if self._is_imported else machine.machine(),
            quota_revision=None,
            clock=Clock(now, now),
            files={},
            complete=False,
            source=self.source,
        )
        began = datetime.datetime.fromtimestamp(now.wall_ns / 1e9, datetime.UTC)
        stamp = f"{began:%Y%m%dT%H%M%S}.{began.microsecond // 1000:03d}Z"
        self.path = root / f"{stamp}-{mode}-{identity[:8]}"
        self._sample_schema = arrow_schema(Sample, identity)
        self._run_schema = arrow_schema(RunRecord, identity)
        self._resource_schema = arrow_schema(ResourceSample, identity)
        try:
            self.path.mkdir(parents=True)
            self._write_manifest()
            self._sample_files = _TableFiles(self.path, "samples", self._sample_schema, ends_as_one=False)
            self._run_files = _TableFiles(self.path, "runs", self._run_schema, ends_as_one=True)
            self._resource_files = _TableFiles(self.path, "resources", self._resource_schema, ends_as_one=True)
        except OSError as fault:
            raise unwritable(root, fault) from None

    def note_quota_revision(self, revision: int | None) -> None:
        """Note which quota revision is in force; null when the service does not tell."""
        self._manifest = dataclasses.replace(self._manifest, quota_revision=revision)
        self._write_manifest()

    def plan(self, requests: int) -> None:
        """Count requests that are about to be made, or would have been: each must get its row."""
        self.planned_requests += requests

    def add_run(self, record: RunRecord) -> None:
        """Add a run that has ended for the harness."""
        self._runs.append(record)

    def add_resources(self, row: ResourceSample) -> None:
        """Add one second of the machine."""
        self._resources.append(row)
        self.on_look(row)

    def collect(self) -> Collected:
        """Take what gathered; cheap, on the event loop."""
        runs, self._runs = self._runs, []
        resources, self._resources = self._resources, []
        live = list(self.live_runs())
        return Collected(self.samples.take(), runs, live, resources, self.planned_requests, _now())

    def write(self, collected: Collected) -> None:
        """Bring what was collected to disk. One call at a time, in order."""
        table = sample_table(collected.batch, self._mode, self._scenario, self._sample_schema)
        self._sample_files.extend(table)
        self._written += len(table)
        live = _row_table(collected.live, self._run_schema)
        self._run_files.extend(_row_table(collected.runs, self._run_schema), live)
        self._resource_files.extend(_row_table(collected.resources, self._resource_schema))
        clock = self._manifest.clock if self._is_imported else Clock(self._manifest.clock.start, collected.at)
        self._vouch(collected.planned_requests, clock)

    def write_rows(self, rows: Sequence[Sample], clock: Clock) -> None:
        """Bring imported rows to disk, each of them planned by being there; `clock` spans all so far."""
        self.planned_requests += len(rows)
        self._sample_files.extend(_row_table(rows, self._sample_schema))
        self._written += len(rows)
        self._vouch(self.planned_requests, clock)

    def _vouch(self, planned_requests: int, clock: Clock) -> None:
        """Bring the manifest up to what is on disk."""
        closed = self._sample_files.closed | self._run_files.closed | self._resource_files.closed
        self._manifest = dataclasses.replace(
            self._manifest,
            planned_requests=planned_requests,
            clock=clock,
            files=closed,
            source=self.source,
        )
        self._write_manifest()

    def finish(self, *, complete: bool) -> Manifest:
        """Write the rest and the final manifest.

        `complete` says that the whole plan was carried out; the set is complete if its rows bear that out.
        """
        self.write(self.collect())
        complete = complete and self._written == self.planned_requests
        files = self._sample_files.finish() | self._run_files.finish() | self._resource_files.finish()
        self._manifest = dataclasses.replace(self._manifest, files=files, complete=complete)
        self._write_manifest()
        return self._manifest

    def discard(self) -> None:
        """Remove a set for which no request was ever planned."""
        for file in self.path.iterdir():
            file.unlink()
        self.path.rmdir()

    def _write_manifest(self) -> None:
        hidden = self.path / f".{MANIFEST}.tmp"
        hidden.write_bytes(msgspec.json.format(msgspec.json.encode(self._manifest), indent=2))
        os.replace(hidden, self.path / MANIFEST)


def require_writable(root: Path) -> None:
    """Raise BadUsage when a sample set cannot be written under `root`; called before any load is made."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as fault:
        raise unwritable(root, fault) from None


def unwritable(root: Path, fault: OSError) -> BadUsage:
    """Name the folder and the mend."""
    return BadUsage(f"cannot write samples to {root} ({fault.strerror}): give --out a folder that can be written")


def _now() -> Instant:
    return Instant(time.monotonic_ns(), time.time_ns())


def _earlier_attempts(root: Path, mode: Mode, parameters: dict[str, Any], commit: str | None) -> int:
    """Count the sets that already asked the same of the same commit: repeating until it passes must show."""
    same = 0
    plain = msgspec.to_builtins(parameters)
    for file in root.glob(f"*-{mode}-*/{MANIFEST}"):
        try:
            earlier = read_manifest(file.parent)
        except SampleSetError:
            continue  # a broken neighbour is refused by whoever reads it, not by who writes beside it
        same += (earlier.mode, earlier.parameters, earlier.commit) == (mode, plain, commit)
    return same
