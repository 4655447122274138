"""A Dask cluster of real processes on this machine, for tests of what sends from one."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


class DaskCluster:
    """A scheduler and the workers that a test asks for."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self.workers: dict[str, subprocess.Popen[str]] = {}  # by their addresses
        words = ("dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--no-show")
        self.address, _ = self._started(words, r"Scheduler at:\s+(tcp://\S+)", ROOT)

    def add_worker(self, home: Path = ROOT) -> str:
        """Start a worker that imports from `home` and return its address."""
        words = ("dask_worker", self.address, "--no-nanny", "--nthreads", "1", "--no-dashboard", "--host", "127.0.0.1")
        address, process = self._started(words, r"Start worker at:\s+(tcp://\S+)", home, until="Registered to")
        self.workers[address] = process
        return address

    def _started(
        self, words: tuple[str, ...], pattern: str, home: Path, until: str = ""
    ) -> tuple[str, subprocess.Popen[str]]:
        process = self._stack.enter_context(
            subprocess.Popen(  # noqa: S603 - our own words
                [sys.executable, "-m", f"distributed.cli.{words[0]}", *words[1:]],
                cwd=home,
                stderr=subprocess.PIPE,
                text=True,
                env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            )
        )
        self._stack.callback(_end, process)
        assert process.stderr is not None
        found = ""
        for line in process.stderr:
            match = re.search(pattern, line)
            found = match[1] if match else found
            if found and until in line:
                # Read on, or a full pipe would stop it.
                threading.Thread(target=process.stderr.read, daemon=True).start()
                return found, process
        raise AssertionError(f"{words[0]} ended with {process.wait()}")


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def dask_cluster(workers: int) -> Iterator[DaskCluster]:
    """Run a cluster with so many workers."""
    with contextlib.ExitStack() as stack:
        cluster = DaskCluster(stack)
        for _ in range(workers):
            cluster.add_worker()
        yield cluster
