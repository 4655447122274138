"""Reads a sample set: a folder with the rows of one measurement and the manifest that vouches for them.

    data/samples/<utc>-<mode>-<id>/
        manifest.json           what was asked for, on which machine, and the hash of every closed file
        samples-00001.parquet   one row per planned request, in parts (`sample.Sample`)
        runs.parquet            one row per agent run (`sample.RunRecord`)
        resources.parquet       one row per second (`sample.ResourceSample`)

This page refuses what cannot be trusted file by file: unreadable, altered, of another measurement, of an unknown
schema. Whether the *measurement* can be trusted is `analysis/validity`. `recorder` writes what is read here.

A set whose manifest says `complete: false` (a killed harness, or one still at work) is readable all the same: its
closed files are vouched for by hash, the open ones only by their own Parquet footers and measurement id.
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from harness.errors import ExitCode, HarnessError
from harness.sample import SCHEMA_VERSION, ResourceSample, RunRecord, Sample, arrow_schema
from harness.setfiles import SetFiles, sha256_of

MANIFEST = "manifest.json"
SETS_NAMED_MAX = 3  # of the sets in a folder that is none itself; the newest
VERSION_KEY = b"plimsoll.schema_version"
MEASUREMENT_KEY = b"plimsoll.measurement_id"
WHOLE_KEY = b"plimsoll.whole"  # set on a runs.parquet or resources.parquet into which all of its parts were merged


@dataclasses.dataclass(frozen=True, slots=True)
class Instant:
    """One moment by both clocks, so that monotonic stamps can be placed in time."""

    monotonic_ns: int  # the clock of every *_at_ns column
    wall_ns: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]  # UTC, since 1970


@dataclasses.dataclass(frozen=True, slots=True)
class Clock:
    """When the measurement began and ended; a step of the wall clock in between shows as a difference."""

    start: Instant
    end: Instant  # of an incomplete set: when the manifest was last written


@dataclasses.dataclass(frozen=True, slots=True)
class SenderClock:
    """How the clock of a sender on another machine stood to the one of the set; its rows are stamped by the latter."""

    worker: int  # as in the rows
    offset_us: float  # its clock less the set's, before the load; known to be right within the uncertainty
    uncertainty_us: float
    round_trips: int  # of which the shortest counts
    end_offset_us: float | None  # the same after the load; null when it was not there any more
    end_uncertainty_us: float | None
    machine: dict[str, Any]  # where it was


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Which tool made the rows."""

    tool: str = "plimsoll"
    cannot_know: tuple[str, ...] = ()  # columns an imported tool has no way to tell
    notes: tuple[str, ...] = ()  # the same and what was assumed, in sentences for a reader


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What was asked for and what vouches for the files. Never holds a secret."""

    measurement_id: str  # also in the metadata of every file
    mode: str  # one of sample.Mode
    parameters: dict[str, Any]  # the plan in full, so that it can be repeated
    planned_requests: int  # rows there must be when complete
    attempt: int  # from 1: how often these parameters were measured on this commit in this folder
    commit: str | None  # of this checkout, "-dirty" when files were changed; null outside a checkout
    versions: dict[str, str]
    machine: dict[str, Any]
    quota_revision: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] | None
    """In force during the measurement; null when the service does not tell."""
    clock: Clock
    files: dict[str, str]  # name: sha256 in hex; while incomplete, the closed files only
    complete: bool  # false until every planned request has its row
    source: Source
    senders: tuple[SenderClock, ...] = ()  # that were not processes of the recording machine
    stored: str | None = None  # folder (fsspec URL) of the files of samples that are not beside the manifest


@dataclasses.dataclass(frozen=True, slots=True)
class SampleSet:
    """One measurement: columns and meaning of the tables are those of the dataclasses in `sample`."""

    path: Path
    manifest: Manifest
    samples: pa.Table
    runs: pa.Table
    resources: pa.Table


class SampleSetError(HarnessError):
    """A sample set cannot be read. `path` is the set, `name` the file at fault where there is one."""

    def __init__(self, path: Path, text: str, name: str | None = None) -> None:
        super().__init__(text)
        self.path = path
        self.name = name


class SampleSetNotFound(SampleSetError):
    """There is nothing at the path."""

    exit_code = ExitCode.USAGE

    def __init__(self, path: Path) -> None:
        super().__init__(path, f"{path} does not exist: give the folder of a sample set")


class NoSampleSet(SampleSetError):
    """The folder exists and holds no sample set."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, f"{path} holds no sample set: make one with `python -m harness run`")


class ManifestMissing(SampleSetError):
    """The folder has no manifest, so nothing vouches for its files."""

    def __init__(self, path: Path) -> None:
        text = f"{path} has no {MANIFEST}: it is no sample set"
        below = sorted((manifest.parent.name for manifest in path.glob(f"*/{MANIFEST}")), reverse=True)
        if below:
            more = f" and {len(below) - SETS_NAMED_MAX} older" if len(below) > SETS_NAMED_MAX else ""
            text += f"; sample sets in it are {', '.join(below[:SETS_NAMED_MAX])}{more}"
        super().__init__(path, text, MANIFEST)


class UnreadableFile(SampleSetError):
    """A file is missing, truncated or not what its name says."""

    def __init__(self, path: Path, name: str, fault: str) -> None:
        super().__init__(path, f"{path / name} cannot be read: {fault}", name)
        self.fault = fault


class HashMismatch(SampleSetError):
    """A file is not the one that was recorded."""

    def __init__(self, path: Path, name: str, recorded: str, found: str) -> None:
        text = f"{path / name} was altered: its sha256 is {found[:12]}…, recorded was {recorded[:12]}…"
        super().__init__(path, text, name)
        self.recorded = recorded
        self.found = found


class UnlistedFile(SampleSetError):
    """A complete set holds rows that its manifest does not know."""

    def __init__(self, path: Path, name: str) -> None:
        super().__init__(path, f"{path / name} is not listed in {MANIFEST}: it was added afterwards", name)


class UnknownSchemaVersion(SampleSetError):
    """The file's columns may mean something else than this program thinks."""

    def __init__(self, path: Path, name: str, found: str | None) -> None:
        was = f"schema version {found}" if found else "no schema version"
        super().__init__(path, f"{path / name} has {was}: this program reads {SCHEMA_VERSION}", name)
        self.found = found


class MixedMeasurements(SampleSetError):
    """Files of different measurements lie in one folder."""

    def __init__(self, path: Path, name: str, expected: str, found: str | None) -> None:
        text = f"{path / name} belongs to measurement {found}, the set is {expected}: measurements are mixed"
        super().__init__(path, text, name)
        self.expected = expected
        self.found = found


def read_sample_set(path: Path) -> SampleSet:
    """Read one sample set, complete or not; the caller decides what an incomplete one is worth.

    Raises a SampleSetError that names the file at fault.
    """
    manifest = read_manifest(path)
    files = SetFiles(path, manifest.stored)
    names = files.names()
    samples = sorted(name for name in names if name.startswith("samples-"))
    parts = {
        Sample: samples or ["samples-00001.parquet"],
        RunRecord: _single(path, "runs", names),
        ResourceSample: _single(path, "resources", names),
    }
    wanted = {name for part in parts.values() for name in part}
    if manifest.complete:
        _refuse_unlisted(path, manifest, wanted)
    tables = {row: _read_parts(path, files, manifest, row, part) for row, part in parts.items()}
    return SampleSet(path, manifest, tables[Sample], tables[RunRecord], tables[ResourceSample])


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the set at `path`; raises SampleSetNotFound, ManifestMissing or UnreadableFile."""
    if not path.exists():
        raise SampleSetNotFound(path)
    try:
        return msgspec.json.decode((path / MANIFEST).read_bytes(), type=Manifest)
    except (FileNotFoundError, NotADirectoryError):
        raise ManifestMissing(path) from None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as fault:
        raise UnreadableFile(path, MANIFEST, _first_line(fault)) from None


def newest_sample_set(root: Path) -> Path:
    """Return the newest set under `root` by its start (names begin with it); raises NoSampleSet when there is none."""
    if not root.exists():
        raise SampleSetNotFound(root)
    sets = sorted(manifest.parent for manifest in root.glob(f"*/{MANIFEST}"))
    if not sets:
        raise NoSampleSet(root)
    return sets[-1]


def sets_in(path: Path) -> list[Path]:
    """Return the set at `path`, or all that the folder holds, by name; raises NoSampleSet when it holds none."""
    if not path.exists():
        raise SampleSetNotFound(path)
    if (path / MANIFEST).exists():
        return [path]
    found = sorted(manifest.parent for manifest in path.glob(f"*/{MANIFEST}"))
    if not found:
        raise NoSampleSet(path)
    return found


def _single(path: Path, stem: str, names: set[str]) -> list[str]:
    """Name the files of a table that ends as one file: its parts while it grows, itself when they were merged."""
    whole = f"{stem}.parquet"
    parts = sorted(name for name in names if name.startswith(f"{stem}-"))
    if whole in names and parts and WHOLE_KEY in _metadata(path, whole, path / whole):
        return [whole]
    return [*parts, whole] if whole in names or not parts else parts


def _refuse_unlisted(path: Path, manifest: Manifest, present: set[str]) -> None:
    for name in sorted(manifest.files.keys() - present):
        raise UnreadableFile(path, name, "it is listed in the manifest and missing")
    for name in sorted(present - manifest.files.keys()):
        if (path / name).exists():
            raise UnlistedFile(path, name)


def _metadata(path: Path, name: str, source: Path | io.BytesIO) -> dict[bytes, bytes]:
    try:
        return pq.read_schema(source).metadata or {}
    except (OSError, pa.ArrowException) as fault:
        raise UnreadableFile(path, name, _first_line(fault)) from None


def _read_parts(path: Path, files: SetFiles, manifest: Manifest, row: type, names: list[str]) -> pa.Table:
    """Read and join the files of one table, each checked: metadata, columns, hash."""
    expected = arrow_schema(row, manifest.measurement_id)
    tables = []
    for name in names:
        source = files.source(name)
        metadata = _metadata(path, name, source)
        version, measurement = metadata.get(VERSION_KEY), metadata.get(MEASUREMENT_KEY)
        if version != str(SCHEMA_VERSION).encode():
            raise UnknownSchemaVersion(path, name, _text(version))
        if measurement != manifest.measurement_id.encode():
            raise MixedMeasurements(path, name, manifest.measurement_id, _text(measurement))
        try:
            table = _with_later_columns(pq.read_table(source, partitioning=None), row, expected).cast(expected)
        except (OSError, ValueError, pa.ArrowException) as fault:
            raise UnreadableFile(path, name, _first_line(fault)) from None
        recorded = manifest.files.get(name)
        if recorded is not None and (found := sha256_of(source)) != recorded:
            raise HashMismatch(path, name, recorded, found)
        tables.append(table)
    return pa.concat_tables(tables).unify_dictionaries().replace_schema_metadata(expected.metadata)


def _with_later_columns(table: pa.Table, row: type, expected: pa.Schema) -> pa.Table:
    """Add as null what an earlier recorder did not tell yet: the fields that have null as their default."""
    later = {field.name for field in dataclasses.fields(row) if field.default is None}
    for place, field in enumerate(expected):
        if field.name in later and field.name not in table.column_names:
            table = table.add_column(place, field, pa.nulls(len(table), field.type))
    return table


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode(errors="replace")


def _first_line(fault: Exception) -> str:
    text = fault.strerror if isinstance(fault, OSError) and fault.strerror else str(fault)
    return text.strip().splitlines()[0] if text.strip() else type(fault).__name__
