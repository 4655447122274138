"""Creating, listing, reading and spawning, as a client sees it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from service.db import Database
from service.idempotency import IdempotencyKeys, KeyedWrite
from service.runs import new_id
from service.workspaces import create_agent

ABSENT = "01a00000-0000-7000-8000-000000000000"


async def test_a_created_run_is_pending_and_can_be_read_back(tenant: Any) -> None:
    created = await tenant.create(input_text="hello", channel="test", metadata={"a": [1, {"b": None}]})
    assert created == {
        "run_id": created["run_id"],
        "status": "PENDING",
        "workspace_id": str(tenant.workspace_id),
        "agent_id": str(tenant.agent_id),
        "correlation_id": created["correlation_id"],
    }
    run = (await tenant.operator.get(f"/api/runs/{created['run_id']}/")).json()
    assert {name: run[name] for name in ("input_text", "channel", "metadata", "status", "ended_at")} == {
        "input_text": "hello",
        "channel": "test",
        "metadata": {"a": [1, {"b": None}]},
        "status": "PENDING",
        "ended_at": None,
    }


async def test_the_trailing_slash_is_optional_everywhere(tenant: Any) -> None:
    run_id = (await tenant.create())["run_id"]
    for path in (f"/api/runs/{run_id}", f"/api/runs/{run_id}/snapshot", "/api/runs", "/livez/", "/readyz/"):
        assert (await tenant.operator.get(path)).status_code == 200, path


async def test_a_list_is_newest_first_and_its_cursor_goes_on_where_the_page_ended(tenant: Any) -> None:
    ids = [(await tenant.create())["run_id"] for _ in range(5)]
    first = (await tenant.operator.get("/api/runs/", params={"limit": 3})).json()
    second = (await tenant.operator.get("/api/runs/", params={"limit": 3, "cursor": first["next_cursor"]})).json()
    assert [run["run_id"] for run in first["runs"] + second["runs"]] == ids[::-1]
    assert second["next_cursor"] is None


async def test_a_page_ends_early_when_its_rows_are_large(tenant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.api.paging.MOST_PAGE_BYTES", 10_000)
    sizes = [10, 4_000, 4_000, 20_000, 10]
    ids = [(await tenant.create(metadata={"a": "x" * size}))["run_id"] for size in sizes]
    pages: list[list[str]] = []
    cursor: dict[str, str] = {}
    while True:
        page = (await tenant.operator.get("/api/runs/", params={"limit": 200, **cursor})).json()
        pages.append([run["run_id"] for run in page["runs"]])
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    # Newest first. A row that is too large by itself is given alone: whoever pages gets on.
    assert pages == [[ids[4]], [ids[3]], [ids[2], ids[1], ids[0]]]


async def test_a_list_can_be_narrowed_by_status_and_parent(tenant: Any) -> None:
    parent = (await tenant.create())["run_id"]
    child = (await tenant.operator.post(f"/api/runs/{parent}/spawn_subrun/", json={})).json()["child_run_id"]
    children = (await tenant.operator.get("/api/runs/", params={"parent_run_id": parent})).json()
    completed = (await tenant.operator.get("/api/runs/", params={"status": "COMPLETED"})).json()
    assert ([run["run_id"] for run in children["runs"]], completed["runs"]) == ([child], [])


async def test_a_spawn_numbers_its_step_and_events_on_the_parent(tenant: Any) -> None:
    parent = await tenant.create()
    answer = await tenant.operator.post(
        f"/api/runs/{parent['run_id']}/spawn_subrun/", json={"options": {"group_id": "g"}}
    )
    child = answer.json()
    assert child == {
        "child_run_id": child["child_run_id"],
        "status": "PENDING",
        "correlation_id": parent["correlation_id"],
        "group_id": "g",
    }
    seen = await tenant.snapshot(parent["run_id"])
    assert [(event["seq"], event["event_type"]) for event in seen["events_since_seq"]] == [
        (1, "run_created"),
        (2, "step_created"),
        (3, "subrun_spawned"),
    ]
    assert [(step["step_index"], step["kind"]) for step in seen["steps"]] == [(1, "SUBRUN_SPAWN")]
    assert [(c["run_id"], c["status"]) for c in seen["child_runs"]] == [(child["child_run_id"], "PENDING")]
    assert (seen["run"]["pending_subruns"], seen["last_seq"]) == (1, 3)


async def test_concurrent_spawns_share_a_commit_and_number_the_parent_without_gaps(
    new_tenant: Callable[..., Awaitable[Any]],
) -> None:
    tenant = await new_tenant("calibration")
    run_id = (await tenant.create())["run_id"]
    answers = await asyncio.gather(
        *(tenant.operator.post(f"/api/runs/{run_id}/spawn_subrun/", json={}) for _ in range(40))
    )
    assert {answer.status_code for answer in answers} == {200}
    seen = await tenant.snapshot(run_id)
    assert [event["seq"] for event in seen["events_since_seq"]] == list(range(1, 82))
    assert [step["step_index"] for step in seen["steps"]] == list(range(1, 41))
    assert len(seen["child_runs"]) == 40


async def test_a_final_run_spawns_nothing(tenant: Any, database: Database) -> None:
    run_id = (await tenant.create())["run_id"]
    assert (await tenant.operator.post(f"/api/runs/{run_id}/cancel/", json={})).status_code == 200
    answer = await tenant.operator.post(f"/api/runs/{run_id}/spawn_subrun/", json={})
    assert (answer.status_code, answer.json()["error"]) == (
        409,
        "the run is CANCELED: a final run spawns nothing",
    )


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"join_policy": "WAIT_SOME"}, "options.join_policy"),
        ({"failure_policy": "SHRUG"}, "options.failure_policy"),
        ({"quorum": 2}, "options.quorum"),
        ({"join_policy": "QUORUM"}, "options.quorum"),
        ({"join_policy": "QUORUM", "quorum": 0}, "options.quorum"),
        ({"join_policy": "QUORUM", "quorum": 5}, "options.quorum"),
        ({"join_policy": "QUORUM", "quorum": 1.5}, "options.quorum"),
        ({"join_policy": "TIMEOUT"}, "options.timeout_seconds"),
        ({"join_policy": "TIMEOUT", "timeout_seconds": 0}, "options.timeout_seconds"),
        ({"join_policy": "TIMEOUT", "timeout_seconds": 86_401}, "options.timeout_seconds"),
        ({"group_id": ""}, "options.group_id"),
        ({"metadata": [1]}, "options.metadata"),
        ({"colour": "red"}, "options.colour"),
    ],
)
async def test_a_bad_spawn_option_is_refused_by_name(tenant: Any, options: dict[str, Any], field: str) -> None:
    run_id = (await tenant.create())["run_id"]
    answer = await tenant.operator.post(f"/api/runs/{run_id}/spawn_subrun/", json={"options": options})
    assert (answer.status_code, answer.json()["field"]) == (422, field)
    assert (await tenant.snapshot(run_id))["child_runs"] == []


async def test_the_same_key_and_body_give_the_same_run_once(tenant: Any) -> None:
    body = {"workspace_id": str(tenant.workspace_id), "agent_id": str(tenant.agent_id)}
    send = [await tenant.operator.post("/api/runs/", json=body, headers={"idempotency-key": "k1"}) for _ in range(3)]
    assert {answer.status_code for answer in send} == {200}
    assert len({answer.content for answer in send}) == 1
    assert len((await tenant.operator.get("/api/runs/")).json()["runs"]) == 1


async def test_the_same_key_at_the_same_time_makes_one_run(tenant: Any) -> None:
    body = {"workspace_id": str(tenant.workspace_id), "agent_id": str(tenant.agent_id)}
    answers = await asyncio.gather(
        *(tenant.operator.post("/api/runs/", json=body, headers={"idempotency-key": "k"}) for _ in range(8))
    )
    assert {answer.status_code for answer in answers} <= {200, 409}
    assert len({answer.json()["run_id"] for answer in answers if answer.status_code == 200}) == 1
    assert len((await tenant.operator.get("/api/runs/")).json()["runs"]) == 1


async def test_the_same_key_with_another_body_is_refused(tenant: Any) -> None:
    body = {"workspace_id": str(tenant.workspace_id), "agent_id": str(tenant.agent_id)}
    await tenant.operator.post("/api/runs/", json=body, headers={"idempotency-key": "k"})
    answer = await tenant.operator.post(
        "/api/runs/", json={**body, "input_text": "other"}, headers={"idempotency-key": "k"}
    )
    assert (answer.status_code, answer.json()["field"]) == (422, "Idempotency-Key")


async def test_a_refused_create_gives_its_key_back(tenant: Any, database: Database) -> None:
    body = {"workspace_id": str(tenant.workspace_id), "agent_id": str(tenant.agent_id)}
    runs = [(await tenant.create())["run_id"] for _ in range(5)]
    key = {"idempotency-key": "later"}
    assert (await tenant.operator.post("/api/runs/", json=body, headers=key)).status_code == 429
    await tenant.operator.post(f"/api/runs/{runs[0]}/cancel/", json={})
    assert (await tenant.operator.post("/api/runs/", json=body, headers=key)).status_code == 200


async def test_one_write_that_cannot_be_stored_fails_alone(
    new_tenant: Callable[..., Awaitable[Any]], database: Database
) -> None:
    tenant = await new_tenant("calibration")
    good = {"workspace_id": str(tenant.workspace_id), "agent_id": str(tenant.agent_id)}
    async with database.begin() as connection:
        lost = await create_agent(connection, tenant.workspace_id, "lost")
    bad = {**good, "agent_id": str(lost)}
    refused = await tenant.operator.post("/api/runs/", json={**bad, "metadata": 7})
    assert refused.status_code == 422  # and the service has met the agent
    async with database.begin() as connection:
        await connection.execute(text("DELETE FROM agents WHERE agent_id = :lost"), {"lost": lost})
    answers = await asyncio.gather(
        *(tenant.operator.post("/api/runs/", json=good) for _ in range(10)),
        tenant.operator.post("/api/runs/", json=bad),
        *(tenant.operator.post("/api/runs/", json=good) for _ in range(10)),
    )
    assert [answer.status_code for answer in answers] == [200] * 10 + [503] + [200] * 10


async def test_caps_hold_when_many_ask_at_once(tenant: Any) -> None:
    body = {"workspace_id": str(tenant.workspace_id), "agent_id": str(tenant.agent_id)}
    answers = await asyncio.gather(*(tenant.operator.post("/api/runs/", json=body) for _ in range(11)))
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [429] * 6
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json() == {
        "type": "https://iana.org/assignments/http-problem-types#quota-exceeded",
        "title": "Request cannot be satisfied as assigned quota has been exceeded",
        "status": 429,
        "detail": refused.json()["error"],
        "instance": "/api/runs/",
        "error": "Workspace quota exceeded for live_parent_runs (5 of 5 in use); try again when one of them has ended",
        "violated-policies": ["live_parent_runs"],
    }
    assert refused.headers["retry-after"] == "1"


async def test_pending_subruns_are_capped_at_four(tenant: Any) -> None:
    run_id = (await tenant.create())["run_id"]
    answers = [await tenant.operator.post(f"/api/runs/{run_id}/spawn_subrun/", json={}) for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200] * 4 + [429]
    assert answers[-1].json()["violated-policies"] == ["pending_subruns"]


async def test_a_foreign_object_and_an_absent_one_are_told_alike(
    tenant: Any, new_tenant: Callable[..., Awaitable[Any]]
) -> None:
    stranger = await new_tenant()
    run_id = (await tenant.create())["run_id"]

    async def ask(method: str, path: str, object_id: str, **more: Any) -> tuple[int, bytes]:
        answer: httpx.Response = await stranger.operator.request(method, path.format(object_id), **more)
        return answer.status_code, answer.content.replace(object_id.encode(), b"<id>")

    routes: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", "/api/runs/{}/", {}),
        ("GET", "/api/runs/{}/snapshot/", {}),
        ("POST", "/api/runs/{}/spawn_subrun/", {"json": {}}),
        ("POST", "/api/runs/{}/cancel/", {"json": {}}),
        ("POST", "/api/runs/{}/pause/", {"json": {}}),
        ("POST", "/api/runs/{}/resume/", {"json": {}}),
    ]
    for method, path, more in routes:
        foreign, absent = await ask(method, path, run_id, **more), await ask(method, path, ABSENT, **more)
        assert (foreign, foreign[0]) == (absent, 404), path
        malformed = await ask(method, path, "not-a-uuid", **more)
        assert malformed == absent, path

    for workspace_id in (str(tenant.workspace_id), str(uuid.uuid4())):
        answer = await stranger.operator.post(
            "/api/runs/", json={"workspace_id": workspace_id, "agent_id": str(stranger.agent_id)}
        )
        assert (answer.status_code, answer.json()["error"]) == (404, "no such workspace")
    for agent_id in (str(tenant.agent_id), ABSENT):
        answer = await stranger.operator.post(
            "/api/runs/", json={"workspace_id": str(stranger.workspace_id), "agent_id": agent_id}
        )
        assert (answer.status_code, answer.json()["error"]) == (404, "no such agent")
    assert (await tenant.snapshot(run_id))["run"]["status"] == "PENDING"


async def test_a_viewer_reads_and_changes_nothing(tenant: Any) -> None:
    run_id = (await tenant.create())["run_id"]
    viewer = tenant.as_role("VIEWER")
    body = {"workspace_id": str(tenant.workspace_id), "agent_id": str(tenant.agent_id)}
    assert (await viewer.get(f"/api/runs/{run_id}/snapshot/")).status_code == 200
    for path, sent in (
        ("/api/runs/", body),
        (f"/api/runs/{run_id}/spawn_subrun/", {}),
        (f"/api/runs/{run_id}/cancel/", {}),
        (f"/api/runs/{run_id}/pause/", {}),
        (f"/api/runs/{run_id}/resume/", {}),
    ):
        answer = await viewer.post(path, json=sent)
        assert (answer.status_code, answer.json()["type"]) == (403, "urn:plimsoll:problem:role-too-low"), path


async def test_what_is_written_is_in_the_database_before_the_answer(tenant: Any, database: Database) -> None:
    run_id = (await tenant.create())["run_id"]
    async with database.read() as connection:
        found = await connection.execute(
            text("SELECT status, last_seq, next_tick_at = created_at AS due FROM runs WHERE run_id = :run_id"),
            {"run_id": run_id},
        )
        assert found.one()._asdict() == {"status": "PENDING", "last_seq": 1, "due": True}


async def test_a_key_is_forgotten_after_a_day_and_may_be_used_again(tenant: Any, database: Database) -> None:
    body = {"workspace_id": str(tenant.workspace_id), "agent_id": str(tenant.agent_id)}
    key = {"idempotency-key": "daily"}
    first = (await tenant.operator.post("/api/runs/", json=body, headers=key)).json()["run_id"]
    async with database.begin() as connection:
        await connection.execute(
            text("UPDATE idempotency_keys SET created_at = created_at - interval '25 hours' WHERE run_id = :run_id"),
            {"run_id": first},
        )
        assert (
            await IdempotencyKeys().claim(connection, [KeyedWrite(tenant.workspace_id, "other", b"", new_id())]) == {}
        )
    second = (await tenant.operator.post("/api/runs/", json=body, headers=key)).json()["run_id"]
    assert second != first
