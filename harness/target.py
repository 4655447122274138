"""Finds the service to measure: the one named by the caller, or an embedded stack of the harness's own.

An own stack is `python -m service up` in a folder that no other harness uses; it is stopped on every way out. Where
the kernel offers it, it is told to stop even when the harness is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import psutil

from harness.address import split_url
from harness.errors import BadUsage, StackFailed

STACK_DIR_VARIABLE = "PLIMSOLL_STACK_DIR"  # where `python -m service up` keeps its files
START_TIMEOUT_S = 120.0  # a first start makes a database; on a slow disk that has taken tens of seconds
POLL_S = 0.1
STOP_TIMEOUT_S = 20.0  # `up` drains and stops all within about 15 s
LAST_LINES = 5
STACKS_MAX = 100  # so many harnesses at once in one checkout mean that something else is wrong
UP_COMMAND = (sys.executable, "-m", "service", "up", "--port", "0")


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A service that can be measured."""

    url: str
    token: str = dataclasses.field(repr=False)  # an installation token
    pids: Callable[[], set[int]]  # the service's processes on this machine; empty when it is elsewhere
    check: Callable[[], None]  # raises StackFailed when an own stack has ended by itself
    embedded: bool
    folder: Path | None = None  # of an own stack: where it keeps its files, and where its other commands find it

    @property
    def name(self) -> str:
        """How the manifest names it: an own stack's port is chance, not a parameter."""
        return "embedded" if self.embedded else self.url


def named_target(url: str, token: str | None) -> Target:
    """Use a service that runs already; raises BadUsage for an address or token that cannot be used."""
    split_url(url)
    if not token:
        raise BadUsage("--url needs --token (or PLIMSOLL_TOKEN): give an installation token of that service")
    if not all("!" <= character <= "~" for character in token):
        raise BadUsage("--token holds a space or a character that no token has: give it as it was shown")
    return Target(url.rstrip("/"), token, set, lambda: None, embedded=False)


def _environment(folder: Path) -> dict[str, str]:
    """Return the environment of a stack of our own: addresses of somebody else's servers are not passed on.

    `up` would use them, and the load would go to a database that the manifest does not name.
    """
    kept = {name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "REDIS_URL")}
    return kept | {STACK_DIR_VARIABLE: str(folder)}


@contextlib.contextmanager
def own_stack(stacks: Path, command: tuple[str, ...] = UP_COMMAND) -> Iterator[Target]:
    """Start an embedded stack under `stacks`, yield it when it is ready, stop it; raises StackFailed or BadUsage."""
    folder, lock = _free_folder(stacks)
    log = folder.with_suffix(".log")
    # Its log is a file, because a pipe that nobody reads would stop the stack; kept for whoever asks what happened.
    with lock, log.open("w", encoding="utf-8") as complaints:
        process = subprocess.Popen(  # noqa: S603 - our own command
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            env=_environment(folder),
            # Ctrl-C on the terminal is for the harness, which cancels its runs before it stops the stack.
            start_new_session=True,
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )
        output = _Output(process, log)
        try:
            url, token = output.wait_until_ready()
            yield Target(url, token, lambda: _pids(process.pid, folder), output.check, embedded=True, folder=folder)
        finally:
            _stop(process)
            output.join(STOP_TIMEOUT_S)


def await_the_last(stacks: Path) -> None:
    """Wait until the stack of a harness that was killed has ended, so that its folder is taken again; not for long."""
    until = time.monotonic() + STOP_TIMEOUT_S
    while _in_use((stacks / "harness-1").absolute()) and time.monotonic() < until:
        time.sleep(POLL_S)


def end_with_parent() -> None:
    """Ask Linux to send SIGTERM to this new process when the harness ends in whatever way (prctl(2))."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _free_folder(stacks: Path) -> tuple[Path, IO[str]]:
    """Return the first folder that neither another harness nor a stack uses, and the open file that keeps it ours."""
    try:
        stacks.mkdir(parents=True, exist_ok=True)
        for number in range(1, STACKS_MAX + 1):
            folder = (stacks / f"harness-{number}").absolute()
            lock = (stacks / f"{folder.name}.lock").open("a")
            if _locked(lock) and not _in_use(folder):
                return folder, lock
            lock.close()
    except OSError as fault:
        raise BadUsage(
            f"cannot keep a stack in {stacks} ({fault.strerror}): set PLIMSOLL_DATA to a folder that can be written,"
            " or name a running service with --url"
        ) from None
    raise BadUsage(f"{STACKS_MAX} stacks are in use under {stacks}: end some, or name a running service with --url")


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _in_use(folder: Path) -> bool:
    """Tell whether a stack, perhaps one that outlived its harness, still holds the folder's own lock."""
    try:
        with (folder / "lock").open("a") as lock:
            return not _locked(lock)
    except FileNotFoundError:
        return False


class _Output(threading.Thread):
    """Reads what the stack prints, to the end: a full pipe would stop it."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        super().__init__(name="stack output", daemon=True)
        self._log = log
        self._process = process
        self._told: dict[str, str] = {}
        self._enough = threading.Event()
        self.start()

    def run(self) -> None:
        """Take the lines `url: …` and `token: …`."""
        assert self._process.stdout is not None  # noqa: S101 - it is a pipe
        with self._process.stdout as lines:
            for line in lines:
                key, _, value = line.partition(": ")
                if key in {"url", "token"}:
                    self._told[key] = value.strip()
                if len(self._told) == 2:
                    self._enough.set()
        self._enough.set()

    def wait_until_ready(self) -> tuple[str, str]:
        """Return url and token; raises StackFailed when they do not come."""
        in_time = self._enough.wait(START_TIMEOUT_S)
        if len(self._told) == 2:
            return self._told["url"], self._told["token"]
        if not in_time:
            raise self._failed(f"the embedded stack was not ready after {START_TIMEOUT_S:g} s")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        raise self._failed(f"the embedded stack ended before it was ready (exit code {self._process.poll()})")

    def check(self) -> None:
        """Raise StackFailed when the stack has ended, though nobody here asked it to."""
        if self._process.poll() is not None:
            raise self._failed(f"the embedded stack ended by itself (exit code {self._process.returncode})")

    def _failed(self, fault: str) -> StackFailed:
        lines = [line.strip() for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines()]
        return StackFailed(f"{fault}, see {self._log}", [line for line in lines if line][-LAST_LINES:])


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _pids(owner: int, folder: Path) -> set[int]:
    """Name the stack's processes: those it says, and all that descend from them (each connection has one)."""
    told: set[int] = {owner}
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        told |= {int(pid) for pid in json.loads((folder / "stack.json").read_bytes())["pids"].values()}
    found = set(told)
    for pid in told:
        with contextlib.suppress(psutil.Error):
            found |= {child.pid for child in psutil.Process(pid).children(recursive=True)}
    return found
