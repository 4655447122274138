"""The roles of production: `serve` answers HTTP, `worker` advances runs; each as one process or as several.

Several HTTP processes share one listening socket, which the supervisor opens and they inherit: there is one place where
a port can be in use, and a process that dies takes no waiting connection with it. Several processes also share a folder
of metrics, so that any of them can answer for all. Read `supervisor.py` for what keeps them alive.
"""

from __future__ import annotations

import errno
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from prometheus_client.multiprocess import mark_process_dead
from starlette.applications import Starlette

from service.conduct import heeds_hangup
from service.errors import BadUsage, ConfigurationError
from service.settings import Settings, child_environment
from service.supervisor import Child, Signals, Supervisor
from service.telemetry import configure_logging

BACKLOG = 2048  # connections that may wait to be accepted; the kernel's somaxconn may lower it


def listen(host: str, port: int) -> socket.socket:
    """Open the listening socket (port 0: a free one); raises ConfigurationError naming the flag to change."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except socket.gaierror as error:
        raise BadUsage(f"--host {host}: {error.strerror}") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigurationError(
                f"port {port} on {host} is already in use: stop what listens there, or choose another with --port"
                " (0: a free one)"
            ) from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise BadUsage(f"--host {host}: this machine does not have that address") from None
        reason = (error.strerror or str(error)).lower()
        raise ConfigurationError(f"cannot listen on {host}, --port {port}: {reason}") from None


def inherited(fd: int) -> socket.socket:
    """Return the listening socket that the process which started this one left open; raises BadUsage."""
    try:
        listener = socket.socket(fileno=fd)
        if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise BadUsage(f"--fd {fd}: that socket does not listen")
    except OSError as error:
        raise BadUsage(f"--fd {fd}: no listening socket was inherited under that number ({error.strerror})") from None
    return listener


def address_of(listener: socket.socket) -> str:
    """Return the URL under which a client of this machine reaches the socket."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - a comparison, nothing is bound here
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve_here(settings: Settings, listener: socket.socket) -> int:
    """Answer HTTP in this process until SIGTERM or SIGINT, then end what was begun; 1 when the app cannot start."""
    from service.app import create_app

    return run_server(create_app(settings), listener)


def run_server(app: Starlette, listener: socket.socket) -> int:
    """Serve an application until SIGTERM or SIGINT; 1 when it cannot start."""
    from service.server import Server, configuration

    server = Server(configuration(app))
    for number in (signal.SIGTERM, signal.SIGINT):  # it takes them itself while it runs; not a moment may lose one
        signal.signal(number, server.handle_exit)
    if heeds_hangup():
        signal.signal(signal.SIGHUP, server.handle_exit)
    try:
        server.run(sockets=[listener])
    except SystemExit:  # the app's start failed; the server has said why
        return 1
    return 0


def serve(settings: Settings, listener: socket.socket, processes: int) -> int:
    """Answer HTTP until SIGTERM or SIGINT, in this process or in several under a supervisor."""
    if processes == 1:
        return serve_here(settings, listener)
    configure_logging(settings.log_level)
    with Signals(replacing=True) as signals, shared_metrics() as folder:
        environment = child_environment(settings, PROMETHEUS_MULTIPROC_DIR=str(folder))
        supervisor = Supervisor(
            http_children(environment, listener, processes),
            signals,
            on_death=lambda pid: mark_process_dead(pid, str(folder)),  # type: ignore[no-untyped-call]
            before_drain=listener.close,
        )
        with supervisor:
            supervisor.run()
    return 0


def work(settings: Settings, processes: int) -> int:
    """Advance runs until SIGTERM or SIGINT, in this process or in several under a supervisor."""
    if processes == 1:
        from service.worker import run

        return run(settings)
    configure_logging(settings.log_level)
    children = worker_children(child_environment(settings), processes)
    with Signals(replacing=True) as signals, Supervisor(children, signals) as workers:
        workers.run()
    return 0


def http_children(environment: Mapping[str, str], listener: socket.socket, count: int) -> list[Child]:
    """Return HTTP processes that inherit the listening socket."""
    number = listener.fileno()
    return [
        Child(
            name=f"http-{index}",
            command=[sys.executable, "-m", "service", "serve", "--fd", str(number)],
            environment=environment,
            pass_fds=[number],
        )
        for index in range(1, count + 1)
    ]


def worker_children(environment: Mapping[str, str], count: int) -> list[Child]:
    """Return worker processes."""
    command = [sys.executable, "-m", "service", "worker"]
    return [Child(name=f"worker-{index}", command=command, environment=environment) for index in range(1, count + 1)]


@contextmanager
def shared_metrics(folder: Path | None = None) -> Iterator[Path]:
    """Make an empty folder for the metrics of several processes (default: a temporary one); remove it at the end."""
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="plimsoll-metrics-"))
    else:
        shutil.rmtree(folder, ignore_errors=True)  # of a start that was killed
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
