"""`harness run --arrivals … --dask` on a real cluster of processes: exact rows, clocks, and what goes wrong with it."""

import itertools
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

from harness.__main__ import main
from harness.arrivals import Arrivals, Schedule
from harness.cluster import identity, spread
from harness.openloop import OpenLoop
from harness.sample import Endpoint
from harness.sampleset import HashMismatch, SampleSet, newest_sample_set, read_sample_set
from harness.sender import Job, Tenant
from tests.harness.dask_cluster import ROOT, DaskCluster, dask_cluster
from tests.harness.fake_service import ModelService, RunningModel

SOON = Schedule(Arrivals.POISSON, rate_per_s=60.0, duration_s=1.5, seed=7)


@pytest.fixture(scope="module")
def cluster() -> Iterator[DaskCluster]:
    with dask_cluster(workers=2) as made:
        yield made


@pytest.fixture
def running(running: RunningModel[ModelService]) -> RunningModel[ModelService]:
    running.model.polls_to_end = 2
    return running


@pytest.fixture(autouse=True)
def data(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Patience with a machine that is busy."""
    monkeypatch.setattr("harness.analysis.lateness.LATE_SHARE", {True: 1.0, False: 1.0})
    monkeypatch.setattr("harness.analysis.lateness.OFTEN_LATE_SHARE", 1.0)
    monkeypatch.setattr("harness.analysis.lateness.STALL_MS", 60_000.0)
    monkeypatch.setattr("harness.analysis.lateness.STARVED_PERCENT", 1_000.0)
    return data


def words(running: RunningModel[ModelService], dask: str, schedule: Schedule = SOON) -> tuple[str, ...]:
    return (
        "run", "--arrivals", str(schedule.kind), "--rate", f"{schedule.rate_per_s:g}", "--duration",
        f"{schedule.duration_s:g}", "--seed", f"{schedule.seed}", "--poll-interval", "0.01", "--url", running.url,
        "--token", "hush-installation", "--dask", dask,
    )  # fmt: skip


def made_in(data: Path) -> SampleSet:
    return read_sample_set(newest_sample_set(data / "samples"))


def creates(found: SampleSet) -> list[dict[str, object]]:
    rows = [row for row in found.samples.to_pylist() if row["endpoint"] == Endpoint.CREATE]
    return sorted(rows, key=lambda row: int(str(row["run_key"])))


def require_exact(found: SampleSet) -> None:
    """Every arrival of the schedule once, at its instant, by the sender whose turn it was."""
    due = SOON.offsets_ns()
    rows = creates(found)
    assert [row["run_key"] for row in rows] == [str(number) for number in range(1, len(due) + 1)]
    intended = np.array([row["intended_at_ns"] for row in rows], dtype=np.int64)
    assert (intended - intended[0]).tolist() == (due - due[0]).tolist()
    assert [row["worker"] for row in rows] == [number % 2 for number in range(len(due))]
    assert found.manifest.complete
    assert len(found.samples) == found.manifest.planned_requests == 4 * len(due)  # create, spawn, two polls
    assert {row["final_status"] for row in found.runs.to_pylist()} == {"COMPLETED"}
    assert len(set(found.runs["run_key"].to_pylist())) == len(found.runs) == 2 * len(due)


def test_two_workers_of_a_cluster_make_the_very_rows_that_one_machine_would(
    cluster: DaskCluster, running: RunningModel[ModelService], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(running, cluster.address)) == 0, capsys.readouterr().err
    found = made_in(data)
    require_exact(found)
    start, end = found.manifest.clock.start.monotonic_ns, found.manifest.clock.end.monotonic_ns
    stamps = found.samples["sent_at_ns"].to_numpy()
    assert start < stamps.min() <= stamps.max() < end
    assert found.manifest.parameters["dask"] == cluster.address
    assert found.manifest.parameters["workers"] == 2
    for file in found.path.iterdir():
        assert b"hush" not in file.read_bytes()
        assert b"token-of" not in file.read_bytes()


def test_the_manifest_holds_each_clock_s_offset_with_its_uncertainty(
    cluster: DaskCluster, running: RunningModel[ModelService], data: Path
) -> None:
    assert main(words(running, cluster.address)) == 0
    told = made_in(data).manifest.senders
    assert [each.worker for each in told] == [0, 1]
    for each in told:  # all processes of one machine have one clock, so what is true is known: 0
        assert abs(each.offset_us) <= each.uncertainty_us
        assert each.end_offset_us is not None
        assert each.end_uncertainty_us is not None
        assert abs(each.end_offset_us) <= each.end_uncertainty_us
        assert each.round_trips == 32
        assert each.machine["cpu_count"] == psutil.cpu_count()


def test_rows_may_stay_on_shared_storage_and_are_read_from_there(
    cluster: DaskCluster, running: RunningModel[ModelService], data: Path, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    assert main((*words(running, cluster.address), "--dask-storage", shared.as_uri())) == 0
    found = made_in(data)
    require_exact(found)
    left = shared / found.path.name
    assert found.manifest.stored == left.as_uri()
    assert sorted(file.name for file in left.iterdir()) == [
        "samples-w000-00001.parquet",
        "samples-w001-00001.parquet",
    ]
    assert list(found.path.glob("samples-w*")) == []
    (left / "samples-w001-00001.parquet").write_bytes((left / "samples-w000-00001.parquet").read_bytes())
    with pytest.raises(HashMismatch, match=r"samples-w001-00001\.parquet was altered"):
        read_sample_set(found.path)


def test_a_worker_that_dies_ends_the_measurement_and_keeps_what_came_before(
    running: RunningModel[ModelService], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    polled = threading.Event()
    running.model.polls_to_end = 1
    running.model.on_poll = lambda run_id: polled.set() if len(running.model.polls) == 60 else None
    with dask_cluster(workers=2) as cluster:
        victim = spread(list(cluster.workers))[1]
        senders: list[psutil.Process] = []

        def kill() -> None:
            polled.wait()
            senders.extend(psutil.Process(cluster.workers[victim].pid).children())
            cluster.workers[victim].kill()

        killing = threading.Thread(target=kill)
        killing.start()
        endless = Schedule(Arrivals.CONSTANT, rate_per_s=30.0, duration_s=600.0)
        assert main(words(running, cluster.address, endless)) == 2
        killing.join()
        gone, left = psutil.wait_procs(senders, timeout=20)
        assert (len(gone), left) == (1, [])
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"python -m harness run: sending process 1 on {victim} was lost before its part of the")
    assert told.endswith("; what was recorded is kept")
    found = made_in(data)
    assert not found.manifest.complete
    rows = creates(found)
    assert {row["worker"] for row in rows} == {0, 1}
    assert [pair for pair in itertools.pairwise(rows) if pair[0]["run_key"] == pair[1]["run_key"]] == []
    assert len(rows) >= 20  # of 60 that were seen, all but a busy second's


def test_ctrl_c_ends_the_far_senders_and_cancels_their_runs(
    cluster: DaskCluster, running: RunningModel[ModelService], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running.model.polls_to_end = 1_000_000
    polled = threading.Event()
    running.model.on_poll = lambda run_id: polled.set() if len(running.model.polls) == 5 else None

    def interrupt() -> None:
        polled.wait()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    endless = Schedule(Arrivals.CONSTANT, rate_per_s=20.0, duration_s=600.0)
    assert main((*words(running, cluster.address, endless), "--poll-timeout", "600")) == 130
    found = made_in(data)
    runs = found.runs.to_pylist()
    parents = [row["run_id"] for row in runs if row["parent_run_key"] is None and row["run_id"] is not None]
    assert not found.manifest.complete
    assert len(parents) >= 5
    assert set(parents) <= set(running.model.canceled)
    assert [child for worker in cluster.workers.values() for child in psutil.Process(worker.pid).children()] == []


def refused(running: RunningModel[ModelService], capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    """The exit code and the only line."""
    code = main((*words(running, "tcp://127.0.0.1:1"), *more))
    (line,) = capsys.readouterr().err.splitlines()
    return code, line.removeprefix("python -m harness run: ")


def test_what_cannot_be_used_is_refused_in_one_line_before_any_load(
    cluster: DaskCluster,
    running: RunningModel[ModelService],
    data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("harness.cluster.CONNECT_S", 0.5)
    assert refused(running, capsys, "--dask", "127.0.0.1") == (
        64, "--dask 127.0.0.1 is no address of a scheduler: give tcp://host:port",
    )  # fmt: skip
    assert refused(running, capsys, "--dask", cluster.address, "--workers", "3") == (
        64, f"--workers 3 is more than the 2 of the cluster at {cluster.address}",
    )  # fmt: skip
    assert refused(running, capsys, "--dask-storage", "/shared")[0] == 64
    code, line = refused(running, capsys, "--dask-storage", "s3://me:hush@bucket/x")
    assert (code, line.partition(":")[0]) == (
        64,
        "the URL of a shared storage must not hold a credential or a question mark",
    )
    assert "hush" not in line
    code, line = refused(running, capsys)
    assert (code, line.partition(": ")[0]) == (2, "cannot reach the Dask scheduler at tcp://127.0.0.1:1")
    assert running.model.asked == []
    assert list(data.glob("samples/*")) == []


def test_a_cluster_without_workers_or_with_others_code_is_refused_in_one_line(
    running: RunningModel[ModelService], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with dask_cluster(workers=0) as cluster:
        address = cluster.address
        assert refused(running, capsys, "--dask", address) == (
            2, f"the cluster at {address} has no workers: start some with `dask worker {address}`",
        )  # fmt: skip
        (tmp_path / "lacking" / "harness").mkdir(parents=True)
        (tmp_path / "lacking" / "harness" / "__init__.py").touch()
        lacking = cluster.add_worker(tmp_path / "lacking")
        assert refused(running, capsys, "--dask", address) == (
            2, f"worker {lacking} cannot load the harness (No module named 'harness.cluster'): install it there",
        )  # fmt: skip
        cluster.workers[lacking].kill()
    with dask_cluster(workers=1) as cluster:
        shutil.copytree(ROOT / "harness", tmp_path / "other" / "harness")
        with (tmp_path / "other" / "harness" / "sample.py").open("a") as file:
            file.write("# other\n")
        other = cluster.add_worker(tmp_path / "other")
        code, line = refused(running, capsys, "--dask", cluster.address)
        assert (code, line.partition(" (")[0]) == (2, f"worker {other} has another harness")
        assert line.endswith(f"than this machine ({identity()})")


def test_a_target_that_the_workers_cannot_reach_is_named_and_nothing_is_left_behind(
    cluster: DaskCluster,
    running: RunningModel[ModelService],
    data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = OpenLoop._job

    def elsewhere(self: OpenLoop, worker: int, tenants: list[Tenant]) -> Job:
        return msgspec.structs.replace(job(self, worker, tenants), url="http://127.0.0.1:1")

    monkeypatch.setattr(OpenLoop, "_job", elsewhere)  # as a name that means another machine there
    assert main(words(running, cluster.address)) == 2
    assert "cannot open connections to http://127.0.0.1:1 from the worker tcp://" in capsys.readouterr().err
    assert list(data.glob("samples/*")) == []


def test_few_addresses_are_on_as_many_machines_as_can_be() -> None:
    found = ["tcp://b:1", "tcp://a:2", "tcp://a:1", "tcp://c:9", "tcp://a:3"]
    assert spread(found) == ["tcp://a:1", "tcp://b:1", "tcp://c:9", "tcp://a:2", "tcp://a:3"]
