"""`python -m service up`, as a person runs it: it comes up, survives the death of each part, and goes down clean."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from service.embedded import RunningStack, running_stack

pytestmark = pytest.mark.acceptance

CHECKOUT = Path(__file__).parents[2]


class Up:
    """One `up` in a folder of its own; `url` and `token` are what it printed."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        environment = {name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "REDIS_URL")}
        self.log = (folder.parent / "up.log").open("w+")
        self.process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "service", "up", "--port", "0", *arguments],
            cwd=CHECKOUT, env={**environment, "PLIMSOLL_STACK_DIR": str(folder)},
            stdout=subprocess.PIPE, stderr=self.log, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        said = [self.process.stdout.readline().strip() for _ in range(2)]
        assert [line.partition(": ")[0] for line in said] == ["url", "token"], self.words()
        self.url, self.token = (line.partition(": ")[2] for line in said)

    def told(self) -> RunningStack:
        """Return what it tells the other commands of the checkout."""
        told = running_stack(self.folder)
        assert told is not None
        return told

    def status(self, path: str, method: str = "GET", body: object = None, token: str | None = None) -> int:
        """Send one request and return its status; 0 when nobody answers."""
        request = urllib.request.Request(  # noqa: S310 - our own address
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"authorization": f"Bearer {token or self.token}", "content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
                return int(answer.status)
        except urllib.error.HTTPError as refusal:
            with refusal:
                return refusal.code
        except OSError:
            return 0

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
        """Ask it to stop; returns the exit code and the seconds it took."""
        asked = time.monotonic()
        self.process.send_signal(number)
        code = self.process.wait(30)
        return code, time.monotonic() - asked

    def end(self) -> None:
        """Kill it, where a test failed before it stopped it."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.log.close()

    def words(self) -> str:
        """Return what it wrote to standard error."""
        self.log.seek(0)
        return self.log.read()


@pytest.fixture
def up() -> Iterator[Callable[..., Up]]:
    """Start `up` in a folder that is this test's own."""
    folder = Path(tempfile.mkdtemp(prefix="plimsoll-test-"))
    folder.chmod(0o711)
    started: list[Up] = []

    def start(*arguments: str) -> Up:
        started.append(Up(folder / "stack", *arguments))
        return started[-1]

    yield start
    for one in started:
        one.end()
    shutil.rmtree(folder)


def runs(pid: int) -> bool:
    """Tell whether a process still does anything (one that nobody has reaped does not)."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def becomes_true(condition: Callable[[], bool], patience_s: float = 20.0) -> bool:
    """Wait until a condition holds; False when it does not in time."""
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_it_comes_up_ready_and_a_stop_leaves_nothing_but_the_data(up: Callable[..., Up]) -> None:
    first = up()
    assert first.status("/readyz") == 200
    assert first.status("/api/workspaces/", "POST", {"name": "acme"}) == 200
    pids = first.told().pids
    assert set(pids) == {"owner", "postgres", "redis", "http-1", "worker-1"}
    assert first.told().url == first.url
    code, seconds = first.stop()
    assert code == 0, first.words()
    assert seconds < 15
    assert not any(runs(pid) for pid in pids.values())
    assert first.status("/livez") == 0
    assert running_stack(first.folder) is None

    second = up()
    assert second.token != first.token
    assert second.status("/api/workspaces/", "POST", {"name": "acme"}, first.token) == 401
    assert second.status("/api/workspaces/", "POST", {"name": "acme"}) == 200
    assert (second.folder / "token").read_text() == second.token + "\n"
    assert (second.folder / "token").stat().st_mode & 0o777 == 0o600
    assert second.stop()[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupt_or_a_lost_terminal_stops_it_like_sigterm(up: Callable[..., Up], number: signal.Signals) -> None:
    running = up("--processes", "2", "--workers", "2")
    pids = running.told().pids
    assert running.stop(number)[0] == 0, running.words()
    assert not any(runs(pid) for pid in pids.values())
    assert running_stack(running.folder) is None


def test_each_part_that_is_killed_comes_back(up: Callable[..., Up]) -> None:
    running = up("--processes", "2", "--workers", "2")
    before = running.told().pids
    assert set(before) == {"owner", "postgres", "redis", "http-1", "http-2", "worker-1", "worker-2"}
    for name in ("worker-1", "http-2", "redis", "postgres"):
        os.kill(before[name], signal.SIGKILL)

        def is_back(name: str = name) -> bool:
            return running.told().pids.get(name, before[name]) != before[name]

        assert becomes_true(is_back), running.words()
    assert becomes_true(lambda: running.status("/readyz") == 200), running.words()
    assert running.status("/api/workspaces/", "POST", {"name": "acme"}) == 200
    after = running.told().pids
    assert {name for name in before if after[name] == before[name]} == {"owner", "http-1", "worker-2"}
    assert running.stop()[0] == 0


def test_after_kill_9_of_the_owner_nothing_runs_and_the_next_start_works(up: Callable[..., Up]) -> None:
    first = up()
    pids = first.told().pids
    first.process.kill()
    first.process.wait()
    assert becomes_true(lambda: not any(runs(pid) for pid in pids.values()))
    second = up()
    assert second.status("/readyz") == 200
    assert second.stop()[0] == 0
