"""Where the servers' files may live, and as whom PostgreSQL runs.

PostgreSQL refuses to run as root, so for root it runs as an unprivileged user who must be able to reach its files. A
folder which that user cannot reach (a root home is closed to others) is left as it is: the data and, where needed, a
copy of the binaries go to a folder under /var/tmp, and a note in the stack's folder says so. No permission of a folder
that was not made here is ever changed. Socket paths have a length limit; a longer folder gets a short one for them.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from service.errors import ConfigurationError
from service.processes import Account

UNPRIVILEGED_USERS = ("nobody", "daemon")  # one of them is on every Linux and macOS
SOCKET_PATH_BYTES_MAX = 103  # sun_path holds 104 bytes on macOS and 108 on Linux, one of them the final zero
LONGEST_SOCKET_NAME = ".s.PGSQL.5432"
PLAIN_PATH = re.compile(r"[A-Za-z0-9/._-]+")  # libpq reads a comma in `host` as a list


@dataclass(frozen=True, slots=True)
class Place:
    """Where one stack's files are."""

    folder: Path  # the stack's own: lock, logs, stack.json
    data: Path  # holds PostgreSQL's data; `folder`, unless that is out of reach for `account`
    sockets: Path  # both servers' sockets; short enough for the kernel
    account: Account | None  # as whom PostgreSQL runs; None: as the current user


def find_place(folder: Path) -> Place:
    """Choose and make the folders for the stack in `folder`; raises ConfigurationError naming what is in the way."""
    folder = folder.resolve()
    elsewhere = Path("/var/tmp") / f"plimsoll-{short_name(folder)}"  # noqa: S108 - made private, its owner checked
    if os.geteuid() != 0:
        return Place(folder, folder, _socket_folder(folder, folder, None), None)
    account = _account_for_root([elsewhere / "postgres", folder / "postgres"])
    data = folder
    if elsewhere.exists() or not reachable(account, folder):
        data = elsewhere
        _make_own(elsewhere, 0o711, None)
        (folder / "elsewhere").write_text(
            f"{elsewhere}\nholds this stack's database: user {account.name} cannot reach the folder you are in.\n"
        )
    return Place(folder, data, _socket_folder(folder, data, account), account)


def short_name(folder: Path) -> str:
    """Return ten hexadecimal digits that stand for the folder's path."""
    return hashlib.sha256(os.fsencode(folder)).hexdigest()[:10]


def reachable(account: Account, *paths: Path) -> bool:
    """Tell whether the user may enter each folder and run each file; asked of the kernel, as that user."""
    script = 'for path in "$@"; do [ -x "$path" ] || exit 1; done'
    try:
        probe = subprocess.run(  # noqa: S603 - a fixed script
            ["/bin/sh", "-c", script, "sh", *map(str, paths)],
            user=account.uid, group=account.gid, extra_groups=[], cwd="/", check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigurationError(
            f"running as root, and this machine does not let root become {account.name!r} ({error}), whom PostgreSQL"
            " needs: run as an ordinary user, or set DATABASE_URL"
        ) from None
    return probe.returncode == 0


def _account_for_root(data_folders: list[Path]) -> Account:
    """Return the user who owns the data already, or else an unprivileged one of this machine."""
    for data in data_folders:
        if data.exists() and (owner := data.stat().st_uid) != 0:
            entry = pwd.getpwuid(owner)
            return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
    for name in UNPRIVILEGED_USERS:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
    raise ConfigurationError(
        f"running as root, and none of the users {', '.join(UNPRIVILEGED_USERS)} exists, whom PostgreSQL needs:"
        " run as an ordinary user, or set DATABASE_URL"
    )


def _socket_folder(folder: Path, data: Path, account: Account | None) -> Path:
    """Return a private folder for sockets whose path the kernel and libpq accept."""
    name = f"plimsoll-{os.geteuid()}-{short_name(folder)}"
    temporary = dict.fromkeys([tempfile.gettempdir(), "/tmp", "/var/tmp"])  # noqa: S108 - made private, owner checked
    for candidate in [data / "run", *(Path(parent).resolve() / name for parent in temporary)]:
        length = len(os.fsencode(candidate / LONGEST_SOCKET_NAME))
        if length > SOCKET_PATH_BYTES_MAX or not PLAIN_PATH.fullmatch(str(candidate)):
            continue
        if account is not None and not reachable(account, candidate.parent):
            continue
        _make_own(candidate, 0o700, account)
        return candidate
    raise ConfigurationError(f"{folder}: no folder with a path short enough for sockets; set TMPDIR to a short path")


def _make_own(folder: Path, mode: int, account: Account | None) -> None:
    """Make a folder for `account`, or take one made earlier; a stranger's folder of that name is refused."""
    owner = account.uid if account else os.geteuid()
    try:
        folder.mkdir(mode=mode)
    except FileExistsError:
        found = folder.lstat()
        if folder.is_symlink() or not folder.is_dir() or found.st_uid not in (owner, os.geteuid()):
            raise ConfigurationError(f"{folder} exists and belongs to someone else: remove it") from None
    if account is not None:
        os.chown(folder, account.uid, account.gid)
    folder.chmod(mode)
