"""Sample sets wherever fsspec reaches: a folder on this disk, `s3://bucket/samples`, `memory://…`.

A place is one set or holds several. Each file is held against its manifest before anything reads it: listed, its
sha256, the measurement and the schema version that it carries, and as many rows as were planned. What is protocol and
what is credentials is fsspec's business; nothing of either is printed.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import fsspec
import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from harness.errors import BadUsage
from harness.folders import find_in_checkout
from harness.sample import SCHEMA_VERSION
from harness.sampleset import (
    MANIFEST,
    MEASUREMENT_KEY,
    VERSION_KEY,
    HashMismatch,
    Manifest,
    MixedMeasurements,
    NoSampleSet,
    SampleSetError,
    UnknownSchemaVersion,
    UnlistedFile,
    UnreadableFile,
)

CHUNK_BYTES = 8 << 20
"""Read at once while a file is hashed."""


@dataclasses.dataclass(frozen=True, slots=True)
class PlacedSet:
    """One set and its files of samples, as an engine opens them."""

    protocol: str  # "file" for this disk
    files: Any  # fsspec's file system
    manifest: Manifest
    sample_files: tuple[str, ...]  # with their protocol, unless it is this disk's


def placed_sets(place: str) -> tuple[PlacedSet, ...]:
    """Return the set at a place, or all in it. Raises BadUsage or SampleSetError."""
    if "://" not in place:
        place = str(find_in_checkout(Path(place)))
    shown = Path(place.partition("?")[0])  # what follows may be a secret
    try:
        files, root = fsspec.core.url_to_fs(place)
        if not files.exists(root):
            raise BadUsage(f"{shown} does not exist: give a sample set, or a folder that holds some")
        found = [root] if files.exists(f"{root}/{MANIFEST}") else sorted(files.ls(root, detail=False))
        folders = [folder for folder in found if files.exists(f"{folder}/{MANIFEST}")]
    except (ImportError, ValueError) as fault:  # no such protocol, or its package is not installed
        raise BadUsage(f"{shown}: {fault}") from None
    except OSError as fault:
        raise BadUsage(f"{shown} cannot be read: {fault.strerror or type(fault).__name__}") from None
    if not folders:
        raise NoSampleSet(shown)
    return tuple(_read(files, folder) for folder in folders)


def _read(files: Any, folder: str) -> PlacedSet:
    """Return one set, its files of samples checked."""
    path = Path(folder)
    try:
        manifest = msgspec.json.decode(files.cat_file(f"{folder}/{MANIFEST}"), type=Manifest)
        present = {name.rsplit("/", 1)[-1] for name in files.glob(f"{folder}/samples-*.parquet")}
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as fault:
        raise UnreadableFile(path, MANIFEST, str(fault).splitlines()[0]) from None
    if not manifest.complete:
        raise SampleSetError(path, f"{path} was cut short (complete: false): `report --partial` judges what it holds")
    listed = {name for name in manifest.files if name.startswith("samples-")}
    for name in sorted(listed - present):
        raise UnreadableFile(path, name, "it is listed in the manifest and missing")
    for name in sorted(present - listed):
        raise UnlistedFile(path, name)
    rows = sum(_checked_rows(files, folder, name, manifest) for name in sorted(listed))
    if rows != manifest.planned_requests:
        raise SampleSetError(path, f"{path} holds {rows:,} rows of {manifest.planned_requests:,} planned requests")
    protocol = files.protocol if isinstance(files.protocol, str) else files.protocol[0]
    local = "file" in ((files.protocol,) if isinstance(files.protocol, str) else files.protocol)
    names = tuple(f"{folder}/{name}" for name in sorted(listed))
    return PlacedSet(
        "file" if local else protocol,
        files,
        manifest,
        names if local else tuple(files.unstrip_protocol(name) for name in names),
    )


def _checked_rows(files: Any, folder: str, name: str, manifest: Manifest) -> int:
    """Return how many rows a file holds, after it was held against the manifest."""
    path = Path(folder)
    try:
        with files.open(f"{folder}/{name}", "rb") as opened:
            about = pq.read_metadata(opened)
            opened.seek(0)
            digest = hashlib.sha256()
            while chunk := opened.read(CHUNK_BYTES):
                digest.update(chunk)
    except (OSError, pa.ArrowException) as fault:
        raise UnreadableFile(path, name, str(fault).splitlines()[0]) from None
    told = about.metadata or {}
    version, measurement = told.get(VERSION_KEY), told.get(MEASUREMENT_KEY)
    if version != str(SCHEMA_VERSION).encode():
        raise UnknownSchemaVersion(path, name, None if version is None else version.decode(errors="replace"))
    if measurement != manifest.measurement_id.encode():
        found = None if measurement is None else measurement.decode(errors="replace")
        raise MixedMeasurements(path, name, manifest.measurement_id, found)
    if digest.hexdigest() != manifest.files[name]:
        raise HashMismatch(path, name, manifest.files[name], digest.hexdigest())
    return int(about.num_rows)
