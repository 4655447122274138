"""Reaches a folder of sample files by its fsspec URL: a shared disk, an object store, whatever fsspec knows.

Senders on other machines may leave their rows there instead of sending them home; `sampleset` reads them from there. A
file appears whole or not at all: it is written under a hidden name and moved. Credentials come from the surroundings,
as each store has its own way for them; a URL that holds one is refused, because the manifest names it.
"""

from __future__ import annotations

import posixpath
from typing import Any
from urllib.parse import urlsplit

from harness.errors import BadUsage, HarnessError

MEND = "install the harness with its extra `cluster`"


class StorageFailed(HarnessError):
    """The shared storage could not be reached, read or written."""

    def __init__(self, url: str, name: str, fault: Exception) -> None:
        text = " ".join(str(fault).split()) or type(fault).__name__
        super().__init__(f"cannot reach {posixpath.join(url, name)} on the shared storage: {text}")


class Storage:
    """One folder."""

    def __init__(self, url: str) -> None:
        """Raise BadUsage for a URL of no known kind, or when what reaches it is not installed."""
        self.url = url.rstrip("/")
        if (parts := urlsplit(url)).username or parts.password or parts.query:
            raise BadUsage(
                "the URL of a shared storage must not hold a credential or a question mark: give it to the store by its"
                " own means"
            )
        if not parts.scheme:
            raise BadUsage(f"the shared storage {url} is no URL: give one such as file:///shared or s3://bucket/folder")
        try:
            import fsspec
        except ImportError:
            raise BadUsage(f"{self.url} needs the package fsspec: {MEND}") from None
        try:
            self._system, self._folder = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as fault:
            raise BadUsage(f"the shared storage {self.url} cannot be used: {' '.join(str(fault).split())}") from None

    def below(self, name: str) -> Storage:
        """Return the folder `name` in this one."""
        return Storage(f"{self.url}/{name}")

    def put(self, name: str, content: bytes) -> None:
        """Write a file whole, in place of an earlier one; raises StorageFailed."""
        hidden, shown = (posixpath.join(self._folder, each) for each in (f".{name}.tmp", name))
        try:
            self._system.makedirs(self._folder, exist_ok=True)
            self._system.pipe_file(hidden, content)
            self._system.mv(hidden, shown)
        except Exception as fault:  # each store has errors of its own, and no two agree
            raise StorageFailed(self.url, name, fault) from fault

    def get(self, name: str) -> bytes:
        """Return a file's content; raises StorageFailed."""
        try:
            content: Any = self._system.cat_file(posixpath.join(self._folder, name))
        except Exception as fault:
            raise StorageFailed(self.url, name, fault) from fault
        return bytes(content)

    def names(self) -> set[str]:
        """Return the names of all files, none where there is no such folder; raises StorageFailed."""
        try:
            self._system.invalidate_cache()
            return {posixpath.basename(path) for path in self._system.ls(self._folder, detail=False)}
        except FileNotFoundError:
            return set()
        except Exception as fault:
            raise StorageFailed(self.url, "", fault) from fault
