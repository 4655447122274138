"""One open-loop measurement for a campaign: on a target of the campaign's own, with somebody who may interfere."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from harness.arrivals import Arrivals, Schedule
from harness.client import Client
from harness.measurement import Measured, measure
from harness.openloop import OpenPlan
from harness.target import Target, end_with_parent

PATH = "/api/runs/"  # any path does: the targets read none
PATIENCE_S = 30.0

Interference = Callable[[list[int]], None]
"""Gets the senders' processes as soon as they send, in a thread of its own."""


@contextlib.contextmanager
def served(module: str, *words: str) -> Iterator[tuple[str, int]]:
    """Run a target as a process of its own that prints `url: …`; yields its URL and its process id."""
    command = [sys.executable, "-m", module, *words]
    with subprocess.Popen(  # noqa: S603 - our own module
        command, stdout=subprocess.PIPE, text=True, preexec_fn=end_with_parent
    ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[1], process.pid
        finally:
            process.send_signal(signal.SIGCONT)  # one that was left frozen cannot be ended otherwise
            process.terminate()


def plan(url: str, schedule: Schedule, workers: int = 1, connections: int = 64) -> OpenPlan:
    """Return the plan of one plain request at each arrival."""
    return OpenPlan(schedule, workers, connections, habits=None, request=Client(url).wire("GET", PATH))


def constant(rate_per_s: float, duration_s: float) -> Schedule:
    """Return evenly spaced arrivals."""
    return Schedule(Arrivals.CONSTANT, rate_per_s, duration_s)


def measured(wanted: OpenPlan, url: str, folder: Path, interfere: Interference | None = None) -> Measured:
    """Make one measurement, while `interfere` does its worst."""
    target = Target(url, "none", set, lambda: None, embedded=False)
    meddler = threading.Thread(target=_meddle, args=(interfere,)) if interfere is not None else None
    if meddler is not None:
        meddler.start()
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
            return measure(wanted, contextlib.nullcontext(target), folder)
    finally:
        if meddler is not None:
            meddler.join()


def _meddle(interfere: Interference) -> None:
    """Wait until every sender has begun, then interfere."""
    give_up_at = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up_at:
        if senders := sending():
            interfere(senders)
            return
        time.sleep(0.01)


def sending() -> list[int]:
    """Return the senders of this process that have opened their connections."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "harness.sender" in child.cmdline() and child.net_connections("tcp"):
                found.append(child.pid)
    return found
