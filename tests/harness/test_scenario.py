"""What a user does, request by request, against a model of the service on a real socket."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from harness.api import Api
from harness.client import Client
from harness.recorder import Recorder
from harness.sample import Mode, RunRecord
from harness.samplebuffer import NAN
from harness.sampleset import SampleSet, read_sample_set
from harness.scenario import SCENARIO, AgentRun, Habits, Place
from tests.harness.fake_service import ModelService, http, serving

TIMES = ("created_at_ns", "last_unfinished_at_ns", "first_finished_at_ns")


async def performed(model: ModelService, tmp_path: Path, habits: Habits, timeout_s: float = 5.0) -> SampleSet:
    """Perform one run and return what was recorded."""
    recorder = Recorder(tmp_path, Mode.SMOKE, SCENARIO, {})
    async with serving(model) as url:
        client = Client(url, timeout_s)
        workspace = await Api(client, "installation").make_workspace("w")
        run = AgentRun(client, recorder, workspace, habits, Place(1, NAN, 0, 0))
        await run.perform(intended_at_ns=1)
        for record in run.records():
            recorder.add_run(record)
        await client.close()
    recorder.finish(complete=True)
    return read_sample_set(recorder.path)


def told(measured: SampleSet) -> list[tuple[str, str, str]]:
    rows = measured.samples.to_pylist()
    return [(row["run_key"], row["endpoint"], row["outcome"]) for row in rows]


def timeless(measured: SampleSet) -> list[dict[str, Any]]:
    """The run records with each instant replaced by whether it is known."""
    return [row | {name: row[name] is not None for name in TIMES} for row in measured.runs.to_pylist()]


def known(**changes: Any) -> dict[str, Any]:
    plain = RunRecord(
        run_key="1", run_id="r1", parent_run_key=None, workspace_id="w1", trial=0, worker=0, created_at_ns=None,
        last_unfinished_at_ns=None, first_finished_at_ns=None, server_completion_ms=250.0, final_status="COMPLETED",
        poll_timed_out=False, ticks=2, steps=2, events=5, subruns=0,
    )  # fmt: skip
    return dataclasses.asdict(plain) | {"created_at_ns": True} | changes


QUICK = Habits(children=2, poll_interval_s=0.01, poll_timeout_s=5.0)


async def test_a_run_is_created_given_its_children_and_polled_until_it_is_final(tmp_path: Path) -> None:
    model = ModelService(polls_to_end=3)
    measured = await performed(model, tmp_path, QUICK)
    assert told(measured) == [
        ("1", "create", "ok"),
        ("1.1", "spawn", "ok"),
        ("1.2", "spawn", "ok"),
        ("1", "snapshot", "ok"),
        ("1", "snapshot", "ok"),
        ("1", "snapshot", "ok"),
    ]
    seen = {"last_unfinished_at_ns": True, "first_finished_at_ns": True}
    child = {"parent_run_key": "1", "ticks": None, "steps": None, "events": None}
    assert timeless(measured) == [
        known(**seen, subruns=2),
        known(**seen, **child, run_key="1.1", run_id="r1.c1"),
        known(**seen, **child, run_key="1.2", run_id="r1.c2"),
    ]
    assert measured.manifest.complete
    assert measured.manifest.planned_requests == 6


async def test_each_row_says_when_and_where_its_time_went(tmp_path: Path) -> None:
    measured = await performed(ModelService(polls_to_end=2), tmp_path, QUICK)
    rows = measured.samples.to_pylist()
    for row in rows:
        assert row["intended_at_ns"] <= row["sent_at_ns"] <= row["first_byte_at_ns"] <= row["done_at_ns"]
        assert row["latency_ms"] == pytest.approx((row["done_at_ns"] - row["intended_at_ns"]) / 1e6, abs=5e-4)
        assert row["service_ms"] == pytest.approx((row["done_at_ns"] - row["sent_at_ns"]) / 1e6, abs=5e-4)
        server = [row[f"server_{part}_ms"] for part in ("db", "quota", "publish", "app")]
        assert server == [2.5, 1.5, 3.5, 9.0]
        assert (row["scenario"], row["mode"], row["level"], row["status"]) == (SCENARIO, "smoke", None, 200)
    first, second = rows[-2:]
    assert second["intended_at_ns"] == first["done_at_ns"] + 10_000_000  # the next poll is due an interval later
    [parent, *_] = measured.runs.to_pylist()
    assert parent["last_unfinished_at_ns"] == first["sent_at_ns"]
    assert parent["first_finished_at_ns"] == second["done_at_ns"]


async def test_requests_are_those_of_the_contract_and_use_the_workspaces_own_token(tmp_path: Path) -> None:
    model = ModelService(polls_to_end=2)
    await performed(model, tmp_path, Habits(1, 0.0, 5.0))
    asked = [(each.method, each.path, each.headers["authorization"]) for each in model.asked]
    assert asked == [
        ("POST", "/api/workspaces/", "Bearer installation"),
        ("POST", "/api/workspaces/w1/agents/", "Bearer installation"),
        ("POST", "/api/workspaces/w1/tokens/", "Bearer installation"),
        ("POST", "/api/runs/", "Bearer token-of-w1"),
        ("POST", "/api/runs/r1/spawn_subrun/", "Bearer token-of-w1"),
        ("GET", "/api/runs/r1/snapshot/?since_seq=0", "Bearer token-of-w1"),
        ("GET", "/api/runs/r1/snapshot/?since_seq=5", "Bearer token-of-w1"),
    ]
    assert model.asked[3].json == {
        "workspace_id": "w1",
        "agent_id": "w1-agent",
        "input_text": "load test",
        "channel": "harness",
        "expected_subruns": 1,
    }


async def test_a_run_without_children_does_not_ask_to_wait_for_any(tmp_path: Path) -> None:
    model = ModelService(polls_to_end=1)
    measured = await performed(model, tmp_path, Habits(0, 0.0, 5.0))
    assert "expected_subruns" not in model.asked[3].json
    assert told(measured) == [("1", "create", "ok"), ("1", "snapshot", "ok")]
    assert timeless(measured) == [known(first_finished_at_ns=True, last_unfinished_at_ns=False)]


async def test_a_failed_create_leaves_its_planned_requests_as_rows_that_were_not_sent(tmp_path: Path) -> None:
    model = ModelService()
    model.overrides["POST /api/runs/"] = http(429, {"error": "Workspace quota exceeded for\nrun_creation"})
    measured = await performed(model, tmp_path, QUICK)
    assert told(measured) == [
        ("1", "create", "http_error"),
        ("1.1", "spawn", "not_sent"),
        ("1.2", "spawn", "not_sent"),
        ("1", "snapshot", "not_sent"),
    ]
    rows = measured.samples.to_pylist()
    assert (rows[0]["status"], rows[0]["error"]) == (429, "Workspace quota exceeded for run_creation")
    assert [row["latency_ms"] for row in rows[1:]] == [None, None, None]
    nothing = {"run_id": None, "created_at_ns": False, "last_unfinished_at_ns": False, "first_finished_at_ns": False}
    nothing |= {"server_completion_ms": None, "final_status": None, "ticks": None, "steps": None, "events": None}
    assert timeless(measured) == [
        known(**nothing),
        known(**nothing, run_key="1.1", parent_run_key="1"),
        known(**nothing, run_key="1.2", parent_run_key="1"),
    ]
    assert model.canceled == []


async def test_a_failed_spawn_ends_the_run_which_is_cancelled_with_what_it_has(tmp_path: Path) -> None:
    model = ModelService()
    model.overrides["POST /api/runs/r1/spawn_subrun/"] = http(409, {"error": "the parent is final"})
    measured = await performed(model, tmp_path, QUICK)
    assert told(measured) == [
        ("1", "create", "ok"),
        ("1.1", "spawn", "http_error"),
        ("1.2", "spawn", "not_sent"),
        ("1", "snapshot", "not_sent"),
        ("1", "cancel", "ok"),
    ]
    assert model.canceled == ["r1"]
    assert [row["final_status"] for row in measured.runs.to_pylist()] == [None, None, None]


async def test_a_poll_timeout_is_no_completion_and_what_is_left_is_cancelled(tmp_path: Path) -> None:
    model = ModelService(polls_to_end=1_000)
    measured = await performed(model, tmp_path, Habits(children=1, poll_interval_s=60.0, poll_timeout_s=0.5))
    rows = measured.samples.to_pylist()
    polls = [row for row in rows if row["endpoint"] == "snapshot"]
    # The last poll before giving up is due when the timeout ends; one more looks which children the cancel ended.
    assert polls[-2]["intended_at_ns"] == polls[0]["intended_at_ns"] + 500_000_000
    assert [row["endpoint"] for row in rows][-3:] == ["cancel", "snapshot", "cancel"]
    assert model.canceled == ["r1", "r1.c1"]
    unfinished = {"first_finished_at_ns": False, "last_unfinished_at_ns": True, "server_completion_ms": None}
    unfinished |= {"final_status": None, "poll_timed_out": True}
    child = {"parent_run_key": "1", "ticks": None, "steps": None, "events": None}
    assert timeless(measured) == [
        known(**unfinished, subruns=1),
        known(**unfinished, **child, run_key="1.1", run_id="r1.c1"),
    ]
    assert measured.manifest.complete


async def test_a_failed_poll_is_a_row_and_the_next_poll_may_still_see_the_end(tmp_path: Path) -> None:
    model = ModelService(polls_to_end=1)
    model.overrides["GET .*snapshot.*"] = http(503, {"error": "the database is down"}, "Retry-After: 0")
    seen = 0

    class Recovers(ModelService):
        async def __call__(self, asked: Any, writer: Any) -> None:
            nonlocal seen
            seen += "snapshot" in asked.path
            if seen == 2:
                model.overrides.clear()
            await model(asked, writer)

    measured = await performed(Recovers(), tmp_path, Habits(0, 0.0, 5.0))
    assert told(measured) == [("1", "create", "ok"), ("1", "snapshot", "http_error"), ("1", "snapshot", "ok")]
    first, second = measured.samples.to_pylist()[1:]
    assert second["intended_at_ns"] == first["done_at_ns"] + 100_000_000  # never at once after a fault


@pytest.mark.parametrize(
    "body",
    [b"not json", b"[]", b"{}", b'{"run_id": 7}', b'{"run_id": "x\\r\\nHost: evil"}', b"\xff\xfe"],
)
async def test_an_answer_that_is_not_what_was_promised_is_a_connection_error(tmp_path: Path, body: bytes) -> None:
    model = ModelService()
    model.overrides["POST /api/runs/"] = http(200, body)
    measured = await performed(model, tmp_path, Habits(0, 0.0, 5.0))
    row = measured.samples.to_pylist()[0]
    assert (row["outcome"], row["status"]) == ("connection_error", 200)
    assert row["error"].startswith("unreadable answer: ")
    assert "\n" not in row["error"]
