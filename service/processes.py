"""Child processes: started so that they end with their parent, recognised after a crash, and stopped by their own id.

A process is recognised by its name and its working folder together, never by an id read from a file alone: ids are
used again by strangers. Nothing here signals a process that it did not start or recognise. Read `launch.py` for the
moment between fork and exec, `supervisor.py` for keeping children alive.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

LAUNCHER = Path(__file__).with_name("launch.py")
KILL_PATIENCE_S = 5.0  # a killed process that is still there after this waits in the kernel, for a disk


@dataclass(frozen=True, slots=True)
class Account:
    """A user of the machine, as whom a child may run."""

    name: str
    uid: int
    gid: int


def tied(command: Sequence[str], death_signal: signal.Signals, account: Account | None = None) -> list[str]:
    """Return the command line that runs `command` as `account` and ends it with `death_signal` when we die.

    The kernel (Linux) means the *thread* that starts it by "we", so only children of the main thread are tied.
    """
    main = threading.current_thread() is threading.main_thread()
    return [
        sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), str(int(death_signal) if main else 0),
        f"{account.uid}:{account.gid}" if account else "-", "--", *command,
    ]  # fmt: skip


def spawn(
    command: Sequence[str],
    *,
    death_signal: signal.Signals,
    environment: Mapping[str, str],
    folder: Path | None = None,
    account: Account | None = None,
    output: IO[bytes] | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `command` in a session of its own, so that a Ctrl-C in the terminal reaches the parent alone.

    `folder` is the working folder; `output` takes standard output and standard error (default: the parent's standard
    error for both). `death_signal` and `account`: see `tied`.
    """
    sink = output if output is not None else sys.__stderr__
    return subprocess.Popen(  # noqa: S603 - the command is the caller's own
        tied(command, death_signal, account),
        stdin=subprocess.DEVNULL,
        stdout=sink,
        stderr=sink,
        cwd=folder,
        env=dict(environment),
        pass_fds=pass_fds,
        start_new_session=True,
    )


def stop(process: subprocess.Popen[bytes], *stop_signals: signal.Signals, patience_s: float) -> None:
    """End a child: each signal in turn with `patience_s` seconds after it, then SIGKILL."""
    for stop_signal in (*stop_signals, signal.SIGKILL):
        if process.poll() is not None:
            return
        process.send_signal(stop_signal)
        try:
            process.wait(KILL_PATIENCE_S if stop_signal is signal.SIGKILL else patience_s)
        except subprocess.TimeoutExpired:
            continue


def living_in(folder: Path, name: str) -> list[psutil.Process]:
    """Return the processes called `name` whose working folder is `folder`: those that a crash left behind.

    Their `info` holds the parent's id as it was found (`ppid`), since any of them may end at any moment.
    """
    place = os.path.realpath(folder)
    found = []
    for process in psutil.process_iter(["name", "ppid"]):
        if process.info["name"] != name:
            continue
        try:
            if process.cwd() == place:
                found.append(process)
        except psutil.Error:  # ended meanwhile, or another user's: not ours either way
            continue
    return found


def end_all(processes: Sequence[psutil.Process], *stop_signals: signal.Signals, patience_s: float) -> None:
    """End processes that are not children: each signal in turn with `patience_s` seconds after it, then SIGKILL."""
    alive = list(processes)
    for stop_signal in (*stop_signals, signal.SIGKILL):
        for process in alive:
            try:
                process.send_signal(stop_signal)
            except psutil.NoSuchProcess:
                continue
        deadline = time.monotonic() + (KILL_PATIENCE_S if stop_signal is signal.SIGKILL else patience_s)
        while alive := [process for process in alive if runs(process)]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        if not alive:
            return


def runs(process: psutil.Process) -> bool:
    """Tell whether a process still does anything: one that ended and waits for a parent to notice does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
