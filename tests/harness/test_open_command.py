"""`harness run --arrivals` as a shell sees it: what it leaves and how it ends, also when things go wrong."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from harness.__main__ import main
from harness.recorder import Collected, Recorder
from harness.sampleset import newest_sample_set, read_sample_set
from tests.harness.fake_service import ModelService, RunningModel, http

pytestmark = pytest.mark.usefixtures("data")

OPEN = ("run", "--arrivals", "constant", "--poll-interval", "0.01")


def words(running: RunningModel[ModelService], rate: str = "50", duration: str = "0.5") -> tuple[str, ...]:
    return (*OPEN, "--rate", rate, "--duration", duration, "--url", running.url, "--token", "hush-installation")


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_a_sound_run_exits_0_and_no_file_of_it_holds_a_token(
    running: RunningModel[ModelService], data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.analysis.lateness.LATE_SHARE", {True: 1.0, False: 1.0})  # however busy the machine is
    monkeypatch.setattr("harness.analysis.lateness.OFTEN_LATE_SHARE", 1.0)
    monkeypatch.setattr("harness.analysis.lateness.STALL_MS", 60_000.0)
    monkeypatch.setattr("harness.analysis.lateness.STARVED_PERCENT", 1_000.0)
    assert main((*words(running), "--mode", "smoke", "--workers", "2")) == 0
    path = newest_sample_set(data / "samples")
    assert capsys.readouterr().out.splitlines()[0] == f"samples: {path}"
    assert read_sample_set(path).manifest.mode == "open"
    for file in path.iterdir():
        content = file.read_bytes()
        assert b"hush" not in content
        assert b"token-of" not in content


def test_a_generator_that_could_not_keep_up_exits_2_and_says_why(
    running: RunningModel[ModelService], data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.analysis.lateness.STALL_MS", -1.0)  # every wake-up was too late
    assert main(words(running)) == 2
    path = newest_sample_set(data / "samples")
    told = last_line(capsys)
    assert told.startswith(f"python -m harness run: {path} is kept, but the measurement is not valid: ")
    assert "the generator's own loop woke more than" in told
    assert read_sample_set(path).manifest.complete


def test_a_wrong_token_and_a_service_that_is_not_there_make_no_load(
    running: RunningModel[ModelService], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running.model.overrides["POST /api/workspaces/"] = http(401, {"error": "unknown token"})
    assert main(words(running)) == 64
    assert main((*words(running), "--url", "http://127.0.0.1:1")) == 2
    prefix = "python -m harness run: cannot make a workspace: "
    assert capsys.readouterr().err.splitlines() == [
        f"{prefix}the service answered 401 (unknown token; --token must be an installation token)",
        f"{prefix}cannot connect to 127.0.0.1:1: Connection refused",
    ]
    assert list((data / "samples").iterdir()) == []


def test_a_target_that_dies_midway_is_in_the_rows_and_no_arrival_is_missing(
    running: RunningModel[ModelService], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    polled = threading.Event()
    running.model.on_poll = lambda run_id: polled.set() if len(running.model.polls) == 10 else None

    def die() -> None:
        polled.wait()
        running.stop()

    death = threading.Thread(target=die)
    death.start()
    assert main(words(running, rate="20", duration="2")) in {0, 2}  # 2 on a machine that is too busy to be on time
    death.join()
    found = read_sample_set(newest_sample_set(data / "samples"))
    creates = [row for row in found.samples.to_pylist() if row["endpoint"] == "create"]
    assert len(creates) == 40
    assert {"ok", "refused"} <= {row["outcome"] for row in creates}
    assert found.manifest.complete
    running.start = running.stop = lambda: None  # type: ignore[method-assign]


def test_a_full_disk_ends_the_load_with_one_line_and_keeps_what_was_written(
    running: RunningModel[ModelService], data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Recorder.write
    written: list[int] = []

    def write(self: Recorder, collected: Collected) -> None:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(1)
        real(self, collected)

    monkeypatch.setattr(Recorder, "write", write)
    assert main(words(running, duration="60")) == 2
    path = newest_sample_set(data / "samples")
    assert last_line(capsys) == (
        f"python -m harness run: cannot go on writing {path} (No space left on device); what was written is kept"
    )
    found = read_sample_set(path)
    assert not found.manifest.complete
    assert len(found.samples) > 0


def test_a_file_of_slos_with_a_typo_makes_no_load(
    running: RunningModel[ModelService],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "slo.yaml").write_text("kind: SLOO\n")
    monkeypatch.chdir(tmp_path)
    assert main((*words(running), "--gate")) == 64
    assert capsys.readouterr().err.startswith("python -m harness run: data/slo.yaml, document 1: ")
    assert running.model.asked == []


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_a_harness_that_is_ended_takes_its_senders_along_and_leaves_a_readable_set(
    running: RunningModel[ModelService], data: Path, how: signal.Signals, code: int
) -> None:
    polled = threading.Event()
    running.model.on_poll = lambda run_id: polled.set() if len(running.model.polls) == 40 else None
    command = [sys.executable, "-m", "harness", *words(running, rate="20", duration="600"), "--workers", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603 - our own command
        assert process.stderr is not None
        polled.wait()
        senders = psutil.Process(process.pid).children()
        process.send_signal(how)
        told = process.stderr.read().splitlines()
    gone, left = psutil.wait_procs(senders, timeout=20)
    assert (len(gone), left) == (2, [])
    path = newest_sample_set(data / "samples")
    found = read_sample_set(path)
    assert process.returncode == code
    assert not found.manifest.complete
    assert found.samples["endpoint"].to_pylist().count("create") >= 10  # of 40 that were seen, all but a busy second's
    if how is not signal.SIGKILL:
        assert told[-1] == (f"python -m harness run: interrupted; what was recorded is in {path}, and is not complete")
