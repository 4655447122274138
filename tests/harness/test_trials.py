"""Single bursts against a model of the service on a real socket."""

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from harness import trials as module
from harness.api import Api
from harness.client import Client
from harness.errors import ServiceDeclined
from harness.recorder import Recorder
from harness.sample import Endpoint, Mode
from harness.sampleset import SampleSet, read_sample_set
from harness.trials import NotAtRest, Trials
from tests.harness.fake_service import ModelService, http, serving
from tests.harness.limited_service import LimitedService


class Stage:
    """Trials at one endpoint, and what they leave behind."""

    def __init__(self, trials: Trials, recorder: Recorder) -> None:
        self.trials = trials
        self.looks = 0
        self._recorder = recorder

    def close(self) -> SampleSet:
        self._recorder.finish(complete=True)
        return read_sample_set(self._recorder.path)


@asynccontextmanager
async def stage(model: ModelService, tmp_path: Path, endpoint: Endpoint) -> AsyncIterator[Stage]:
    recorder = Recorder(tmp_path, Mode.BURST_LIMITS, "burst", {})
    async with serving(model) as url:
        client = Client(url)

        async def look() -> None:
            made.looks += 1

        trials = Trials(endpoint, client, Api(client, "installation"), recorder, itertools.count(1), look)
        made = Stage(trials, recorder)
        await trials.prepare("mine")
        try:
            yield made
        finally:
            await client.close()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REST_POLL_S", 0.001)


def lines(model: ModelService) -> list[str]:
    return [f"{asked.method} {asked.path}" for asked in model.asked]


async def test_a_burst_is_due_at_one_instant_on_connections_that_were_open_before(tmp_path: Path) -> None:
    model = LimitedService("create", 1_000)
    async with stage(model, tmp_path, Endpoint.CREATE) as made:
        latency = await made.trials.perform(40, 3)
    rows = made.close().samples.to_pylist()
    assert {(row["level"], row["trial"], row["endpoint"], row["outcome"]) for row in rows} == {(40, 3, "create", "ok")}
    assert len({row["intended_at_ns"] for row in rows}) == 1
    np.testing.assert_allclose(latency, [row["latency_ms"] for row in rows], rtol=0, atol=0.5 / 1024)  # as it is kept
    tried = {asked.connection for asked in model.asked if asked.path == "/livez"}
    used = [asked.connection for asked in model.asked if asked.path == "/api/runs/" and asked.method == "POST"]
    assert len(set(used)) == 40
    assert set(used) <= tried
    assert made.looks == 1


async def test_the_workspace_is_one_whose_quotas_are_lifted(tmp_path: Path) -> None:
    model = LimitedService("create", 1_000)
    async with stage(model, tmp_path, Endpoint.CREATE):
        assert model.asked[0].json == {"name": "mine", "quota_class": "calibration"}


async def test_what_fails_is_a_row_and_infinitely_slow(tmp_path: Path) -> None:
    async with stage(LimitedService("create", 6), tmp_path, Endpoint.CREATE) as made:
        latency = await made.trials.perform(8, 0)
    measured = made.close()
    assert int(np.isinf(latency).sum()) == 2
    assert sorted(measured.samples["outcome"].to_pylist()) == ["http_error"] * 2 + ["ok"] * 6
    assert measured.samples["error"].drop_null().to_pylist() == ["too many at once"] * 2
    assert measured.manifest.complete
    assert measured.manifest.planned_requests == 8


async def test_subruns_are_spawned_from_parents_that_wait_for_them_and_others_are_cancelled(tmp_path: Path) -> None:
    model = LimitedService("spawn", 3)
    async with stage(model, tmp_path, Endpoint.SPAWN) as made:
        await made.trials.perform(5, 0)
    runs = made.close().runs.to_pylist()
    assert set(model.expected.values()) == {1}
    parents = [row["run_id"] for row in runs if row["parent_run_key"] is None]
    assert sorted(parents) == sorted(model.children)
    assert sum(row["subruns"] for row in runs) == 3
    assert sorted(model.canceled) == sorted(run_id for run_id, children in model.children.items() if not children)


async def test_each_snapshot_is_the_first_of_a_run_that_has_ended(tmp_path: Path) -> None:
    model = LimitedService("snapshot", 1_000)
    async with stage(model, tmp_path, Endpoint.SNAPSHOT) as made:
        await made.trials.perform(20, 0)
        await made.trials.perform(20, 1)
    assert set(model.polls.values()) == {1}
    assert len(model.polls) == 40
    assert set(made.close().samples["endpoint"].to_pylist()) == {"snapshot"}


async def test_the_next_trial_waits_until_the_queue_is_empty(tmp_path: Path) -> None:
    model = LimitedService("create", 1_000)
    model.depths = [5, 2, 0]
    async with stage(model, tmp_path, Endpoint.CREATE) as made:
        await made.trials.perform(2, 0)
    after = lines(model)[-lines(model)[::-1].index("POST /api/runs/") :]
    assert after[:3] == ["GET /metrics"] * 3
    assert model.depths == []


async def test_what_does_not_finish_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REST_S", 0.0)
    model = LimitedService("create", 1_000)
    model.unfinished = ["r1", "stray"]  # also what was made by a create that was never answered
    async with stage(model, tmp_path, Endpoint.CREATE) as made:
        await made.trials.perform(2, 0)
    assert sorted(model.canceled) == ["r1", "stray"]


async def test_a_target_without_metrics_and_list_is_waited_for_by_snapshots(tmp_path: Path) -> None:
    model = ModelService(polls_to_end=3)
    model.overrides["GET /metrics"] = http(404, {"error": "none"})
    async with stage(model, tmp_path, Endpoint.CREATE) as made:
        await made.trials.perform(4, 0)
    assert model.polls == dict.fromkeys(model.children, 3)


async def test_a_service_that_does_not_come_to_rest_ends_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REST_S", 0.0)
    monkeypatch.setattr(module, "CANCEL_REST_S", 0.0)
    model = LimitedService("create", 1_000)
    model.depths = [7] * 1_000
    async with stage(model, tmp_path, Endpoint.CREATE) as made:
        with pytest.raises(NotAtRest) as raised:
            await made.trials.perform(2, 0)
    assert str(raised.value) == (
        "create: the service did not come to rest after a trial: 7 runs are due, the oldest for 0.7 s"
    )


async def test_a_service_that_declines_the_preparation_is_named(tmp_path: Path) -> None:
    model = LimitedService("spawn", 1_000)
    model.overrides["POST /api/runs/"] = http(503, {"error": "the database is down"})
    async with stage(model, tmp_path, Endpoint.SPAWN) as made:
        with pytest.raises(ServiceDeclined, match="cannot make a run for a trial: the service answered 503"):
            await made.trials.perform(2, 0)


async def test_a_warm_up_leaves_no_rows(tmp_path: Path) -> None:
    async with stage(LimitedService("create", 1_000), tmp_path, Endpoint.CREATE) as made:
        assert len(await made.trials.perform(4, 0, record=False)) == 4
    measured = made.close()
    assert (len(measured.samples), measured.manifest.planned_requests, made.looks) == (0, 0, 0)
