"""Plans carried out against a model of the service on a real socket."""

import asyncio
import gc
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from harness.api import Api
from harness.client import Client
from harness.errors import HarnessError, ServiceUnreachable, StackFailed, TokenDeclined
from harness.generator import Generator, Plan
from harness.recorder import Recorder
from harness.resources import Resources
from harness.sample import Mode
from harness.sampleset import SampleSet, read_sample_set
from harness.scenario import SCENARIO
from harness.selfwatch import quiet_collector
from tests.harness.fake_service import ModelService, http, serving


def plan(mode: Mode, runs: int = 5, burst_size: int = 10, children: int = 1, **changes: float) -> Plan:
    times = {"poll_interval_s": 0.01, "poll_timeout_s": 5.0, "soak_interval_s": 0.0} | changes
    return Plan(mode=mode, runs=runs, children=children, burst_size=burst_size, **times)


Between = Callable[[Generator, Recorder], Awaitable[None]]


async def carried_out(generator: Generator, recorder: Recorder) -> None:
    await generator.prepare()
    await generator.carry_out()


async def generated(model: ModelService, tmp_path: Path, wanted: Plan, do: Between = carried_out) -> SampleSet:
    recorder = Recorder(tmp_path, wanted.mode, SCENARIO, wanted.parameters())
    async with serving(model) as url:
        client, watcher = Client(url), Client(url)
        resources = Resources(Api(watcher, "installation"), set)
        try:
            await do(Generator(wanted, client, Api(client, "installation"), recorder, resources), recorder)
        finally:
            await client.close()
            await watcher.close()
    recorder.finish(complete=True)
    return read_sample_set(recorder.path)


@pytest.mark.parametrize(
    ("wanted", "live_max"),
    [
        (plan(Mode.SMOKE, runs=5), 5),  # fewer than may be live: all side by side
        (plan(Mode.SMOKE, runs=7, burst_size=2), 2),  # never more than two
        (plan(Mode.BURST, runs=7, burst_size=3), 3),  # 3, 3 and 1
        (plan(Mode.SOAK, runs=4), 1),  # one after another
    ],
)
async def test_every_run_is_made_with_no_more_side_by_side_than_asked(
    tmp_path: Path, wanted: Plan, live_max: int
) -> None:
    model = ModelService()
    measured = await generated(model, tmp_path, wanted)
    runs = measured.runs.to_pylist()
    assert {row["run_key"] for row in runs if row["parent_run_key"] is None} == {
        str(number) for number in range(1, wanted.runs + 1)
    }
    assert [row["final_status"] for row in runs] == ["COMPLETED"] * (2 * wanted.runs)
    assert model.live_max == live_max
    assert measured.manifest.complete
    assert len(measured.samples) == measured.manifest.planned_requests == 4 * wanted.runs


async def test_the_runs_of_a_burst_are_due_at_one_instant_and_each_burst_is_a_trial(tmp_path: Path) -> None:
    measured = await generated(ModelService(), tmp_path, plan(Mode.BURST, runs=5, burst_size=2))
    creates = [row for row in measured.samples.to_pylist() if row["endpoint"] == "create"]
    instants = {row["intended_at_ns"] for row in creates}
    assert len(instants) == 3
    bursts = {row["run_key"]: (row["level"], row["trial"], row["worker"]) for row in creates}
    assert bursts == {"1": (2, 0, 0), "2": (2, 0, 1), "3": (2, 1, 0), "4": (2, 1, 1), "5": (1, 2, 0)}


async def test_no_two_live_runs_share_a_workspace(tmp_path: Path) -> None:
    model = ModelService(polls_to_end=3)
    await generated(model, tmp_path, plan(Mode.SMOKE, runs=6, burst_size=3))
    used = [asked.json["workspace_id"] for asked in model.asked if asked.path == "/api/runs/"]
    assert len(set(used)) == 6


async def test_a_soak_waits_its_interval_between_runs(tmp_path: Path) -> None:
    measured = await generated(ModelService(), tmp_path, plan(Mode.SOAK, runs=3, soak_interval_s=0.05))
    rows = measured.samples.to_pylist()
    for number in (1, 2):
        ended_ns = max(row["done_at_ns"] for row in rows if row["run_key"] == str(number))
        [started_ns] = [
            row["intended_at_ns"] for row in rows if row["run_key"] == str(number + 1) and row["endpoint"] == "create"
        ]
        assert started_ns - ended_ns >= 50_000_000


async def test_the_machine_is_looked_at_while_load_is_made_and_once_more_at_the_end(tmp_path: Path) -> None:
    measured = await generated(ModelService(), tmp_path, plan(Mode.SMOKE))
    rows = measured.resources.to_pylist()
    assert len(rows) >= 2
    assert [row["queue_depth"] for row in rows] == [3.0] * len(rows)
    assert rows[0]["ticks_per_s"] is None
    assert rows[-1]["ticks_per_s"] == 0.0
    assert rows[0]["generator_lag_ms"] is None  # the heart has not beaten yet
    assert rows[-1]["generator_lag_ms"] >= 0.0
    assert rows[0]["service_rss_bytes"] is None  # the model is no process of its own


async def test_an_interruption_cancels_what_is_unfinished_and_keeps_what_is_known(tmp_path: Path) -> None:
    model = ModelService(polls_to_end=1_000)
    polled = asyncio.Event()
    model.on_poll = lambda run_id: polled.set() if len(model.polls) == 2 else None

    async def interrupted(generator: Generator, recorder: Recorder) -> None:
        await generator.prepare()
        load = asyncio.create_task(generator.carry_out())
        await polled.wait()
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load

    measured = await generated(model, tmp_path, plan(Mode.SMOKE, runs=2, poll_timeout_s=60), interrupted)
    assert sorted(model.canceled) == ["r1", "r1.c1", "r2", "r2.c1"]
    assert len(measured.runs) == 4
    assert [row["poll_timed_out"] for row in measured.runs.to_pylist()] == [False] * 4


async def test_a_service_that_is_gone_is_recorded_not_raised(tmp_path: Path) -> None:
    model = ModelService()
    model.overrides["POST /api/runs/"] = http(503, {"error": "the database is down"})
    measured = await generated(model, tmp_path, plan(Mode.SMOKE, runs=3))
    rows = measured.samples.to_pylist()
    assert [row["outcome"] for row in rows if row["endpoint"] == "create"] == ["http_error"] * 3
    assert measured.manifest.complete


async def test_a_token_that_may_not_make_workspaces_is_refused_before_any_load(tmp_path: Path) -> None:
    model = ModelService()
    model.overrides["POST /api/workspaces/"] = http(403, {"error": "an installation token is needed"})
    with pytest.raises(TokenDeclined) as refused:
        await generated(model, tmp_path, plan(Mode.SMOKE))
    assert str(refused.value) == (
        "cannot make a workspace: the service answered 403 (an installation token is needed;"
        " --token must be an installation token)"
    )
    assert not any(asked.path == "/api/runs/" for asked in model.asked)


async def test_a_service_that_does_not_answer_is_named(tmp_path: Path) -> None:
    model = ModelService()
    model.overrides["POST /api/workspaces/"] = b"nonsense\r\n\r\n"
    with pytest.raises(ServiceUnreachable, match=r"^cannot make a workspace: unreadable answer: "):
        await generated(model, tmp_path, plan(Mode.SMOKE))


async def test_a_disk_that_fails_while_load_is_made_ends_it_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(collected: object) -> None:
        raise OSError(28, "No space left on device")

    async def full(generator: Generator, recorder: Recorder) -> None:
        await generator.prepare()
        with monkeypatch.context() as patch:
            patch.setattr(recorder, "write", fails)
            await generator.carry_out()

    model = ModelService(polls_to_end=1_000)
    with pytest.raises(HarnessError, match=r"cannot go on writing .* \(No space left on device\)"):
        await generated(model, tmp_path, plan(Mode.SMOKE, runs=1, children=0, poll_timeout_s=60), full)
    assert model.canceled == ["r1"]


def test_the_garbage_collector_is_as_before_afterwards() -> None:
    before = gc.get_threshold()
    with quiet_collector():
        assert gc.get_threshold() != before
        assert gc.get_freeze_count() > 0
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, 0)


async def test_a_check_that_fails_ends_the_load(tmp_path: Path) -> None:
    def gone() -> None:
        raise StackFailed("the embedded stack ended by itself", [])

    recorder = Recorder(tmp_path, Mode.SMOKE, SCENARIO, {})
    model = ModelService(polls_to_end=1_000_000)
    async with serving(model) as url:
        client = Client(url)
        api = Api(client, "installation")
        wanted = plan(Mode.SMOKE, runs=1, poll_timeout_s=600)
        generator = Generator(wanted, client, api, recorder, Resources(api, set), gone)
        with pytest.raises(StackFailed):
            await carried_out(generator, recorder)
        await client.close()
    assert not recorder.finish(complete=False).complete
