"""The supervisor with children that do nothing, in a process of its own that is signalled and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from service.supervisor import Child, ChildFailed, Signals, Supervisor

pytestmark = pytest.mark.acceptance

CHECKOUT = Path(__file__).parents[2]
IDLE = "import signal; signal.pause()"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); signal.pause()"

READY = "import os, signal; from service.readiness import tell_ready; tell_ready(); signal.pause()"
DIES_ANEW = "import os, signal; 'PLIMSOLL_READY_FD' in os.environ and exit(3); signal.pause()"

SUPERVISE = """
import json, os, sys
from service.supervisor import Child, Signals, Supervisor
children = [
    Child(name=name, command=[sys.executable, "-c", code], environment=os.environ)
    for name, code in json.loads(sys.argv[1]).items()
]
with Signals(replacing=True) as signals:
    def tell(pids): os.write(1, json.dumps(dict(pids)).encode() + b"\\n")
    with Supervisor(children, signals, on_change=tell) as supervisor:
        supervisor.run()
"""


class Supervised:
    """A supervisor's process; what it says about its children is read line by line."""

    def __init__(self, **children: str) -> None:
        self.process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", SUPERVISE, json.dumps(children)],
            cwd=CHECKOUT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.pids = self.next_pids()

    def next_pids(self) -> dict[str, int]:
        """Wait until a child was started and return the ids by name."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        while line and not line.startswith("{"):
            line = self.process.stdout.readline()
        pids: dict[str, int] = json.loads(line)
        return pids

    def end(self) -> None:
        """Kill what is left and close the pipes."""
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def supervised() -> Iterator[Callable[..., Supervised]]:
    """Start supervisors that are ended with the test."""
    started: list[Supervised] = []

    def start(**children: str) -> Supervised:
        started.append(Supervised(**children))
        return started[-1]

    yield start
    for one in started:
        one.end()


def gone(pid: int, patience_s: float = 10.0) -> bool:
    """Wait until a process runs no more; False when it still does after `patience_s` seconds."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_a_killed_child_is_started_again_and_its_neighbour_is_left_alone(
    supervised: Callable[..., Supervised],
) -> None:
    running = supervised(one=IDLE, two=IDLE)
    os.kill(running.pids["one"], signal.SIGKILL)
    after = running.next_pids()
    assert after["one"] != running.pids["one"]
    assert after["two"] == running.pids["two"]
    assert psutil.pid_exists(after["one"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_every_child_and_ends_with_0(
    supervised: Callable[..., Supervised], number: signal.Signals
) -> None:
    running = supervised(one=IDLE, two=IDLE)
    running.process.send_signal(number)
    assert running.process.wait(10) == 0
    assert all(gone(pid) for pid in running.pids.values())


def test_a_second_sigint_kills_a_child_that_does_not_drain_and_a_second_sigterm_does_not(
    supervised: Callable[..., Supervised],
) -> None:
    running = supervised(one=DEAF)
    assert running.process.stderr is not None
    assert running.process.stderr.readline() == "deaf\n"
    for _ in range(3):  # as a service manager does that signals the whole group
        running.process.send_signal(signal.SIGTERM)
        assert not gone(running.pids["one"], patience_s=0.3)
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(10) == 0
    assert gone(running.pids["one"])


def test_sighup_replaces_every_child_by_one_that_works(supervised: Callable[..., Supervised]) -> None:
    running = supervised(one=READY, two=READY)
    running.process.send_signal(signal.SIGHUP)
    first, second = running.next_pids(), running.next_pids()
    assert (first["one"] != running.pids["one"], first["two"]) == (True, running.pids["two"])
    assert (second["one"], second["two"] != running.pids["two"]) == (first["one"], True)
    assert all(gone(pid) for pid in running.pids.values())
    assert not any(gone(pid, patience_s=0.0) for pid in second.values())
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(10) == 0
    assert all(gone(pid) for pid in second.values())


def test_sighup_leaves_a_child_whose_replacement_does_not_come_up(supervised: Callable[..., Supervised]) -> None:
    running = supervised(one=DIES_ANEW, two=IDLE)
    running.process.send_signal(signal.SIGHUP)
    assert running.process.stdout is not None
    line = running.process.stdout.readline()
    while "child_not_replaced" not in line:
        assert line, "it ended"
        line = running.process.stdout.readline()
    assert [psutil.pid_exists(pid) for pid in running.pids.values()] == [True, True]
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(10) == 0


def test_a_stop_in_the_middle_of_a_replacement_ends_old_and_new(supervised: Callable[..., Supervised]) -> None:
    running = supervised(one=IDLE)  # its replacement never says that it works
    running.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 20
    while len(pids := {child.pid for child in psutil.Process(running.process.pid).children()}) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(10) == 0
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize(("replacing", "asks_for_a_stop"), [(False, 1), (True, 0)])
def test_sighup_stops_what_does_not_replace(replacing: bool, asks_for_a_stop: int) -> None:
    with Signals(replacing=replacing) as signals:
        signals.interrupting = False
        signal.raise_signal(signal.SIGHUP)
        assert (signals.requests, signals.replacement_wanted) == (asks_for_a_stop, replacing)


def test_under_nohup_a_hangup_stops_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.requests == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_when_the_supervisor_is_killed_no_child_stays(supervised: Callable[..., Supervised]) -> None:
    running = supervised(one=IDLE, two=DEAF)
    running.process.kill()
    assert all(gone(pid) for pid in running.pids.values())


def test_a_child_that_keeps_dying_is_started_again_ever_more_slowly_up_to_the_longest_wait() -> None:
    from service import supervisor as module

    dying = Child(name="dying", command=[sys.executable, "-c", "raise SystemExit(3)"], environment=os.environ)
    waits: list[float] = []
    with Signals() as signals, Supervisor([dying], signals) as supervisor:
        post = supervisor._posts[0]
        while len(waits) < 7:
            assert post.process is not None
            post.process.wait()
            waits.append(post.wait_s)
            supervisor._note_deaths()
            post.due_at_s = 0.0
            supervisor._start_due()
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.6, module.LONGEST_WAIT_S, module.LONGEST_WAIT_S]


def test_a_child_that_ends_before_all_is_ready_is_named_with_how_it_ended() -> None:
    dying = Child(name="http-1", command=[sys.executable, "-c", "raise SystemExit(3)"], environment=os.environ)
    with (
        Signals() as signals,
        pytest.raises(ChildFailed, match=r"^http-1 ended before it was ready \(exit code 3\)$"),
        Supervisor([dying], signals) as supervisor,
    ):
        supervisor.wait_until(lambda: False, patience_s=30.0)


def test_a_command_that_does_not_exist_is_an_ending_like_any_other() -> None:
    missing = Child(name="missing", command=["/nonexistent/program"], environment=os.environ)
    with (
        Signals() as signals,
        pytest.raises(ChildFailed, match=r"missing ended before it was ready \(exit code 127\)"),
        Supervisor([missing], signals) as supervisor,
    ):
        supervisor.wait_until(lambda: False, patience_s=30.0)


def test_signal_handlers_are_put_back() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
    before = [signal.getsignal(number) for number in numbers]
    with Signals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in numbers] == before


def test_before_anything_is_supervised_a_signal_interrupts() -> None:
    with Signals() as signals:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert signals.requests == 1
