"""Writes one table of a sample set so that it is readable at every instant, whoever is killed.

A table has closed files and one open file. The open file is rewritten whole under a temporary name and renamed over the
old one, so at every instant each file is complete Parquet and no row is in two of them. At `PART_ROWS` it is closed:
hashed, listed in the manifest, never touched again. A table that ends as one file (runs, resources) is merged at the
end. Used by `recorder`, and by `outpost` where senders write on another machine.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from harness.errors import HarnessError
from harness.sampleset import WHOLE_KEY
from harness.setfiles import sha256_of

PART_ROWS = 20_000  # rewriting so many rows takes some 20 ms of a thread


class Part(msgspec.Struct, frozen=True):
    """One file of sample rows as it was written on another machine; a later one of the same name takes its place."""

    name: str
    rows: int
    sha256: str
    closed: bool  # it is never written again
    content: bytes | None = None  # null when it was left on shared storage


def keep_part(folder: Path, part: Part) -> None:
    """Write a part that came from elsewhere into the folder, whole or not at all; raises HarnessError, OSError."""
    if part.content is None:
        return
    if hashlib.sha256(part.content).hexdigest() != part.sha256:
        raise HarnessError(f"{part.name} did not come through as it was written: its sha256 differs")
    hidden = folder / f".{part.name}.tmp"
    hidden.write_bytes(part.content)
    os.replace(hidden, folder / part.name)


def row_table(rows: Sequence[object], schema: pa.Schema) -> pa.Table:
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


class TableFiles:
    """One table of the set on disk: closed files with their hashes, and one open file."""

    def __init__(self, folder: Path, stem: str, schema: pa.Schema, *, ends_as_one: bool) -> None:
        self.closed: dict[str, str] = {}
        self._folder = folder
        self._stem = stem
        self._schema = schema
        self._ends_as_one = ends_as_one
        self._open = schema.empty_table()
        self._write_open(self._open)

    @property
    def open_name(self) -> str:
        """Return the name of the file that is still written."""
        return f"{self._stem}.parquet" if self._ends_as_one else self._part_name()

    @property
    def open_rows(self) -> int:
        """Return how many rows the open file holds, passing ones not counted."""
        return len(self._open)

    def _part_name(self) -> str:
        return f"{self._stem}-{len(self.closed) + 1:05d}.parquet"

    def _write_open(self, table: pa.Table) -> None:
        _write_parquet(table, self._folder / self.open_name)

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
        os.replace(self._folder / self.open_name, self._folder / name)
        self.closed[name] = sha256_of(self._folder / name)
        self._open = self._schema.empty_table()
        self._write_open(self._open)

    def finish(self) -> dict[str, str]:
        """Bring the table into its final files and return each with its hash."""
        name = self.open_name
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
