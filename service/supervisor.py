"""Keeps child processes alive: starts them, starts again those that die, drains them when asked to stop.

A child that dies comes back after a tenth of a second, and each death soon after the last one doubles the wait, up to
two seconds. SIGTERM or SIGINT to the supervisor becomes SIGTERM for every child; a child that has not ended after
`DRAIN_PATIENCE_S` is killed, and so it is at a second signal if that is a SIGINT: a person presses Ctrl-C again, while
SIGTERM comes twice when a service manager signals a whole group. SIGHUP replaces the children one by one: another is
started, and when it says that it works (`readiness`), the old one is drained; if it does not say so, the old one stays.
When the supervisor itself is killed, the kernel kills the children (Linux). Read `processes.py` for how a child is
started, `up.py` and `serve.py` for who is supervised.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Self

import structlog

from service import processes
from service.conduct import heeds_hangup
from service.errors import PlimsollError
from service.readiness import READY_FD

FIRST_WAIT_S = 0.1  # before a dead child is started again
LONGEST_WAIT_S = 2.0
STABLE_AFTER_S = 10.0  # a child that lived this long begins again at FIRST_WAIT_S
READY_PATIENCE_S = 60.0  # for a replacement to work: a cold machine imports, connects and answers in a few seconds
WATCH_INTERVAL_S = 1.0  # how often `watch` is called when nothing happens
DRAIN_PATIENCE_S = 12.0  # a request has 10 s to end (`server.py`); all within 15 s with the servers' own end

log = structlog.get_logger()


class ChildFailed(PlimsollError):
    """A child ended, or was not ready in time, before the whole was up; its own words are on standard error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """What is to run."""

    name: str  # unique among its supervisor's children; in logs and in stack.json
    command: Sequence[str]
    environment: Mapping[str, str]
    pass_fds: Sequence[int] = ()  # open files it inherits, under the same numbers


@dataclass(slots=True)
class _Post:
    """One child's place: the process that fills it now, and when the next one may."""

    child: Child
    process: subprocess.Popen[bytes] | None = None
    started_at_s: float = 0.0  # monotonic clock
    wait_s: float = FIRST_WAIT_S
    due_at_s: float = 0.0  # monotonic clock; when it may start again


class Signals:
    """SIGTERM, SIGINT and SIGHUP as flags to look at and a moment to wait for, as long as its `with` block lasts."""

    def __init__(self, *, replacing: bool = False) -> None:
        self.requests = 0  # how often a stop was asked for
        self.hurried = False  # a stop was asked for again, by a person
        self.replacement_wanted = False  # SIGHUP came; whoever sees to it clears this
        self._replacing = replacing  # whether SIGHUP asks for replacements; else it asks for a stop
        self.interrupting = True  # raise KeyboardInterrupt as well: for the time before anything is supervised
        self._previous: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}
        self._reader, self._writer = socket.socketpair()

    def __enter__(self) -> Self:
        for end in (self._reader, self._writer):
            end.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._ask)
        if self._replacing or heeds_hangup():
            self._previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._ask)
        self._previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)  # its arrival wakes `wait`
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._reader.close()
        self._writer.close()

    def wait(self, timeout_s: float) -> None:
        """Return at the next signal (a child's death included), at the latest after `timeout_s` seconds."""
        select.select([self._reader], [], [], max(0.0, timeout_s))
        try:
            while self._reader.recv(4096):
                pass
        except BlockingIOError:
            pass

    def _ask(self, number: int, frame: FrameType | None) -> None:
        """Note what was asked for."""
        if number == signal.SIGHUP and self._replacing:
            self.replacement_wanted = True
            return
        self.hurried |= self.requests > 0 and number == signal.SIGINT
        self.requests += 1
        if self.interrupting:
            raise KeyboardInterrupt


@dataclass(slots=True)
class Supervisor:
    """A fixed set of children; `with Supervisor(children, signals) as supervisor: supervisor.run()`.

    `watch` is called at every turn, at least once a second, for what else must be kept alive. `on_change` receives
    the ids by name whenever a child was started; `on_death` receives the id of a process that ended; `before_drain`
    is called when a stop begins.
    """

    children: Sequence[Child]
    signals: Signals
    watch: Callable[[], object] = lambda: None
    on_change: Callable[[Mapping[str, int]], object] = lambda _: None
    on_death: Callable[[int], object] = lambda _: None
    before_drain: Callable[[], object] = lambda: None
    _posts: list[_Post] = field(init=False)
    _retiring: subprocess.Popen[bytes] | None = field(init=False, default=None)  # replaced, and not gone yet

    def __enter__(self) -> Self:
        self.signals.interrupting = False
        self._posts = [_Post(child) for child in self.children]
        self._start_due()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._drain()

    def wait_until(self, ready: Callable[[], bool], patience_s: float) -> bool:
        """Return True once `ready()` holds, False when a stop was asked for; raises ChildFailed."""
        deadline = time.monotonic() + patience_s
        while not ready():
            if self.signals.requests:
                return False
            for post in self._posts:
                if post.process is not None and post.process.poll() is not None:
                    raise ChildFailed(f"{post.child.name} ended before it was ready ({_ending(post.process)})")
            if time.monotonic() > deadline:
                raise ChildFailed(f"{self._posts[0].child.name} was not ready after {patience_s:.0f} s")
            self.signals.wait(0.05)
        return True

    def run(self) -> None:
        """Keep every child alive until a stop is asked for."""
        while not self.signals.requests:
            if self.signals.replacement_wanted:
                self.signals.replacement_wanted = False
                self._replace_all()
            self._keep()
            now = time.monotonic()
            waits = [post.due_at_s - now for post in self._posts if post.process is None]
            self.signals.wait(min([WATCH_INTERVAL_S, *waits]))

    def _keep(self) -> None:
        """Keep alive what must be."""
        self._note_deaths()
        self.watch()
        self._start_due()

    def _replace_all(self) -> None:
        """Replace the children one by one; stops at the first that cannot be replaced, or when a stop is asked for."""
        for post in self._posts:
            if not self._replace(post):
                return
        log.info("children_replaced", children=len(self._posts))

    def _replace(self, post: _Post) -> bool:
        """Start another process for a post, and drain the old one once the new one works; False when it does not."""
        reader, writer = os.pipe()
        new = self._spawn(post.child, ready_fd=writer)
        os.close(writer)
        try:
            ready = self._becomes_ready(new, reader)
        finally:
            os.close(reader)
        if not ready:
            processes.stop(new, signal.SIGTERM, patience_s=DRAIN_PATIENCE_S)
            self.on_death(new.pid)
            if not self.signals.requests:
                log.error("child_not_replaced", child=post.child.name, reason="the new process does not come up")
            return False
        old, post.process, post.started_at_s = post.process, new, time.monotonic()
        self._tell()
        if old is not None:
            self._retire(old)
        log.info("child_replaced", child=post.child.name, pid=new.pid)
        return not self.signals.requests

    def _retire(self, old: subprocess.Popen[bytes]) -> None:
        """Drain a process that was replaced, and keep the others alive meanwhile."""
        self._retiring = old
        if old.poll() is None:
            old.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + DRAIN_PATIENCE_S
        while old.poll() is None and time.monotonic() < deadline:
            if self.signals.requests:  # it is drained with all the others
                return
            self._keep()
            self.signals.wait(0.05)
        processes.stop(old, patience_s=0)
        self.on_death(old.pid)
        self._retiring = None

    def _becomes_ready(self, process: subprocess.Popen[bytes], reader: int) -> bool:
        """Wait until a process says that it works; keeps the others alive meanwhile."""
        deadline = time.monotonic() + READY_PATIENCE_S
        while not self.signals.requests and process.poll() is None and time.monotonic() < deadline:
            if select.select([reader], [], [], 0)[0]:
                return os.read(reader, 1) == b"1"
            self._keep()
            self.signals.wait(0.05)
        return False

    def _note_deaths(self) -> None:
        """Say which children ended, and set when each may start again."""
        now = time.monotonic()
        for post in self._posts:
            if post.process is None or post.process.poll() is None:
                continue
            post.wait_s = FIRST_WAIT_S if now - post.started_at_s >= STABLE_AFTER_S else post.wait_s
            log.warning(
                "child_ended", child=post.child.name, pid=post.process.pid, ending=_ending(post.process),
                starts_again_in_s=post.wait_s,
            )  # fmt: skip
            self.on_death(post.process.pid)
            post.process = None
            post.due_at_s = now + post.wait_s
            post.wait_s = min(2 * post.wait_s, LONGEST_WAIT_S)

    def _start_due(self) -> None:
        """Start every child that is not running and may."""
        now = time.monotonic()
        due = [post for post in self._posts if post.process is None and post.due_at_s <= now]
        for post in due:
            post.started_at_s = now
            post.process = self._spawn(post.child)
        if due:
            self._tell()

    def _spawn(self, child: Child, ready_fd: int | None = None) -> subprocess.Popen[bytes]:
        """Start a child's process; it may say on `ready_fd` that it works."""
        environment, pass_fds = dict(child.environment), child.pass_fds
        environment.pop(READY_FD, None)  # our own supervisor's, if we have one
        if ready_fd is not None:
            environment[READY_FD] = str(ready_fd)
            pass_fds = [*pass_fds, ready_fd]
        process = processes.spawn(
            child.command,
            death_signal=signal.SIGKILL,  # what a crash leaves must be safe anyway; what lingers holds the port
            environment=environment,
            pass_fds=pass_fds,
        )
        log.info("child_started", child=child.name, pid=process.pid)
        return process

    def _tell(self) -> None:
        self.on_change({post.child.name: post.process.pid for post in self._posts if post.process is not None})

    def _drain(self) -> None:
        """Ask every child to end, wait, and kill what is left."""
        self.before_drain()
        all_of_them = [*(post.process for post in self._posts), self._retiring]
        living = [process for process in all_of_them if process is not None and process.poll() is None]
        for process in living:
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + DRAIN_PATIENCE_S
        while any(process.poll() is None for process in living):
            now = time.monotonic()
            if now >= deadline or self.signals.hurried:
                break
            self.signals.wait(deadline - now)
        for process in living:
            if process.poll() is None:
                log.warning("child_killed", pid=process.pid, reason="it did not drain in time")
                processes.stop(process, patience_s=0)


def _ending(process: subprocess.Popen[bytes]) -> str:
    """Say how a process ended."""
    code = process.returncode
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
