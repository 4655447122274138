"""The archive folder: writes a bundle so that a crash leaves the old state or the new one, and reads it with bounds.

Nothing is opened whose path is not of the one form that `records` makes, and no symbolic link is followed below the
folder. `at` is called with a name at each write point: a test stops there, or ends the process.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import uuid
from collections.abc import Callable
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from service.archive.bundle import MOST_ZIP_BYTES, Bundle, Damaged, Row, pack, parse, unpack
from service.archive.records import Stored, is_path_of
from service.errors import PlimsollError

PIECE_BYTES = 256 << 10
"""How much of a file is read at once while it is hashed or sent: 256 KiB."""

At = Callable[[str], None]
"""Called with the name of a write point that has been reached."""


def unwatched(_: str) -> None:
    """Reach a write point and go on."""


class FolderFault(PlimsollError):
    """The archive folder cannot be written or read at all; the message says why."""


class Written(NamedTuple):
    """A bundle's file that is synced under its last name and was found whole."""

    sha256: str
    size_bytes: int
    bundle: Bundle


class Folder:
    """The folder with the bundles of all runs."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> None:
        """Make the folder, so that it outlives a crash; raises FolderFault."""
        try:
            (self.root / "run_archives").mkdir(parents=True, exist_ok=True)
            _sync_folder(self.root)
            _sync_folder(self.root.parent)
        except OSError as fault:
            raise FolderFault(f"cannot make the archive folder {self.root}: {fault.strerror}") from None

    def sync(self) -> None:
        """Make the folders of runs outlive a crash: once for a batch of bundles."""
        _sync_folder(self.root / "run_archives")

    def write(self, run_id: uuid.UUID, path: str, document: bytes, at: At = unwatched) -> Written:
        """Write a bundle and read it back; raises FolderFault, and Damaged for a document that is not whole.

        The caller holds the run's row lock, so nobody else writes in the run's folder. A document that is not whole
        leaves no file.
        """
        packed = pack(document)
        bundle = parse(unpack(packed))
        target = self._writable(run_id, path)
        try:
            for leftover in target.parent.glob(".*.tmp"):
                leftover.unlink()
            if target.exists():
                raise FolderFault(f"{target} is there already: the clock went back; try again")
            _write_synced(target, packed, at)
        except OSError as fault:
            raise FolderFault(f"cannot write {target}: {fault.strerror}") from None
        stored = Stored(bundle.header.archive_id, run_id, path, hashlib.sha256(packed).hexdigest(), len(packed))
        self.open_unharmed(stored).close()
        return Written(stored.sha256, stored.size_bytes, bundle)

    def put(self, run_id: uuid.UUID, path: str, packed: bytes) -> None:
        """Put a bundle's bytes in their place unless they are there already; raises FolderFault and Damaged."""
        self.prepare()
        target = self._writable(run_id, path)
        try:
            if target.exists():
                if target.read_bytes() != packed:
                    raise FolderFault(f"{target} is there already, with other contents: move it away")
                return
            _write_synced(target, packed, unwatched)
            self.sync()
        except OSError as fault:
            raise FolderFault(f"cannot write {target}: {fault.strerror}") from None

    def place(self, run_id: uuid.UUID, path: str) -> Path:
        """Return where a bundle's file is; raises Damaged for a path that is not of the one form."""
        if not is_path_of(path, run_id):
            raise Damaged(f"its path is not one of run {run_id}")
        return self.root / path

    def _writable(self, run_id: uuid.UUID, path: str) -> Path:
        """Return where a bundle's file shall be; raises Damaged where something else is in the way to it."""
        target = self.place(run_id, path)
        if _has_link(self.root, target):
            raise Damaged("its folder is a symbolic link")
        if target.parent.exists() and not target.parent.is_dir():
            raise Damaged("its folder is no folder")
        return target

    def verify(self, stored: Stored) -> Bundle:
        """Return a bundle whose file has the hash and whose contents are whole; raises Damaged and FolderFault."""
        with self.open(stored) as file:
            packed = file.read(stored.size_bytes + 1)
        if hashlib.sha256(packed).hexdigest() != stored.sha256:
            raise Damaged("its file does not have the recorded hash")
        bundle = parse(unpack(packed))
        if (bundle.header.path, bundle.header.archive_id) != (stored.path, stored.archive_id):
            raise Damaged("its file is the file of another bundle")
        return bundle

    def open(self, stored: Stored) -> BufferedReader:
        """Open a bundle's file; raises Damaged when it is missing or of another size, FolderFault without a folder."""
        target = self.place(stored.run_id, stored.path)
        if not self.root.is_dir():
            raise FolderFault(f"the archive folder {self.root} is not there")
        if _has_link(self.root, target):
            raise Damaged("its folder is a symbolic link")
        try:
            file = _open_regular(target)
        except FileNotFoundError:
            raise Damaged("its file is missing") from None
        except OSError as fault:
            raise Damaged(f"its file cannot be opened: {fault.strerror}") from None
        size = os.fstat(file.fileno()).st_size
        if size != stored.size_bytes or size > MOST_ZIP_BYTES:
            file.close()
            raise Damaged(f"its file has {size} bytes, not {stored.size_bytes}")
        return file

    def open_unharmed(self, stored: Stored) -> BufferedReader:
        """Open a bundle's file, at its beginning, after comparing its hash; raises as `open` does."""
        file = self.open(stored)
        try:
            if hashlib.file_digest(file, "sha256").hexdigest() != stored.sha256:
                raise Damaged("its file does not have the recorded hash")
            file.seek(0)
        except BaseException:
            file.close()
            raise
        return file

    def sweep(self, bundle: Bundle, known: set[str]) -> list[str]:
        """Remove finished files of a run that no row knows and whose every row is in this new bundle; returns names.

        Such a file was left by a process that was killed before its commit. One that holds anything more stays, and so
        does one that cannot be read: it may come from another database.
        """
        swept = []
        run_id = bundle.head.run_id
        for file in sorted((self.root / "run_archives" / str(run_id)).glob("run_snapshot_*.json.zip")):
            path = f"run_archives/{run_id}/{file.name}"
            if path in known or path == bundle.header.path:
                continue
            with suppress(Damaged, OSError):
                if _holds_all_of(bundle, read_anywhere(file)[1]):
                    file.unlink()
                    swept.append(file.name)
        return swept


def read_anywhere(file: Path) -> tuple[bytes, Bundle]:
    """Return the bytes of any file and the bundle in it, checked but for a recorded hash; raises Damaged."""
    try:
        with _open_regular(file, os.O_RDONLY) as opened:
            packed = opened.read(MOST_ZIP_BYTES + 1)
    except OSError as fault:
        raise Damaged(f"{file} cannot be read: {fault.strerror}") from None
    if len(packed) > MOST_ZIP_BYTES:
        raise Damaged(f"{file} has more than {MOST_ZIP_BYTES} bytes")
    try:
        return packed, parse(unpack(packed))
    except Damaged as reason:
        raise Damaged(f"{file}: {reason}") from None


def _has_link(root: Path, target: Path) -> bool:
    """Tell whether one of the folders between the archive folder and a file is a symbolic link."""
    return target.parent.is_symlink() or (root / "run_archives").is_symlink()


def _open_regular(file: Path, flags: int = os.O_RDONLY | os.O_NOFOLLOW) -> BufferedReader:
    """Open a regular file for reading; raises OSError for anything else, and never waits as a named pipe would."""
    descriptor = os.open(file, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file")
    return os.fdopen(descriptor, "rb")


def _holds_all_of(bundle: Bundle, older: Bundle) -> bool:
    """Tell whether a bundle holds all rows of another one, apart from the event that announced the other."""
    announced = older.head.last_seq
    for table, rows in older.parts.items():
        have = {_identity(row) for row in bundle.parts.get(table, [])}
        lacking = [row for row in rows if _identity(row) not in have]
        if table == "events":
            lacking = [row for row in lacking if bytes(row["seq"]) != b"%d" % announced]
        if lacking:
            return False
    return older.head.run_id == bundle.head.run_id


def _identity(row: Row) -> tuple[tuple[str, bytes], ...]:
    return tuple(sorted((name, bytes(value)) for name, value in row.items()))


def _write_synced(target: Path, packed: bytes, at: At) -> None:
    """Write a file under a temporary name in its folder, sync it, rename it, sync the folder; raises OSError."""
    target.parent.mkdir(exist_ok=True)
    temporary = target.parent / f".{target.name}.tmp"
    half = len(packed) // 2
    with temporary.open("xb") as file:
        file.write(packed[:half])
        file.flush()
        at("half written")
        file.write(packed[half:])
        file.flush()
        os.fsync(file.fileno())
    at("file synced")
    temporary.rename(target)
    at("renamed")
    _sync_folder(target.parent)
    at("folder synced")


def _sync_folder(folder: Path) -> None:
    """Make a folder's entries outlive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
