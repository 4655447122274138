"""An own stack is started in a folder of its own and stopped on every way out."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from harness import target as targets
from harness.errors import BadUsage, StackFailed
from harness.target import await_the_last, named_target, own_stack

UP = """
import os, signal, subprocess, sys, time
from pathlib import Path
folder = Path(os.environ["PLIMSOLL_STACK_DIR"])
folder.mkdir(parents=True, exist_ok=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
def stop(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a parent of two threads that is killed may tell its death twice
    child.kill()
    child.wait()
    (folder / "stopped").write_text("by SIGTERM")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
(folder / "stack.json").write_text('{"pids": {"owner": %d}}' % os.getpid())
print("starting", flush=True)
print("url: http://127.0.0.1:1234", flush=True)
print("x" * 200_000, flush=True)  # more than a pipe holds
print("token: an-installation-token", flush=True)
signal.pause()
"""
FAILS = """
import sys
print("url: http://127.0.0.1:1", flush=True)
print("first\\n\\nPostgreSQL did not start: no space left", file=sys.stderr)
sys.exit(3)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("url: u\\ntoken: t", flush=True)
while True:
    time.sleep(600)
"""


def script(text: str) -> tuple[str, ...]:
    return (sys.executable, "-c", text)


def test_an_own_stack_is_ready_inside_the_block_and_stopped_after_it(tmp_path: Path) -> None:
    with own_stack(tmp_path, script(UP)) as target:
        assert (target.url, target.token, target.name) == ("http://127.0.0.1:1234", "an-installation-token", "embedded")
        assert "an-installation-token" not in repr(target)
        pids = target.pids()
        assert len(pids) == 2  # itself and its child
        assert all(psutil.pid_exists(pid) for pid in pids)
    assert (tmp_path / "harness-1" / "stopped").read_text() == "by SIGTERM"
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_an_own_stack_is_stopped_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), own_stack(tmp_path, script(UP)):
        raise KeyboardInterrupt
    assert (tmp_path / "harness-1" / "stopped").exists()


def test_two_harnesses_use_two_folders_and_a_free_one_is_used_again(tmp_path: Path) -> None:
    with own_stack(tmp_path, script(UP)), own_stack(tmp_path, script(UP)):
        assert sorted(entry.name for entry in tmp_path.iterdir() if entry.is_dir()) == ["harness-1", "harness-2"]
    with own_stack(tmp_path, script(UP)):
        assert sorted(entry.name for entry in tmp_path.iterdir() if entry.is_dir()) == ["harness-1", "harness-2"]


def test_a_folder_whose_stack_outlived_its_harness_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "harness-1").mkdir()
    with (tmp_path / "harness-1" / "lock").open("w") as lock:
        assert targets._locked(lock)
        with own_stack(tmp_path, script(UP)):
            assert (tmp_path / "harness-2" / "stack.json").exists()


def test_a_stack_that_fails_to_start_is_reported_with_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(StackFailed) as failed, own_stack(tmp_path, script(FAILS)):
        raise AssertionError("it must not become ready")
    assert failed.value.last_lines == ["first", "PostgreSQL did not start: no space left"]
    assert str(failed.value) == (
        f"the embedded stack ended before it was ready (exit code 3), see {tmp_path / 'harness-1.log'};"
        " its last lines were: first | PostgreSQL did not start: no space left"
    )


def test_a_stack_that_ends_by_itself_is_noticed(tmp_path: Path) -> None:
    with own_stack(tmp_path, script(UP)) as target:
        target.check()
        [process] = [psutil.Process(pid) for pid in target.pids() if psutil.Process(pid).ppid() == os.getpid()]
        process.terminate()
        psutil.wait_procs([process], timeout=10)
        with pytest.raises(StackFailed, match=r"^the embedded stack ended by itself \(exit code .*\), see "):
            target.check()


def test_a_stack_that_is_not_ready_in_time_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "START_TIMEOUT_S", 0.05)
    silent = script("import time; time.sleep(600)")
    with pytest.raises(StackFailed, match=r"^the embedded stack was not ready after 0\.05 s, see "):
        own_stack(tmp_path, silent).__enter__()


def test_a_stack_that_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "STOP_TIMEOUT_S", 0.1)
    with own_stack(tmp_path, script(STUBBORN)) as target:
        pids = target.pids()
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_killed_harness_takes_its_stack_with_it_where_the_kernel_tells(tmp_path: Path) -> None:
    harness = f"""
import signal
from pathlib import Path
from harness.target import own_stack
with own_stack(Path({str(tmp_path)!r}), ({sys.executable!r}, "-c", {UP!r})) as target:
    print(*target.pids(), flush=True)
    signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", harness], stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        assert process.stdout is not None
        processes = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        os.kill(process.pid, signal.SIGKILL)
    _, left = psutil.wait_procs(processes, timeout=10)
    # A zombie has ended; it waits for whoever adopted it to notice.
    alive = [each for each in left if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    for process_left in alive:
        process_left.kill()
    assert (alive == []) is (sys.platform == "linux")


def test_a_folder_that_cannot_be_written_is_refused_with_the_mend(tmp_path: Path) -> None:
    (tmp_path / "stack").write_text("in the way")
    with pytest.raises(BadUsage) as refused, own_stack(tmp_path / "stack" / "deeper", script(UP)):
        raise AssertionError("there is no folder for it")
    assert str(refused.value) == (
        f"cannot keep a stack in {tmp_path / 'stack' / 'deeper'} (Not a directory): set PLIMSOLL_DATA to a folder that"
        " can be written, or name a running service with --url"
    )


def test_a_named_service_is_used_as_it_is() -> None:
    target = named_target("http://host:8000/", "token")
    assert (target.url, target.token, target.embedded) == ("http://host:8000", "token", False)
    assert (target.name, target.pids()) == ("http://host:8000", set())
    target.check()  # whether it is there is for the samples to tell


@pytest.mark.parametrize(
    ("token", "error"),
    [
        (None, "--url needs --token (or PLIMSOLL_TOKEN): give an installation token of that service"),
        ("", "--url needs --token (or PLIMSOLL_TOKEN): give an installation token of that service"),
        ("two words", "--token holds a space or a character that no token has: give it as it was shown"),
        ("x\r\nHost: evil", "--token holds a space or a character that no token has: give it as it was shown"),
    ],
)
def test_a_token_that_cannot_be_used_is_refused_with_the_mend(token: str | None, error: str) -> None:
    with pytest.raises(BadUsage) as refused:
        named_target("http://host", token)
    assert str(refused.value) == error


def test_the_stack_of_a_killed_harness_is_waited_for_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await_the_last(tmp_path)  # there is none
    folder = tmp_path / "harness-1"
    folder.mkdir()
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        threading.Timer(0.2, lambda: fcntl.flock(lock, fcntl.LOCK_UN)).start()
        await_the_last(tmp_path)
        with (folder / "lock").open("a") as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it is free
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(targets, "STOP_TIMEOUT_S", 0.0)
        await_the_last(tmp_path)
