"""`up`: the embedded stack, the schema, the HTTP service and the worker, supervised, until it is told to stop.

Everything it says to a program is two lines on standard output, `url: …` and `token: …`, once `/readyz` answers 200.
The token is an installation token made for this start; the one of the start before is revoked. It is also kept in the
stack's folder (`token`, readable by its owner only), for the other commands of this checkout. Read `serve.py` for the
processes, `embedded/` for the servers.
"""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import structlog
from prometheus_client.multiprocess import mark_process_dead

from service.administration import bring_schema_up_to_date, make_token, take_token_back
from service.embedded import Stack, StackLocked, running_stack
from service.embedded.stack import Server, write_private
from service.errors import BadUsage, ConfigurationError, Invalid, PlimsollError
from service.serve import address_of, http_children, listen, shared_metrics, worker_children
from service.settings import Settings, child_environment, settings_for
from service.supervisor import Signals, Supervisor
from service.telemetry import configure_logging

READY_PATIENCE_S = 60.0  # a cold machine imports, connects and answers in a few seconds
TOKEN_DAYS = 30.0  # longer than a development stack runs on end; every start makes another

log = structlog.get_logger()


def up(
    folder: Path,
    given: Mapping[Server, str | None],
    *,
    host: str,
    port: int,
    processes: int,
    workers: int,
    say: Callable[[str], object],
) -> int:
    """Run the whole service in `folder` until SIGTERM or SIGINT; `given` holds addresses of servers set elsewhere.

    `say` receives the lines for standard output. Raises PlimsollError when something is in the way; nothing is left
    running then.
    """
    if told := running_stack(folder):  # said before the port is tried, which that one probably holds
        where = f", {told.url}" if told.url else ""
        raise StackLocked(
            f"the stack in {folder} is already running (process {told.pids['owner']}{where}): stop it, or choose"
            " another folder with PLIMSOLL_STACK_DIR"
        )
    try:
        with Signals() as signals, listen(host, port) as listener, Stack(folder, given) as stack:
            _supervise(stack, listener, signals, processes, workers, say)
    except KeyboardInterrupt:  # asked to stop before anything was supervised
        return 0
    except OSError as error:  # what lies in the folder is not what we put there: a directory where a file belongs
        raise ConfigurationError(
            f"{error.filename or folder}: {error.strerror or error}; mend that, or choose another folder with"
            " PLIMSOLL_STACK_DIR"
        ) from error
    return 0


def _supervise(
    stack: Stack,
    listener: socket.socket,
    signals: Signals,
    processes: int,
    workers: int,
    say: Callable[[str], object],
) -> None:
    """Bring the schema up to date, make the token, and keep the processes alive."""
    settings = settings_for(stack.database_url, stack.redis_url)
    configure_logging(settings.log_level)
    bring_schema_up_to_date(settings)
    token = _new_token(settings, stack.folder / "token")
    url = address_of(listener)
    with shared_metrics(stack.folder / "metrics") as metrics:
        environment = child_environment(settings, PROMETHEUS_MULTIPROC_DIR=str(metrics))
        supervisor = Supervisor(
            [*http_children(environment, listener, processes), *worker_children(environment, workers)],
            signals,
            watch=lambda: _mend(stack),
            on_change=lambda pids: stack.tell(children=pids),
            on_death=lambda pid: mark_process_dead(pid, str(metrics)),  # type: ignore[no-untyped-call]
            before_drain=listener.close,
        )
        with supervisor:
            if supervisor.wait_until(lambda: answers(url, "/readyz"), READY_PATIENCE_S):
                stack.tell(url=url)
                say(f"url: {url}")
                say(f"token: {token}")
                supervisor.run()


def _mend(stack: Stack) -> None:
    """Start again a server that died; what is in the way is said, and tried again at the next turn."""
    try:
        for name in stack.mend():
            log.warning("server_started_again", server=name)
    except PlimsollError as error:
        log.error("server_does_not_start", reason=str(error))


def _new_token(settings: Settings, file: Path) -> str:
    """Make an installation token, keep it in `file`, and revoke the one that was there."""
    if file.exists():
        with suppress(BadUsage, Invalid):  # revoked by hand, or of another database
            take_token_back(settings, file.read_text(errors="replace").strip())
    token: str = make_token(settings, None, "OWNER", TOKEN_DAYS)["token"]
    write_private(file, token.encode() + b"\n")
    return token


def answers(url: str, path: str) -> bool:
    """Tell whether a GET of `path` is answered with 200 within a second."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=1.0)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
