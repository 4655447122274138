"""An open loop against a model of the service on a real socket: its processes, its rows, and what ends it."""

import asyncio
import dataclasses
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from harness.api import Api
from harness.arrivals import Arrivals, Schedule
from harness.client import Client
from harness.crew import SenderFailed
from harness.errors import ServiceUnreachable
from harness.openloop import OpenLoop, OpenPlan
from harness.recorder import Recorder
from harness.resources import Resources
from harness.sample import Endpoint
from harness.sampleset import SampleSet, read_sample_set
from harness.scenario import Habits
from harness.sender_process import SenderProcess
from tests.harness.fake_service import Answer, ModelService, always, http, serving

RUNS = Habits(children=1, poll_interval_s=0.01, poll_timeout_s=5.0)
SOON = Schedule(Arrivals.POISSON, rate_per_s=100.0, duration_s=0.3, seed=7)
ENDLESS = Schedule(Arrivals.CONSTANT, rate_per_s=20.0, duration_s=600.0)

Between = Callable[[OpenLoop, Recorder], Awaitable[None]]


async def carried_out(load: OpenLoop, recorder: Recorder) -> None:
    await load.prepare()
    await load.carry_out()


async def measured(answer: Answer, tmp_path: Path, plan: OpenPlan, do: Between = carried_out) -> SampleSet:
    recorder = Recorder(tmp_path, plan.mode, plan.scenario, plan.parameters())
    async with serving(answer) as url:
        client, watcher = Client(url), Client(url)
        wanted = plan
        if plan.habits is None:
            wanted = dataclasses.replace(plan, request=client.wire("GET", "/x"))
        resources = Resources(Api(watcher, "installation"), set)
        try:
            await do(OpenLoop(wanted, client, Api(client, "installation"), recorder, resources), recorder)
        finally:
            await client.close()
            await watcher.close()
            recorder.finish(complete=True)
    return read_sample_set(recorder.path)


def plan(schedule: Schedule, workers: int = 1, connections: int = 64, habits: Habits | None = RUNS) -> OpenPlan:
    return OpenPlan(schedule, workers, connections, habits)


def offsets_ns(found: SampleSet, endpoint: Endpoint) -> np.ndarray:
    rows = [row for row in found.samples.to_pylist() if row["endpoint"] == endpoint]
    rows.sort(key=lambda row: int(row["run_key"]))
    due = np.array([row["intended_at_ns"] for row in rows])
    return np.asarray(due - due[0])


@pytest.mark.parametrize("workers", [1, 3])
async def test_every_arrival_is_a_run_due_at_its_instant_however_many_processes_send(
    tmp_path: Path, workers: int
) -> None:
    found = await measured(ModelService(), tmp_path, plan(SOON, workers))
    due = SOON.offsets_ns()
    assert offsets_ns(found, Endpoint.CREATE).tolist() == (due - due[0]).tolist()
    assert found.manifest.complete
    assert len(found.samples) == found.manifest.planned_requests == 4 * len(due)  # create, spawn, two polls
    assert set(found.samples["worker"].to_pylist()) == set(range(workers))
    assert set(found.samples["level"].to_pylist()) == {100.0}
    runs = {row["run_key"]: row for row in found.runs.to_pylist()}
    assert len(runs) == len(found.runs) == 2 * len(due)
    assert {row["final_status"] for row in runs.values()} == {"COMPLETED"}
    latency_ms = found.samples["latency_ms"].to_numpy()
    assert (latency_ms >= found.samples["service_ms"].to_numpy()).all()


async def test_the_runs_share_few_calibration_workspaces(tmp_path: Path) -> None:
    model = ModelService()
    await measured(model, tmp_path, plan(SOON))
    made = [asked.json for asked in model.asked if asked.path == "/api/workspaces/"]
    assert [each["quota_class"] for each in made] == ["calibration"] * 16
    used = [asked.json["workspace_id"] for asked in model.asked if asked.path == "/api/runs/"]
    assert len(set(used)) == 16


async def test_a_request_that_finds_no_free_connection_waits_and_its_wait_is_in_its_latency(tmp_path: Path) -> None:
    at_once = Schedule(Arrivals.BURST, rate_per_s=8.0, duration_s=1.0, burst_size=8)
    connections: set[int] = set()

    async def slow(asked, writer) -> None:  # type: ignore[no-untyped-def]
        if asked.path == "/x":
            connections.add(asked.connection)
            await asyncio.sleep(0.02)
        writer.write(http(200, {}))

    found = await measured(slow, tmp_path, plan(at_once, connections=2, habits=None))
    rows = sorted(found.samples.to_pylist(), key=lambda row: row["sent_at_ns"])
    assert [row["outcome"] for row in rows] == ["ok"] * 8
    assert len({row["intended_at_ns"] for row in rows}) == 1
    assert len({row["connection_id"] for row in rows}) == 2
    waits_ms = [row["latency_ms"] - row["service_ms"] for row in rows]
    assert [wait_ms >= 20.0 * (place // 2) for place, wait_ms in enumerate(waits_ms)] == [True] * 8


async def test_a_target_that_falls_silent_loses_no_arrival(tmp_path: Path) -> None:
    async def silent(asked, writer) -> None:  # type: ignore[no-untyped-def]
        if asked.path != "/x":
            writer.write(http(200, b""))
            return
        await asyncio.Event().wait()

    schedule = Schedule(Arrivals.CONSTANT, rate_per_s=10.0, duration_s=0.5)

    async def impatient(load: OpenLoop, recorder: Recorder) -> None:
        load._client.timeout_s = 0.2
        await carried_out(load, recorder)

    found = await measured(silent, tmp_path, plan(schedule, connections=1, habits=None), impatient)
    rows = sorted(found.samples.to_pylist(), key=lambda row: row["intended_at_ns"])
    assert len(rows) == found.manifest.planned_requests == 5
    assert {(row["outcome"], row["error"]) for row in rows} <= {
        ("timeout", "no complete answer within 0.2 s"),
        ("not_sent", "none of 1 connections was free within 0.2 s"),
    }
    assert rows[0]["outcome"] == "timeout"


async def test_a_sender_that_is_killed_ends_the_measurement_and_keeps_what_came_before(tmp_path: Path) -> None:
    model = ModelService(polls_to_end=1)

    async def killed(load: OpenLoop, recorder: Recorder) -> None:
        await load.prepare()
        polled = asyncio.Event()
        model.on_poll = lambda run_id: polled.set() if len(model.polls) == 15 else None
        work = asyncio.create_task(load.carry_out())
        await polled.wait()
        assert isinstance(load._senders[1], SenderProcess)
        os.kill(load._senders[1].pid, signal.SIGKILL)
        with pytest.raises(SenderFailed, match=r"^sending process 1 was killed by signal 9 before its part"):
            await work

    found = await measured(model, tmp_path, plan(ENDLESS, workers=2), killed)
    assert not found.manifest.complete
    assert len(found.samples) >= 3
    assert found.manifest.planned_requests >= 3 * 12_000


async def test_an_interruption_cancels_what_is_unfinished_and_keeps_what_is_known(tmp_path: Path) -> None:
    model = ModelService(polls_to_end=1_000_000)

    async def interrupted(load: OpenLoop, recorder: Recorder) -> None:
        await load.prepare()
        polled = asyncio.Event()
        model.on_poll = lambda run_id: polled.set() if len(model.polls) == 3 else None
        work = asyncio.create_task(load.carry_out())
        await polled.wait()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    patient = dataclasses.replace(RUNS, poll_timeout_s=600.0)
    found = await measured(model, tmp_path, plan(ENDLESS, habits=patient), interrupted)
    parents = [row["run_id"] for row in found.runs.to_pylist() if row["parent_run_key"] is None]
    assert not found.manifest.complete
    assert len(parents) >= 3
    assert set(parents) <= set(model.canceled)


async def test_connections_that_cannot_be_opened_are_named_before_any_load(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, plan(SOON).mode, "request", {})
    client = Client("http://127.0.0.1:1")
    resources = Resources(Api(client, "t"), set)
    load = OpenLoop(plan(SOON, habits=None), client, Api(client, "t"), recorder, resources)
    with pytest.raises(
        ServiceUnreachable, match=r"^cannot open connections to http://127.0.0.1:1: Connection refused$"
    ):
        await load.prepare()
    await client.close()


async def test_once_a_second_the_senders_say_how_they_are(tmp_path: Path) -> None:
    schedule = Schedule(Arrivals.CONSTANT, rate_per_s=50.0, duration_s=1.2)
    found = await measured(always(http(200, {})), tmp_path, plan(schedule, habits=None))
    last = found.resources.to_pylist()[-1]
    assert last["generator_lag_ms"] >= 0.0
    assert last["harness_cpu_percent"] > 0.0
    assert found.manifest.parameters == {
        "arrivals": "constant",
        "rate_per_s": 50.0,
        "duration_s": 1.2,
        "seed": 1,
        "workers": 1,
        "connections": 64,
        "request_timeout_s": 10.0,
    }
