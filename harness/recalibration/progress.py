"""What a recalibration has done so far, on disk, so that one that was killed is gone on with instead of begun anew.

A step is written down when its sample set is whole and was found valid, never before. What was begun under other
settings, at another commit, or longer than a day ago is not gone on with: it would mix two measurements into one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from harness.errors import BadUsage, HarnessError

STATE = "under_way.json"
LOCK = "lock"
MOST_AGE_S = 86_400.0
"""A service of a day ago may be another one."""


class AlreadyAtWork(HarnessError):
    """Another recalibration is at work in this checkout."""


class Progress(msgspec.Struct, forbid_unknown_fields=True):
    """What is done."""

    wish: dict[str, Any]  # what was asked for: as long as it is the same, what is done counts
    begun_at_s: float  # wall clock, since 1970
    recalibration: int | None = None  # its number at the service; null before the first step
    samples: dict[str, str] = {}  # step -> folder of its sample set
    report: str | None = None  # folder


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep the folder for this process; raises AlreadyAtWork, or BadUsage when it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as fault:
        raise BadUsage(
            f"cannot write {folder} ({fault.strerror}): set PLIMSOLL_DATA to a folder that can be written"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise AlreadyAtWork(
                f"another recalibration is at work in this checkout (process {lock.read().strip() or 'unknown'})"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def read(folder: Path, wish: dict[str, Any], now_s: float | None = None) -> Progress:
    """Return what is done of a wish; nothing is when it was begun under another wish, or too long ago."""
    now_s = time.time() if now_s is None else now_s
    fresh = Progress(wish, now_s)
    try:
        found = msgspec.json.decode((folder / STATE).read_bytes(), type=Progress)
    except (OSError, msgspec.DecodeError):  # none, or one that a full disk cut short
        return fresh
    if found.wish != wish or not 0 <= now_s - found.begun_at_s <= MOST_AGE_S:
        return fresh
    found.samples = {step: path for step, path in found.samples.items() if Path(path).is_dir()}
    if found.report is not None and not Path(found.report).is_dir():
        found.report = None
    return found


def write(folder: Path, progress: Progress) -> None:
    """Write it down in one step."""
    unfinished = folder / f"{STATE}.unfinished"
    unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(progress), indent=2) + b"\n")
    unfinished.replace(folder / STATE)


def forget(folder: Path) -> None:
    """Forget it: the service knows the rest."""
    (folder / STATE).unlink(missing_ok=True)
