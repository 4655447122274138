"""The stream of a workspace: what lives is listed, then every event comes with the summary that it leads to."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis.asyncio
from sqlalchemy import text

from service.db import Database
from service.events import EventType
from service.runs import new_id
from service.settings import Settings
from service.tallies import Tallies
from service.tick import Ticker
from service.toolcalls import create_definition
from service.workspaces import Agents, create_agent
from tests.sockets import Client, Writer, cut_subscriptions, faults_of, open_socket

SUMMARY = (
    "run_id", "workspace_id", "agent_id", "parent_run_id", "group_id", "correlation_id", "status", "error_summary",
    "last_seq", "created_at", "started_at", "ended_at",
)  # fmt: skip
"""The fields of a summary: a part of the run as HTTP shows it."""


SHORT_LIFE = text("""
    WITH run AS (
        INSERT INTO runs (run_id, workspace_id, agent_id, depth, status, correlation_id, input_text, channel, metadata,
                          expected_subruns, max_wait_seconds, spawned_subruns, pending_subruns, failed_subruns,
                          script_position, step_count, last_seq, ticks, epoch, created_at, ended_at)
        VALUES (:run_id, :workspace, :agent, 0, 'CANCELED', :run_id, '', '', '{}', 0, 60, 0, 0, 0, 0, 0, 2, 0, 0, now(),
                now())
    )
    INSERT INTO events VALUES
        (:run_id, 1, 'run_created', '{}', :run_id, now()),
        (:run_id, 2, 'state_changed', '{"from": "PENDING", "to": "CANCELED"}', :run_id, now())
""")


@pytest.fixture
async def ticker(writer: Writer) -> Ticker:
    """A worker's hands."""
    return Ticker(writer.database, writer.announcer, Agents(), Tallies(), Settings.lease_s)


async def tick_to_the_end(ticker: Ticker, tenant: Any, run_id: str) -> dict[str, Any]:
    """Turn everything that is due over until a run has ended; returns the run as HTTP shows it."""
    while True:
        claims = await ticker.claim()
        await ticker.settle(claims, await ticker.outcomes(claims), ring=False)
        run: dict[str, Any] = (await tenant.http.get(f"/api/runs/{run_id}/")).json()
        if run["ended_at"] is not None:
            return run


def summary_of(run: dict[str, Any]) -> dict[str, Any]:
    """Return the summary of a run as HTTP shows it."""
    return {name: run[name] for name in SUMMARY}


async def tick_until(ticker: Ticker, tenant: Any, run_id: str, status: str) -> None:
    """Turn everything that is due over until a run has a status; the test's own timeout bounds it."""
    while (await tenant.http.get(f"/api/runs/{run_id}/")).json()["status"] != status:
        claims = await ticker.claim()
        await ticker.settle(claims, await ticker.outcomes(claims), ring=False)


async def approval(client: Client) -> dict[str, Any]:
    """Return the next frame about an approval; others are dropped."""
    while (frame := await client.frame()).get("topic") != "approvals.event":
        pass
    return frame


@pytest.fixture
async def client(tenant: Any, url: str) -> AsyncIterator[Client]:
    """A socket on a workspace that had no live run."""
    async with open_socket(url, f"/ws/workspaces/{tenant.workspace_id}/", tenant.tokens["VIEWER"]) as opened:
        listed = await opened.frame()
        assert (listed["event"], listed["data"], listed["seq"]) == ("runs_listed", {"live_runs": 0}, None)
        yield opened


async def test_live_runs_are_listed_first(tenant: Any, url: str) -> None:
    runs = [await tenant.create() for _ in range(3)]
    await tenant.http.post(f"/api/runs/{runs[1]}/cancel/", json={})
    async with open_socket(url, f"/ws/workspaces/{tenant.workspace_id}/", tenant.token) as client:
        first, second, end = await client.frames(3)
    shown = [summary_of((await tenant.http.get(f"/api/runs/{run_id}/")).json()) for run_id in (runs[0], runs[2])]
    assert [first, second, end] == [
        {
            "type": "push", "topic": "workspace.event", "event": "run_listed", "data": summary, "seq": 1,
            "run_id": summary["run_id"], "workspace_id": str(tenant.workspace_id), "ts": end["ts"],
        }
        for summary in shown
    ] + [
        {
            "type": "push", "topic": "workspace.event", "event": "runs_listed", "data": {"live_runs": 2}, "seq": None,
            "run_id": None, "workspace_id": str(tenant.workspace_id), "ts": end["ts"],
        }
    ]  # fmt: skip


async def test_a_runs_whole_life_is_pushed_and_ends_in_the_summary_that_http_shows(
    tenant: Any, client: Client, ticker: Ticker
) -> None:
    run_id = await tenant.create()
    run = await tick_to_the_end(ticker, tenant, run_id)
    frames = await client.frames(run["last_seq"])
    assert [frame["seq"] for frame in frames] == list(range(1, run["last_seq"] + 1))
    assert {frame["topic"] for frame in frames} == {"workspace.event"}
    assert frames[0]["event"] == "run_created"
    assert frames[0]["data"] == {
        **summary_of(run), "status": "PENDING", "last_seq": 1, "started_at": None, "ended_at": None
    }  # fmt: skip
    assert frames[-1]["data"] == summary_of(run)
    snapshot = (await tenant.http.get(f"/api/runs/{run_id}/snapshot/")).json()
    assert [frame["event"] for frame in frames] == [event["event_type"] for event in snapshot["events_since_seq"]]


async def test_a_failed_run_is_pushed_with_its_reason(tenant: Any, client: Client, ticker: Ticker) -> None:
    body = {"workspace_id": str(tenant.workspace_id), "agent_id": str(tenant.agent_id)}
    run_id = (await tenant.http.post("/api/runs/", json=body)).json()["run_id"]
    await tenant.http.post(f"/api/runs/{run_id}/cancel/", json={"reason": "no longer wanted"})
    run = (await tenant.http.get(f"/api/runs/{run_id}/")).json()
    frames = await client.frames(2)
    assert (frames[-1]["event"], frames[-1]["data"]) == ("state_changed", summary_of(run))


async def test_an_event_whose_publication_was_lost_is_found_in_the_database(
    tenant: Any, client: Client, writer: Writer
) -> None:
    run_id = await tenant.create()
    first = await client.frame()
    await writer.append(
        run_id, event_type=EventType.STATE_CHANGED, payload={"from": "PENDING", "to": "RUNNING"}, publish=False
    )
    second = await client.frame()
    assert [(frame["run_id"], frame["seq"]) for frame in (first, second)] == [(run_id, 1), (run_id, 2)]
    assert second["data"]["status"] == "RUNNING"


async def test_every_run_of_a_busy_workspace_is_told_once_and_in_order(
    tenant: Any, client: Client, writer: Writer, redis_url: str
) -> None:
    async def live_a_little() -> str:
        run_id = str(await tenant.create())
        for _ in range(10):
            await writer.append(run_id, 2, publish=hash(run_id) % 2 == 0)
        return run_id

    async with redis.asyncio.from_url(redis_url) as other:
        living = [asyncio.create_task(live_a_little()) for _ in range(10)]
        await cut_subscriptions(other)
        runs = await asyncio.gather(*living)
    seen: dict[str, list[int]] = {run_id: [] for run_id in runs}
    while any(not numbers or numbers[-1] < 21 for numbers in seen.values()):
        frame = await client.frame()
        seen[frame["run_id"]].append(frame["seq"])
    assert {run_id: faults_of(numbers, 1, 21) for run_id, numbers in seen.items()} == {run: [] for run in runs}


async def test_a_run_that_came_and_went_without_any_publication_is_found(
    tenant: Any, client: Client, database: Database
) -> None:
    run_id = new_id()
    async with database.begin() as connection:
        await connection.execute(
            SHORT_LIFE, {"run_id": run_id, "workspace": tenant.workspace_id, "agent": tenant.agent_id}
        )
    frames = await client.frames(2)
    assert [(frame["run_id"], frame["seq"], frame["data"]["status"]) for frame in frames] == [
        (str(run_id), 1, "PENDING"),
        (str(run_id), 2, "CANCELED"),
    ]


async def test_another_workspaces_runs_are_not_told(new_tenant: Any, tenant: Any, client: Client) -> None:
    other = await new_tenant("calibration")
    await other.create()
    run_id = await tenant.create()
    assert (await client.frame())["run_id"] == run_id


async def test_a_run_that_fails_at_its_first_turn_has_started(
    tenant: Any, url: str, client: Client, ticker: Ticker
) -> None:
    run_id = await tenant.create()
    child = (await tenant.http.post(f"/api/runs/{run_id}/spawn_subrun/", json={})).json()["child_run_id"]
    await tenant.http.post(f"/api/runs/{child}/cancel/", json={})
    run = await tick_to_the_end(ticker, tenant, run_id)
    assert (run["status"], run["started_at"]) == ("FAILED", run["ended_at"])
    while (frame := await client.frame())["run_id"] != run_id or frame["data"]["ended_at"] is None:
        pass
    assert frame["data"] == summary_of(run)


@pytest.mark.parametrize(("cmd", "event"), [
    ("approve_tool_call", "tool_call_approved"), ("reject_tool_call", "tool_call_rejected"),
])  # fmt: skip
async def test_a_tool_call_is_pushed_for_approval_and_decided_on_the_socket(
    tenant: Any, url: str, client: Client, writer: Writer, ticker: Ticker, cmd: str, event: str
) -> None:
    assert (await client.answer("subscribe_approvals"))["type"] == "subscribe_approvals_ack"
    async with writer.database.begin() as connection:
        await create_definition(connection, tenant.workspace_id, "guarded", "echo", "ELEVATED")
        step = {"kind": "TOOL_CALL", "tool": "guarded", "arguments": {"say": "may I?"}}
        tenant.agent_id = await create_agent(connection, tenant.workspace_id, "careful", [step])
    run_id = await tenant.create()
    await tick_until(ticker, tenant, run_id, "WAITING_FOR_APPROVAL")

    asked = await approval(client)
    call_id = asked["data"]["tool_call_id"]
    assert (asked["event"], asked["run_id"], asked["data"]) == (
        "tool_call_requested",
        run_id,
        {
            "tool_call_id": call_id, "tool": "guarded", "risk": "ELEVATED", "arguments": {"say": "may I?"},
            "needs_approval": True, "step_index": 1,
        },
    )  # fmt: skip
    assert (await client.answer(cmd, tool_call_id=call_id))["code"] == "role-too-low"
    async with open_socket(url, f"/ws/runs/{run_id}/", tenant.token) as operator:
        answer = await operator.answer(cmd, tool_call_id=call_id, reason="so be it")
        assert (answer["type"], answer["data"]["tool_call_id"]) == (f"{cmd}_ack", call_id)
        assert (await operator.answer(cmd, tool_call_id=call_id))["code"] == "illegal-state"
    decided = await approval(client)
    assert (decided["event"], decided["data"]["tool_call_id"], decided["data"]["reason"]) == (
        event, call_id, "so be it"
    )  # fmt: skip
    await tick_until(ticker, tenant, run_id, "COMPLETED")


async def test_approvals_come_once_they_are_asked_for(tenant: Any, client: Client, writer: Writer) -> None:
    run_id = await tenant.create()
    call = {"tool_call_id": str(uuid.uuid4())}
    await writer.append(run_id, event_type=EventType.TOOL_CALL_REQUESTED, payload=call)
    assert [frame["topic"] for frame in await client.frames(2)] == ["workspace.event"] * 2
    assert (await client.answer("subscribe_approvals", id=7))["id"] == 7
    for event_type in (
        EventType.TOOL_CALL_REQUESTED,
        EventType.TOOL_CALL_APPROVED,
        EventType.TOOL_CALL_REJECTED,
        EventType.TOOL_CALL_COMPLETED,
    ):
        await writer.append(run_id, event_type=event_type, payload=call)
    frames = await client.frames(7)
    approvals = [frame for frame in frames if frame["topic"] == "approvals.event"]
    assert [(frame["event"], frame["seq"], frame["data"], frame["run_id"]) for frame in approvals] == [
        ("tool_call_requested", 3, call, run_id),
        ("tool_call_approved", 4, call, run_id),
        ("tool_call_rejected", 5, call, run_id),
    ]
    assert (await client.answer("unsubscribe_approvals"))["type"] == "unsubscribe_approvals_ack"
    await writer.append(run_id, event_type=EventType.TOOL_CALL_REQUESTED, payload=call)
    await writer.append(run_id)
    assert [frame["topic"] for frame in await client.frames(2)] == ["workspace.event"] * 2


async def test_an_ended_run_that_is_archived_is_told_once_more(
    tenant: Any, url: str, writer: Writer, database: Database
) -> None:
    run_id = await tenant.create()
    await tenant.http.post(f"/api/runs/{run_id}/cancel/", json={})
    async with open_socket(url, f"/ws/workspaces/{tenant.workspace_id}/", tenant.token) as client:
        await client.frame()
        last = await writer.append(run_id, event_type=EventType.RUN_ARCHIVED)
        archived = await client.frame()
        assert (archived["event"], archived["seq"]) == ("run_archived", last)
        assert (archived["data"]["status"], archived["data"]["last_seq"]) == ("CANCELED", last)
        again = await writer.append(run_id, event_type=EventType.RUN_ARCHIVED)
        assert (await client.frame())["seq"] == again
