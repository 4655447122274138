"""What the bench runs on: private PostgreSQL and Redis, fresh databases, and processes that end with it.

Everything listens on sockets or on 127.0.0.1 and is stopped on every way out. The stack's folder is kept between
benches, for its first start takes seconds; each database is made anew.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import msgspec

from harness.errors import HarnessError, StackFailed
from harness.target import LAST_LINES, end_with_parent
from service.embedded import Stack
from service.embedded.postgres import Postgres
from service.errors import PlimsollError

READY_S = 60.0  # for a process to say where it listens
STOP_S = 15.0  # for a process to drain
PROGRAM_S = 120.0  # for one run of psql or of an administrative command


class ProgramFailed(HarnessError):
    """A program that the bench needs ended with an error; its last words follow."""

    def __init__(self, name: str, last_words: str) -> None:
        super().__init__(f"{name} failed: {last_words}")
        self.name = name


class Process:
    """A Python process of the bench's own; with `listens`, `url` is where it says it listens."""

    def __init__(
        self, module: list[str], environment: Mapping[str, str], *, listens: bool, standard_input: bytes = b""
    ) -> None:
        self._name = " ".join(module)
        self._environment = environment
        self._listens = listens
        self._input = standard_input
        self._words = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed on exit; a pipe nobody reads would block it
        self.url = ""
        self.pid = 0

    @property
    def address(self) -> tuple[str, int]:
        """The host and port of `url`."""
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 0

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(  # noqa: S603 - our own modules
            [sys.executable, "-m", *self._name.split()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            env=dict(self._environment),
            start_new_session=True,  # Ctrl-C is for the bench, which ends its processes one by one
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )
        self.pid = self._process.pid
        try:
            assert self._process.stdin is not None  # noqa: S101 - it is a pipe
            self._process.stdin.write(self._input)
            self._process.stdin.close()
            if self._listens:
                self.url = self._read_url()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def require_alive(self) -> None:
        """Raise StackFailed with the process's last words when it has ended."""
        if self._process.poll() is not None:
            raise StackFailed(f"{self._name} ended (exit code {self._process.returncode})", self._last_lines())

    def _read_url(self) -> str:
        assert self._process.stdout is not None  # noqa: S101 - it is a pipe
        readable, _, _ = select.select([self._process.stdout], [], [], READY_S)
        line = self._process.stdout.readline().decode() if readable else ""
        if not line.startswith("url: "):
            raise StackFailed(f"{self._name} did not say where it listens", self._last_lines())
        return line.removeprefix("url: ").strip()

    def _last_lines(self) -> list[str]:
        self._words.seek(0)
        return [line for line in self._words.read().decode(errors="replace").splitlines() if line.strip()][-LAST_LINES:]

    def _stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None  # noqa: S101 - it is a pipe
        self._process.stdout.close()
        self._words.close()


class Stage:
    """The private servers; `with Stage(folder) as stage:`."""

    def __init__(self, folder: Path) -> None:
        self._stack = Stack(folder)
        self._databases: set[str] = set()

    def __enter__(self) -> Self:
        try:
            self._stack.__enter__()
        except PlimsollError as error:
            raise StackFailed(str(error), []) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._drop(self._databases)
        finally:
            self._stack.__exit__(kind, error, trace)

    @property
    def postgres(self) -> Postgres:
        """The database server."""
        assert self._stack.postgres is not None  # noqa: S101 - this stack brings its own
        return self._stack.postgres

    def redis_url(self, number: int) -> str:
        """Return the address of one of Redis' numbered databases."""
        return f"{self._stack.redis_url}?db={number}"

    @property
    def redis_socket(self) -> Path:
        """The socket of Redis."""
        assert self._stack.redis is not None  # noqa: S101 - this stack brings its own
        return self._stack.redis.socket

    def fresh_database(self, name: str) -> str:
        """Make an empty database, in place of one that an earlier bench left, and return its address."""
        self._drop({name})
        self.sql(self._stack.database_url, f"CREATE DATABASE {name}")
        self._databases.add(name)
        return self.postgres.url_of(name)

    def _drop(self, names: set[str]) -> None:
        statements = [f"DROP DATABASE IF EXISTS {name} WITH (FORCE)" for name in sorted(names)]
        if statements:
            self.sql(self._stack.database_url, *statements)

    def service_environment(self, database: str, redis_number: int) -> dict[str, str]:
        """Make a database with the service's schema and return the environment of processes that use it."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PLIMSOLL_", "PROMETHEUS_"))}
        addresses = {"DATABASE_URL": self.fresh_database(database), "REDIS_URL": self.redis_url(redis_number)}
        environment = {**kept, **addresses, "PLIMSOLL_LOG_LEVEL": "warning"}
        administer(environment, "migrate")
        return environment

    def settle(self, database_url: str) -> None:
        """Do now what PostgreSQL would do later in the background for what was just written.

        Vacuum, statistics and checkpoint of one cell would otherwise take the processor from the next one, which for
        some seconds then shows a third of its rate.
        """
        self.sql(database_url, "VACUUM ANALYZE", "CHECKPOINT")

    def sql(self, database_url: str, *statements: str) -> list[list[str]]:
        """Run statements, each in its own transaction, and return the rows of the last one as text."""
        commands = [part for statement in statements for part in ("-c", statement)]
        quiet = ["-qAtX", "-F", "\t", "-v", "ON_ERROR_STOP=1", "-c", "SET client_min_messages = warning"]
        told = run_program([str(self.postgres.binary("psql")), database_url, *quiet, *commands])
        return [line.split("\t") for line in told.splitlines()]


def administer(environment: Mapping[str, str], *words: str) -> dict[str, Any]:
    """Run an administrative command of the service and return what it printed."""
    told = run_program([sys.executable, "-m", "service", *words, "--json"], environment)
    return msgspec.json.decode(told, type=dict[str, Any])


def run_program(command: list[str], environment: Mapping[str, str] | None = None) -> str:
    """Run a program to its end and return its standard output; raises ProgramFailed."""
    try:
        ended = subprocess.run(  # noqa: S603 - our own commands
            command, env=environment, capture_output=True, text=True, timeout=PROGRAM_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ProgramFailed(Path(command[0]).name, f"it did not end within {PROGRAM_S:.0f} s") from None
    if ended.returncode != 0:
        words = (ended.stderr or ended.stdout).strip().splitlines()[-1:] or ["it said nothing"]
        raise ProgramFailed(Path(command[0]).name, words[0])
    return ended.stdout
