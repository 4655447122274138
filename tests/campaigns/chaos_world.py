"""What the chaos campaign runs on: servers, proxies and service processes, and the ways to strike them.

All of it is private: a PostgreSQL and a Redis in a temporary folder, the service as it runs in production (`serve
--processes 2`, `worker --processes 2`, each under its supervisor), and between service and servers a fault proxy each.
Whatever dies is started again at once: the service's children by their own supervisors, supervisors and servers here,
as the machine's init would. Only processes started here are ever signalled, by the ids that starting them gave, and
their children by the ids that the kernel or PostgreSQL names.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import parse_qs, urlsplit

import asyncpg
import psutil
import redis.asyncio

from service import processes
from service.embedded import Stack
from service.embedded.postgres import ROLE
from service.settings import child_environment, settings_for
from tests.campaigns import chaos_effects
from tests.campaigns.faultproxy import Fault, FaultProxy, Upstream

LOOK_EVERY_S = 0.05
GONE = (OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""How the driver says that its connection is gone; the last one between the server's farewell and its end."""

HTTP_PROCESSES, WORKER_PROCESSES = 2, 2
FORGET_S = 30.0  # when a server gives up a peer that it cannot reach: later than `service.db` asks of PostgreSQL, 25 s


class Proxies:
    """Fault proxies in a thread and an event loop of their own, so that nothing else here holds bytes up."""

    def __init__(self, upstreams: Mapping[str, Upstream]) -> None:
        self._upstreams = upstreams
        self._proxies: dict[str, FaultProxy] = {}
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._hold()), name="proxies", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join()

    def port(self, name: str) -> int:
        """Return the port that stands before a server."""
        return self._proxies[name].port

    def switch(self, name: str, fault: Fault) -> None:
        """Switch a fault on, or off with Fault.NONE, for open and new connections; returns when it is in force."""
        done = threading.Event()

        def act() -> None:
            self._proxies[name].switch(fault)
            done.set()

        self._loop.call_soon_threadsafe(act)
        done.wait()

    async def _hold(self) -> None:
        self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for name, upstream in self._upstreams.items():
                self._proxies[name] = FaultProxy(upstream, forget_s=FORGET_S)
            for proxy in self._proxies.values():
                await proxy.__aenter__()
            self._ready.set()
            await self._ending.wait()
            for proxy in self._proxies.values():
                group.create_task(proxy.__aexit__())


class Eye:
    """A look into the database past the proxy; it outlives restarts of the server."""

    def __init__(self, sockets: Path) -> None:
        self._sockets = sockets
        self._connection: asyncpg.Connection | None = None
        self._mine = asyncio.Lock()  # one statement at a time

    async def rows(self, statement: str, *values: Any) -> list[dict[str, Any]]:
        """Read; waits for a server that is just starting."""
        while True:
            try:
                async with self._mine:
                    if self._connection is None or self._connection.is_closed():
                        self._connection = await asyncpg.connect(
                            host=str(self._sockets), user=ROLE, database=ROLE, timeout=5, command_timeout=30,
                            server_settings={"application_name": "auditor"},
                        )  # fmt: skip
                    return [dict(row) for row in await self._connection.fetch(statement, *values)]
            except (*GONE, asyncpg.OperatorInterventionError):
                self._connection = None
                await asyncio.sleep(LOOK_EVERY_S)

    async def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            await self._connection.close()


class World:
    """The servers, the proxies and the service; `with World(folder) as world`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stack = Stack(folder / "stack")
        self.effects = folder / "effects"
        self.log = folder / "service.log"
        self.restarts = 0  # of servers and supervisors
        self._supervisors: dict[str, tuple[list[str], subprocess.Popen[bytes]]] = {}
        self._ending = False

    def __enter__(self) -> Self:
        self.stack.__enter__()
        try:
            self._sockets = Path(parse_qs(urlsplit(self.stack.database_url).query)["host"][0])
            self.eye = Eye(self._sockets)
            self.redis = redis.asyncio.from_url(self.stack.redis_url, socket_timeout=5)
            self.proxies = Proxies(
                {"PostgreSQL": str(self._sockets / ".s.PGSQL.5432"), "Redis": str(self._sockets / "redis.sock")}
            )
            self.proxies.__enter__()
        except BaseException:
            self.stack.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._ending = True
        try:
            for _command, process in self._supervisors.values():
                processes.stop(process, signal.SIGTERM, patience_s=15)
        finally:
            self.proxies.__exit__()
            self.stack.__exit__(None, None, None)

    def start_service(self) -> str:
        """Start HTTP and worker processes behind the proxies; returns the URL."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        database_url = f"postgresql://{ROLE}@127.0.0.1:{self.proxies.port('PostgreSQL')}/{ROLE}?sslmode=disable"
        settings = settings_for(database_url, f"redis://127.0.0.1:{self.proxies.port('Redis')}/0")
        installed = chaos_effects.install(self.folder / "installed")
        self._environment = child_environment(
            settings,
            PYTHONPATH=os.pathsep.join([str(Path.cwd()), str(installed)]),
            PLIMSOLL_ARCHIVE_DIR=str(self.folder / "archives"),
            **{chaos_effects.FILE_VARIABLE: str(self.effects)},
        )
        python = [sys.executable, "-m", "service"]
        self._start("serve", [*python, "serve", "--port", str(port), "--processes", str(HTTP_PROCESSES)])
        self._start("worker", [*python, "worker", "--processes", str(WORKER_PROCESSES)])
        return f"http://127.0.0.1:{port}"

    def _start(self, name: str, command: list[str]) -> None:
        """Start a supervisor, tied to this process."""
        output: IO[bytes]
        with self.log.open("ab") as output:
            self._supervisors[name] = (
                command,
                processes.spawn(command, death_signal=signal.SIGTERM, environment=self._environment, output=output),
            )

    async def keep_alive(self) -> None:
        """Start again what died, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            for name, (command, process) in list(self._supervisors.items()):
                if process.poll() is not None and not self._ending:
                    self.restarts += 1
                    self._start(name, command)
            for server in (self.stack.postgres, self.stack.redis):
                if server is not None and server.process is not None and server.process.poll() is not None:
                    self.restarts += 1
                    server.start()  # in the main thread: the kernel ties a child to the thread that starts it
                    await asyncio.to_thread(server.wait_until_ready)

    # ---- strikes: each returns when the blow has fallen ----

    async def kill_child(self, name: str, dice: random.Random) -> None:
        """SIGKILL one process under a supervisor."""
        while True:
            _, supervisor = self._supervisors[name]
            try:
                found = [each for each in psutil.Process(supervisor.pid).children() if "service" in each.cmdline()]
                if found:
                    dice.choice(sorted(found, key=lambda each: each.pid)).send_signal(signal.SIGKILL)
                    return
            except psutil.NoSuchProcess:
                pass
            await asyncio.sleep(LOOK_EVERY_S)

    async def kill_supervisor(self, name: str) -> None:
        """SIGKILL a supervisor; the kernel ends its children with it."""
        _, supervisor = self._supervisors[name]
        supervisor.kill()
        await asyncio.to_thread(supervisor.wait)

    async def kill_backend(self, dice: random.Random) -> None:
        """SIGKILL the PostgreSQL process of one of the service's connections; PostgreSQL then restarts all of them."""
        while True:
            found = await self.eye.rows("SELECT pid FROM pg_stat_activity WHERE application_name = 'plimsoll'")
            if found:
                os.kill(dice.choice(sorted(row["pid"] for row in found)), signal.SIGKILL)
                return
            await asyncio.sleep(LOOK_EVERY_S)

    async def kill_server(self, name: str) -> None:
        """SIGKILL PostgreSQL's first process, or Redis."""
        server = self.stack.postgres if name == "PostgreSQL" else self.stack.redis
        assert server is not None
        process = server.process
        assert process is not None
        process.kill()
        await asyncio.to_thread(process.wait)

    async def until_servers_answer(self) -> None:
        """Return when both servers answer, asked past the proxies."""
        await self.eye.rows("SELECT 1")
        while True:
            try:
                await self.redis.ping()
                return
            except (redis.RedisError, OSError):
                await asyncio.sleep(LOOK_EVERY_S)

    async def drain_service(self) -> dict[str, int]:
        """Ask the service to stop and return the supervisors' exit codes."""
        self._ending = True
        for _, process in self._supervisors.values():
            process.send_signal(signal.SIGTERM)
        return {name: await asyncio.to_thread(process.wait, 30) for name, (_, process) in self._supervisors.items()}

    def errors_logged(self) -> list[str]:
        """Return the service's log lines that tell of a bug: level error, or no log line at all."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if '"level": "error"' in line or not line.startswith(("{", "url: "))]
