"""The service whose quotas are to change, by its own commands: `python -m service quotas …`.

It is the one that DATABASE_URL and REDIS_URL name, or else this checkout's running stack. Nothing of its database is
read or written here: each command is a process of its own, and what it says is what is known.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from harness.errors import BadUsage, HarnessError
from harness.target import STACK_DIR_VARIABLE
from service.embedded import running_stack
from service.quota.tables import Tables, parse
from service.settings import given_addresses, stack_folder

COMMAND = (sys.executable, "-m", "service")
COMMAND_TIMEOUT_S = 120.0  # one transaction; it may wait for somebody who changes quotas
END_TIMEOUT_S = 10.0
USAGE = 64
GIVEN_UP = b"given up\n"  # what `quotas measuring` understands before its input ends


class ServiceRefused(HarnessError):
    """The service whose quotas are to change said no; its own words are the text."""


class Stand(msgspec.Struct, frozen=True):
    """How the newest recalibration stands there."""

    recalibration: int | None
    phase: str | None
    ended_at: str | None
    revision: int | None

    @property
    def is_settled(self) -> bool:
        """Say whether nothing happens any more until a person does something."""
        return self.phase is None or self.ended_at is not None or self.phase == "waiting"


def is_named() -> bool:
    """Tell whether there is a service whose quotas could change: one is named, or a stack runs in this checkout."""
    return all(given_addresses()) or running_stack(stack_folder()) is not None


def of_stack(folder: Path) -> InForce:
    """Return the service of an embedded stack."""
    kept = {name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "REDIS_URL")}
    return InForce(kept | {STACK_DIR_VARIABLE: str(folder)})


class InForce:
    """A service, and what may be asked of it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        # A token is for what is measured; these commands need none, and pass none on.
        self._environment = {name: value for name, value in environment.items() if name != "PLIMSOLL_TOKEN"}

    def table(self) -> Tables:
        """Return the values in force; raises ServiceRefused when it cannot be asked."""
        return parse(self._ask("quotas", "show", "--json")).limits

    def knows(self, token: str) -> bool:
        """Tell whether a token was made by this service: then a service that takes it is the same one."""
        return bool(json.loads(self._ask("token", "known", "--json", said=f"{token}\n".encode()))["known"])

    def stand(self) -> Stand:
        """Return how the newest recalibration stands."""
        return msgspec.json.decode(self._ask("quotas", "recalibration", "--json"), type=Stand)

    def hand_in(self, file: Path, flags: Sequence[str]) -> dict[str, Any]:
        """Hand a measurement in; returns what was decided."""
        told: dict[str, Any] = json.loads(self._ask("quotas", "recalibrate", str(file), "--json", *flags))
        return told

    def reject(self, revision: int, reason: str) -> None:
        """Decide against a revision, in the place of a person."""
        self._ask("quotas", "reject", str(revision), "--reason", reason)

    @contextlib.contextmanager
    def measuring(self, flags: Sequence[str]) -> Iterator[Place]:
        """Hold the place of whoever measures; raises ServiceRefused when somebody else has it."""
        process = subprocess.Popen(  # noqa: S603 - our own command
            [*COMMAND, "quotas", "measuring", "--json", *flags],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self._environment,
            start_new_session=True,  # Ctrl-C is for the harness
        )  # fmt: skip
        place = Place(process)
        try:
            place.wait_until_held()
            yield place
        finally:
            place.leave()

    def _ask(self, *words: str, said: bytes = b"") -> bytes:
        """Run a command and return what it prints; raises ServiceRefused, or BadUsage, with its own line."""
        try:
            done = subprocess.run(  # noqa: S603 - our own command
                [*COMMAND, *words], input=said, capture_output=True, env=self._environment,
                timeout=COMMAND_TIMEOUT_S, check=False, start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ServiceRefused(f"`service {words[0]} {words[1]}` took over {COMMAND_TIMEOUT_S:g} s") from None
        if done.returncode:
            _refuse(done.returncode, done.stderr)
        return done.stdout


class Place:
    """The place of whoever measures, held by a process that ends when this one does."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._complaints = b""
        self._reader = threading.Thread(target=self._read, name="place's complaints", daemon=True)
        self._reader.start()
        self.recalibration = 0
        self._end_timeout_s = END_TIMEOUT_S

    def wait_until_held(self) -> None:
        """Learn its number; raises ServiceRefused."""
        assert self._process.stdout is not None  # noqa: S101 - it is a pipe
        line = self._process.stdout.readline()
        if not line:
            self._end()
            _refuse(self._process.returncode, self._complaints)
        self.recalibration = int(json.loads(line)["recalibration"])

    def check(self) -> None:
        """Raise ServiceRefused when the place was lost."""
        if self._process.poll() is not None:
            self._end()
            _refuse(self._process.returncode, self._complaints)

    def give_up(self) -> None:
        """Let somebody else begin at once; its process is given the time of a command then, for that is its work."""
        self._end_timeout_s = COMMAND_TIMEOUT_S
        self._say(GIVEN_UP)

    def leave(self) -> None:
        """Give no more signs of life."""
        self._end()

    def _say(self, words: bytes) -> None:
        assert self._process.stdin is not None  # noqa: S101 - it is a pipe
        with contextlib.suppress(OSError):  # it has ended, and its lease will
            self._process.stdin.write(words)
            self._process.stdin.flush()

    def _end(self) -> None:
        assert self._process.stdin is not None  # noqa: S101 - both are pipes
        assert self._process.stdout is not None  # noqa: S101
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(self._end_timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(END_TIMEOUT_S)
        self._process.stdout.close()

    def _read(self) -> None:
        """Take what it complains of, to the end: a full pipe would stop it."""
        assert self._process.stderr is not None  # noqa: S101 - it is a pipe
        with self._process.stderr as complaints:
            for line in complaints:
                self._complaints = line


def _refuse(code: int, complaints: bytes) -> NoReturn:
    """Raise with the last line that a command said."""
    lines = complaints.decode(errors="replace").strip().splitlines()
    words = lines[-1].removeprefix("python -m service: ") if lines else f"it ended with exit code {code}"
    raise (BadUsage if code == USAGE else ServiceRefused)(f"the service whose quotas are to change: {words}")
