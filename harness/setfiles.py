"""The files of one sample set, wherever they are: beside the manifest, or where senders left them on shared storage."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

from harness.storage import Storage


class SetFiles:
    """Parquet files by their names."""

    def __init__(self, path: Path, stored: str | None) -> None:
        """`stored` is the shared folder's URL; raises BadUsage when nothing here can reach such a one."""
        self._path = path
        self._storage = None if stored is None else Storage(stored)

    def names(self) -> set[str]:
        """Return the names of all files that are there; raises StorageFailed."""
        here = {entry.name for entry in self._path.glob("*.parquet")}
        far = set() if self._storage is None else self._storage.names()
        return here | {name for name in far if name.startswith("samples-") and name.endswith(".parquet")}

    def source(self, name: str) -> Path | io.BytesIO:
        """Return what Parquet can be read from; raises StorageFailed."""
        file = self._path / name
        if self._storage is None or not name.startswith("samples-") or file.exists():
            return file
        return io.BytesIO(self._storage.get(name))


def sha256_of(source: Path | io.BytesIO) -> str:
    """Return the sha256 in hex, as the manifest lists it."""
    if isinstance(source, io.BytesIO):
        return hashlib.sha256(source.getbuffer()).hexdigest()
    with source.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
