"""Writes a sample set so that a killed harness loses at most the last second, and recording costs next to nothing.

On the hot path a request is only packed into memory (`samplebuffer`). Every `FLUSH_INTERVAL_S` the caller takes what
gathered (`collect`, on the event loop) and writes it (`write`, in a thread, where Arrow lets go of the interpreter).

How each table grows on disk is in `tablefiles`. The manifest says `complete: true` only after everything else is on
disk. Rows of senders on other machines come as parts that were written there (`cluster`). `sampleset` reads all this.
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

from harness import machine
from harness.errors import BadUsage
from harness.sample import Mode, ResourceSample, RunRecord, Sample, arrow_schema
from harness.samplebuffer import Batch, SampleBuffer, sample_table
from harness.sampleset import (
    MANIFEST,
    Clock,
    Instant,
    Manifest,
    SampleSetError,
    SenderClock,
    Source,
    read_manifest,
)
from harness.tablefiles import Part, TableFiles, keep_part, row_table

FLUSH_INTERVAL_S = 0.5  # half of what a kill may cost, so that a slow disk has the other half


@dataclasses.dataclass(frozen=True, slots=True)
class Collected:
    """What gathered since the last collection, ready to be written by a thread."""

    batch: Batch
    runs: list[RunRecord]
    live: list[RunRecord]
    resources: list[ResourceSample]
    parts: list[Part]
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
        self._parts: list[Part] = []
        self._foreign: dict[str, Part] = {}  # parts of other machines, without their content
        self.senders: tuple[SenderClock, ...] = ()  # of senders on other machines
        self.stored: str | None = None  # where their parts were left
        self.mode, self.scenario = mode, scenario
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
            self._sample_files = TableFiles(self.path, "samples", self._sample_schema, ends_as_one=False)
            self._run_files = TableFiles(self.path, "runs", self._run_schema, ends_as_one=True)
            self._resource_files = TableFiles(self.path, "resources", self._resource_schema, ends_as_one=True)
        except OSError as fault:
            raise unwritable(root, fault) from None

    @property
    def measurement_id(self) -> str:
        """Return what every file of the set names."""
        return self._manifest.measurement_id

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

    def add_part(self, part: Part) -> None:
        """Add rows that were written on another machine, in place of an earlier part of that name."""
        self._parts.append(part)

    def collect(self) -> Collected:
        """Take what gathered; cheap, on the event loop."""
        runs, self._runs = self._runs, []
        resources, self._resources = self._resources, []
        parts, self._parts = self._parts, []
        live = list(self.live_runs())
        return Collected(self.samples.take(), runs, live, resources, parts, self.planned_requests, _now())

    def write(self, collected: Collected) -> None:
        """Bring what was collected to disk. One call at a time, in order."""
        table = sample_table(collected.batch, self.mode, self.scenario, self._sample_schema)
        self._sample_files.extend(table)
        self._written += len(table)
        for part in {part.name: part for part in collected.parts}.values():
            keep_part(self.path, part)
            self._foreign[part.name] = msgspec.structs.replace(part, content=None)
        live = row_table(collected.live, self._run_schema)
        self._run_files.extend(row_table(collected.runs, self._run_schema), live)
        self._resource_files.extend(row_table(collected.resources, self._resource_schema))
        clock = self._manifest.clock if self._is_imported else Clock(self._manifest.clock.start, collected.at)
        self._vouch(collected.planned_requests, clock)

    def write_rows(self, rows: Sequence[Sample], clock: Clock) -> None:
        """Bring imported rows to disk, each of them planned by being there; `clock` spans all so far."""
        self.planned_requests += len(rows)
        self._sample_files.extend(row_table(rows, self._sample_schema))
        self._written += len(rows)
        self._vouch(self.planned_requests, clock)

    def _vouch(self, planned_requests: int, clock: Clock) -> None:
        """Bring the manifest up to what is on disk."""
        closed = self._sample_files.closed | self._run_files.closed | self._resource_files.closed
        closed = closed | {part.name: part.sha256 for part in self._foreign.values() if part.closed}
        self._manifest = dataclasses.replace(
            self._manifest,
            planned_requests=planned_requests,
            clock=clock,
            files=closed,
            source=self.source,
            senders=self.senders,
            stored=self.stored,
        )
        self._write_manifest()

    def finish(self, *, complete: bool) -> Manifest:
        """Write the rest and the final manifest.

        `complete` says that the whole plan was carried out; the set is complete if its rows bear that out.
        """
        self.write(self.collect())
        written = self._written + sum(part.rows for part in self._foreign.values())
        complete = complete and written == self.planned_requests
        files = {name: part.sha256 for name, part in self._foreign.items()}
        files |= self._sample_files.finish() | self._run_files.finish() | self._resource_files.finish()
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
