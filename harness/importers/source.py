"""The file that is imported, line by line: opened or refused, unpacked, decoded, and never held whole.

A line may be long (Vegeta keeps the answers' bodies) but not endless. What is wrong with a file as a whole is bad usage
(64); what is wrong with one of its lines makes the measurement invalid (2), and names file, line and column.
Next: `recognise`, `fields`.
"""

from __future__ import annotations

import contextlib
import gzip
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from harness.errors import BadUsage, HarnessError

LINE_BYTES_MAX = 16 * 1024 * 1024
"""Of one line; a Vegeta result holds the body of an answer in base64."""

HEAD_BYTES = 65_536
"""From the beginning of the file, to tell what it is."""

GZIP_MARK = b"\x1f\x8b"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
UTF8_MARK = "\ufeff"


class NotThisFile(BadUsage):
    """The file as a whole is not what was asked for; the text says what to give instead."""

    def __init__(self, path: Path, text: str) -> None:
        super().__init__(f"{path}: {text}")
        self.path = path


class BadLine(HarnessError):
    """One line of the file cannot be used."""

    def __init__(self, path: Path, line: int, column: str | None, text: str) -> None:
        where = f"line {line}" + (f", column {column}" if column else "")
        super().__init__(f"{path}: {where}: {text}")
        self.path, self.line, self.column, self.text = path, line, column, text


class Unusable(Exception):
    """What is being read cannot be used; `intake` adds file and line.

    `shape` says that not even its form is that of the format.
    """

    def __init__(self, text: str, column: str | None = None, *, shape: bool = False) -> None:
        super().__init__(text)
        self.text, self.column, self.shape = text, column, shape


class Peekable(Protocol):
    """What is asked of an open file, packed or not."""

    def peek(self, size: int, /) -> bytes:
        """Return what comes next, without reading it."""
        ...

    def readline(self, size: int, /) -> bytes:
        """Return the next line, or its first `size` bytes."""
        ...

    def read(self, size: int, /) -> bytes:
        """Return the next bytes."""
        ...


class Lines:
    """The lines of a file as text, counted from 1."""

    def __init__(self, path: Path, raw: BinaryIO, unpacked: Peekable) -> None:
        self.path = path
        self.line = 0  # the last one that was read
        self.size = path.stat().st_size  # bytes on disk
        self._raw, self._unpacked = raw, unpacked

    @property
    def bytes_read(self) -> int:
        """Return how many bytes of the file on disk were read, for progress."""
        return self._raw.tell()

    def head(self) -> bytes:
        """Return the beginning without reading it."""
        try:
            return self._unpacked.peek(HEAD_BYTES)[:HEAD_BYTES]
        except (EOFError, zlib.error, OSError) as fault:
            raise NotThisFile(self.path, f"cannot be unpacked ({fault}): export it again") from None

    def __iter__(self) -> Iterator[str]:
        """Yield each line with its end. Raises Unusable."""
        while line := self._line():
            self.line += 1
            if len(line) > LINE_BYTES_MAX:
                raise Unusable(f"is longer than {LINE_BYTES_MAX:,} bytes: this is no such file, or a damaged one")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as fault:
                raise Unusable(f"byte {fault.start + 1} is not UTF-8: the file is damaged, export it again") from None
            if "\0" in text:
                raise Unusable("holds a zero byte: the file is damaged, export it again")
            yield text.removeprefix(UTF8_MARK) if self.line == 1 else text

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes in pieces, for a parser that finds its lines itself. Raises Unusable."""
        while piece := self._piece():
            yield piece

    def _line(self) -> bytes:
        try:
            return self._unpacked.readline(LINE_BYTES_MAX + 1)
        except (EOFError, zlib.error, OSError) as fault:
            raise _unreadable(fault) from None

    def _piece(self) -> bytes:
        try:
            return self._unpacked.read(HEAD_BYTES)
        except (EOFError, zlib.error, OSError) as fault:
            raise _unreadable(fault) from None


def _unreadable(fault: EOFError | zlib.error | OSError) -> Unusable:
    if isinstance(fault, OSError) and not isinstance(fault, gzip.BadGzipFile):
        return Unusable(f"cannot be read ({fault.strerror or fault})")
    return Unusable("the compressed data end early or are damaged: export the file again")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Lines]:
    """Open a file for its lines, gzip unpacked. Raises NotThisFile."""
    try:
        mode = path.stat().st_mode
    except OSError as fault:
        raise NotThisFile(path, _why(fault)) from None
    if not stat.S_ISREG(mode):
        raise NotThisFile(path, "is no regular file: save the tool's output to one, it is read twice")
    try:
        raw = path.open("rb")
    except OSError as fault:
        raise NotThisFile(path, _why(fault)) from None
    with raw:
        packed = raw.peek(len(GZIP_MARK)).startswith(GZIP_MARK)
        yield Lines(path, raw, gzip.GzipFile(fileobj=raw) if packed else raw)


def _why(fault: OSError) -> str:
    if isinstance(fault, FileNotFoundError):
        return "does not exist: give the file that the tool wrote"
    return f"cannot be read ({fault.strerror or fault})"
