"""The two servers together: one owner at a time, an address for every other command, nothing left behind.

The owner holds a lock on the folder as long as it lives, however it ends; `stack.json` says where things are while it
runs. Whatever a killed owner left running is recognised and ended by the next start, and the data are kept.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

import msgspec
import psutil

from service import processes
from service.embedded.place import Place, find_place
from service.embedded.postgres import Postgres
from service.embedded.redis import Redis
from service.errors import ConfigurationError, PlimsollError

Server = Literal["postgres", "redis"]
LOCK_PATIENCE_S = 0.2  # someone who only looks whether the folder is in use holds the lock for a moment


class StackLocked(PlimsollError):
    """Another process runs the stack in this folder; the message says which and where."""


class RunningStack(msgspec.Struct, frozen=True, kw_only=True):
    """What `stack.json` tells other commands while the stack runs."""

    database_url: str
    redis_url: str
    url: str | None  # of the HTTP service; None until it answers, and where there is none
    pids: dict[str, int]  # by role: owner, postgres, redis, and what the owner supervises
    owner_started_at: float  # seconds since the epoch, as the kernel knows it: ids are used again


class Stack:
    """Private servers in `folder`, started on entry and ended on exit; `servers` leaves out what is set elsewhere."""

    def __init__(self, folder: Path, servers: Mapping[Server, str | None] | None = None) -> None:
        """`servers` maps a server to the address which replaces it; None or absent: start a private one."""
        self.folder = Path(folder).absolute()
        given = servers or {}
        self._given_database_url = given.get("postgres")
        self._given_redis_url = given.get("redis")
        self.postgres: Postgres | None = None
        self.redis: Redis | None = None
        self._url: str | None = None
        self._children: dict[str, int] = {}
        self._lock: IO[str] | None = None
        self._place: Place | None = None

    def __enter__(self) -> Self:
        make_folder(self.folder)
        self._lock = _take_lock(self.folder)
        try:
            self._start()
            self.tell()
        except OSError as error:  # a full disk, a folder taken away, another user's file
            self._end()
            raise ConfigurationError(
                f"{error.filename or self.folder}: {error.strerror}; mend that, or choose another folder with"
                " PLIMSOLL_STACK_DIR"
            ) from error
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @property
    def database_url(self) -> str:
        """The libpq address of the database."""
        if self._given_database_url is not None:
            return self._given_database_url
        if self.postgres is None:
            raise RuntimeError("the stack is started on entering its `with` block")
        return self.postgres.url

    @property
    def redis_url(self) -> str:
        """The address of Redis, for redis-py."""
        if self._given_redis_url is not None:
            return self._given_redis_url
        if self.redis is None:
            raise RuntimeError("the stack is started on entering its `with` block")
        return self.redis.url

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by role."""
        servers = {"postgres": self.postgres, "redis": self.redis}
        started = {name: server.process.pid for name, server in servers.items() if server and server.process}
        return {"owner": os.getpid(), **started, **self._children}

    def mend(self) -> list[str]:
        """Start again each server that died, at its old address; returns their names (empty: all is well)."""
        mended = []
        for name, server in (("postgres", self.postgres), ("redis", self.redis)):
            if server is not None and server.process is not None and server.process.poll() is not None:
                server.start()
                server.wait_until_ready()
                mended.append(name)
        if mended:
            self.tell()
        return mended

    def tell(self, url: str | None = None, children: Mapping[str, int] | None = None) -> None:
        """Write `stack.json`: with `url` and `children` (ids by role) when given, else with those told before."""
        self._url = url if url is not None else self._url
        self._children = dict(children) if children is not None else self._children
        told = RunningStack(
            database_url=self.database_url,
            redis_url=self.redis_url,
            url=self._url,
            pids=self.pids,
            owner_started_at=psutil.Process().create_time(),
        )
        write_private(self.folder / "stack.json", msgspec.json.format(msgspec.json.encode(told)) + b"\n")

    def _start(self) -> None:
        """Start the servers side by side and wait for both."""
        if self._given_redis_url is not None and self._given_database_url is not None:
            return
        self._place = find_place(self.folder)
        if self._given_redis_url is None:
            self.redis = Redis(self._place)
            self.redis.start()
        if self._given_database_url is None:
            self.postgres = Postgres(self._place)
            self.postgres.start()
        for server in (self.redis, self.postgres):
            if server is not None:
                server.wait_until_ready()

    def _end(self) -> None:
        """End the servers and give the folder free."""
        for server in (self.postgres, self.redis):
            if server is not None:
                server.stop()
        if self._place is not None:
            shutil.rmtree(self._place.sockets, ignore_errors=True)  # may be under /tmp, where nothing should stay
        (self.folder / "stack.json").unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def running_stack(folder: Path) -> RunningStack | None:
    """Return where the stack in `folder` is, or None when none runs there."""
    try:
        told = msgspec.json.decode((folder / "stack.json").read_bytes(), type=RunningStack)
        owner = psutil.Process(told.pids["owner"])
        same = abs(owner.create_time() - told.owner_started_at) < 1.0
        return told if same and processes.runs(owner) else None
    except (OSError, msgspec.DecodeError, KeyError, psutil.Error):
        return None


def write_private(path: Path, content: bytes) -> None:
    """Replace a file in one step by one that only its owner may read: it may hold a password or a token."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    unfinished.touch(mode=0o600)
    unfinished.write_bytes(content)
    unfinished.replace(path)


def make_folder(folder: Path) -> None:
    """Make the stack's folder, which others may pass through but not list; raises ConfigurationError naming it."""
    try:
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            folder.chmod(0o711)  # whatever the umask: PostgreSQL's user passes through it
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise ConfigurationError(
            f"{folder}: {error.strerror}; give a folder that you may write with PLIMSOLL_STACK_DIR"
        ) from None


def _take_lock(folder: Path) -> IO[str]:
    """Return the open lock file of `folder`; raises StackLocked when another process holds it."""
    try:
        lock = (folder / "lock").open("a")
    except OSError as error:
        raise ConfigurationError(
            f"{folder / 'lock'}: {error.strerror}; give a folder of your own with PLIMSOLL_STACK_DIR"
        ) from None
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while not _locked(lock):
        if time.monotonic() < deadline:
            time.sleep(0.02)
            continue
        lock.close()
        told = running_stack(folder)
        who = f"process {told.pids['owner']}" if told else "a process that is just starting or stopping it"
        where = f", {told.url}" if told and told.url else ""
        raise StackLocked(
            f"the stack in {folder} is already running ({who}{where}): stop it, or choose another folder with"
            " PLIMSOLL_STACK_DIR"
        )
    return lock


def _locked(lock: IO[str]) -> bool:
    """Take the lock; False when another process holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
