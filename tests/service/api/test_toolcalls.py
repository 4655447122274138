"""Tool calls over HTTP with a worker at work: approval, roles and risks, lists, definitions."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest

from service.announce import Announcer
from service.api.answers import ToolCallView
from service.db import Database
from service.doorbell import Doorbell
from service.guarded import connect_redis
from service.settings import Settings
from service.tallies import Tallies
from service.tick import Ticker
from service.toolcalls import DEFAULTS, create_definition
from service.worker import Worker
from service.workspaces import Agents, create_agent

NewTenant = Callable[..., Awaitable[Any]]


@pytest.fixture
async def worker(database: Database, redis_url: str) -> AsyncIterator[None]:
    """A worker that looks for due runs all the time."""
    client = connect_redis(redis_url)
    ticker = Ticker(database, Announcer(client, Doorbell(redis_url)), Agents(), Tallies(), Settings.lease_s)
    working = Worker(database, ticker, sweep_interval_s=0.02)
    task = asyncio.create_task(working.work())
    yield
    working.stop()
    await task
    await ticker.close()
    await client.aclose()


@pytest.fixture
async def ask(database: Database) -> Callable[..., Awaitable[str]]:
    """Return a function that lets a tenant's run ask for a tool of a risk, and returns the run's id."""

    async def ask(tenant: Any, risk: str) -> str:
        name = f"guarded-{risk}-{uuid.uuid4().hex[:8]}"
        async with database.begin() as connection:
            await create_definition(connection, tenant.workspace_id, name, "echo", risk, needs_approval=True)
            step = {"kind": "TOOL_CALL", "tool": name, "arguments": {"say": "please"}}
            tenant.agent_id = await create_agent(connection, tenant.workspace_id, name, [step])
        run_id: str = (await tenant.create())["run_id"]
        return run_id

    return ask


async def until(tenant: Any, run_id: str, status: str) -> dict[str, Any]:
    """Return the run's snapshot when it has the status; the test's own timeout bounds it."""
    for _ in itertools.count():
        seen: dict[str, Any] = await tenant.snapshot(run_id)
        if seen["run"]["status"] == status:
            return seen
        await asyncio.sleep(0.02)
    raise AssertionError("unreachable")


async def pending(tenant: Any, run_id: str) -> dict[str, Any]:
    """Return the run's tool call that waits for approval, when it does."""
    await until(tenant, run_id, "WAITING_FOR_APPROVAL")
    answer = await tenant.as_role("VIEWER").get(
        "/api/toolcalls/",
        params={"workspace_id": str(tenant.workspace_id), "status": "PENDING", "run_id": run_id},
    )
    assert answer.status_code == 200, answer.text
    (call,) = answer.json()["tool_calls"]
    assert call.keys() == set(ToolCallView.__struct_fields__)  # as the API's description says
    found: dict[str, Any] = call
    return found


@pytest.mark.usefixtures("worker")
async def test_an_approved_call_is_executed_by_the_worker(
    new_tenant: NewTenant, ask: Callable[..., Awaitable[str]]
) -> None:
    tenant = await new_tenant("calibration")
    run_id = await ask(tenant, "ELEVATED")
    call = await pending(tenant, run_id)
    assert (call["run_id"], call["status"], call["risk"], call["arguments"]) == (
        run_id,
        "PENDING",
        "ELEVATED",
        {"say": "please"},
    )

    answer = await tenant.operator.post(f"/api/toolcalls/{call['tool_call_id']}/approve/", json={"reason": "fine"})

    decided = answer.json()
    assert answer.status_code == 200
    assert (decided["status"], decided["reason"], decided["started_at"]) == ("APPROVED", "fine", None)
    seen = await until(tenant, run_id, "COMPLETED")
    assert [step["kind"] for step in seen["steps"]] == ["TOOL_CALL", "OBSERVATION"]
    assert seen["steps"][1]["payload"]["result"] == {"say": "please"}
    assert [event["event_type"] for event in seen["events_since_seq"]] == [
        "run_created",
        "state_changed",
        "step_created",
        "tool_call_requested",
        "state_changed",
        "tool_call_approved",
        "state_changed",
        "tool_call_completed",
        "step_created",
        "state_changed",
    ]
    again = await tenant.operator.post(f"/api/toolcalls/{call['tool_call_id']}/approve/", json={})
    assert (again.status_code, again.json()["type"]) == (409, "urn:plimsoll:problem:illegal-state")


@pytest.mark.usefixtures("worker")
async def test_a_rejected_call_is_not_executed_and_the_run_completes(
    new_tenant: NewTenant, ask: Callable[..., Awaitable[str]]
) -> None:
    tenant = await new_tenant("calibration")
    run_id = await ask(tenant, "ELEVATED")
    call = await pending(tenant, run_id)

    answer = await tenant.operator.post(f"/api/toolcalls/{call['tool_call_id']}/reject/", json={"reason": "no"})

    assert (answer.status_code, answer.json()["status"]) == (200, "REJECTED")
    seen = await until(tenant, run_id, "COMPLETED")
    observed = seen["steps"][1]["payload"]
    assert (observed["status"], observed["reason"]) == ("REJECTED", "no")


MAY = {
    ("VIEWER", "SAFE"): False,
    ("VIEWER", "ELEVATED"): False,
    ("VIEWER", "DANGEROUS"): False,
    ("OPERATOR", "SAFE"): True,
    ("OPERATOR", "ELEVATED"): True,
    ("OPERATOR", "DANGEROUS"): False,
    ("ADMIN", "SAFE"): True,
    ("ADMIN", "ELEVATED"): True,
    ("ADMIN", "DANGEROUS"): True,
    ("OWNER", "SAFE"): True,
    ("OWNER", "ELEVATED"): True,
    ("OWNER", "DANGEROUS"): True,
}


@pytest.mark.usefixtures("worker")
async def test_who_may_decide_depends_on_the_risk(new_tenant: NewTenant, ask: Callable[..., Awaitable[str]]) -> None:
    tenant = await new_tenant("calibration")
    for (role, risk), may in MAY.items():
        for verb in ("approve", "reject"):
            call = await pending(tenant, await ask(tenant, risk))
            answer = await tenant.as_role(role).post(f"/api/toolcalls/{call['tool_call_id']}/{verb}/", json={})
            assert answer.status_code == (200 if may else 403), (role, risk, verb, answer.text)


@pytest.mark.usefixtures("worker")
async def test_a_foreign_tool_call_is_as_absent_as_an_unknown_one(
    new_tenant: NewTenant, ask: Callable[..., Awaitable[str]]
) -> None:
    mine, theirs = await new_tenant("calibration"), await new_tenant("calibration")
    call = await pending(theirs, await ask(theirs, "DANGEROUS"))
    for verb in ("approve", "reject"):
        told = []
        for id_ in (call["tool_call_id"], str(uuid.uuid4()), "no-id"):
            # An OPERATOR may not decide on a DANGEROUS call; of a foreign one it must not even learn that.
            answer = await mine.operator.post(f"/api/toolcalls/{id_}/{verb}/", json={})
            told.append((answer.status_code, answer.text.replace(id_, "ID")))
        assert told == [told[0]] * 3
        assert told[0][0] == 404
    listed = await mine.operator.get("/api/toolcalls/", params={"workspace_id": str(theirs.workspace_id)})
    absent = await mine.operator.get("/api/toolcalls/", params={"workspace_id": str(uuid.uuid4())})
    assert (listed.status_code, listed.text) == (404, absent.text)
    assert (await mine.operator.get("/api/toolcalls/")).json() == {"tool_calls": [], "next_cursor": None}


@pytest.mark.usefixtures("worker")
async def test_tool_calls_are_listed_newest_first_page_by_page(
    new_tenant: NewTenant, ask: Callable[..., Awaitable[str]]
) -> None:
    tenant = await new_tenant("calibration")
    calls = [(await pending(tenant, await ask(tenant, "ELEVATED")))["tool_call_id"] for _ in range(3)]
    seen, cursor = [], None
    for _ in range(3):
        query = {"limit": 1, **({"cursor": cursor} if cursor else {})}
        page = (await tenant.operator.get("/api/toolcalls/", params=query)).json()
        seen += [call["tool_call_id"] for call in page["tool_calls"]]
        cursor = page["next_cursor"]
    assert (seen, cursor) == (calls[::-1], None)


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"status": "MAYBE"}, "status"),
        ({"workspace_id": "x"}, "workspace_id"),
        ({"run_id": "x"}, "run_id"),
        ({"limit": "0"}, "limit"),
        ({"cursor": "!"}, "cursor"),
    ],
)
async def test_a_list_names_the_parameter_that_is_wrong(tenant: Any, query: dict[str, str], field: str) -> None:
    answer = await tenant.operator.get("/api/toolcalls/", params=query)
    assert (answer.status_code, answer.json()["field"]) == (422, field)


async def test_a_workspace_has_the_built_in_tools_and_those_that_were_made(
    tenant: Any, installation: httpx.AsyncClient
) -> None:
    path = f"/api/workspaces/{tenant.workspace_id}/tools/"
    schema = {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]}
    body = {"name": "find", "tool": "echo", "risk": "DANGEROUS", "schema": schema, "timeout_seconds": 5}

    made = await installation.post(path, json=body)

    view = {**body, "workspace_id": str(tenant.workspace_id), "needs_approval": True, "timeout_seconds": 5.0}
    assert (made.status_code, made.json()) == (200, view)
    listed = (await tenant.as_role("VIEWER").get(path)).json()["tools"]
    assert {each["name"]: (each["risk"], each["needs_approval"]) for each in listed} == {
        "echo": ("SAFE", False),
        "sleep": ("SAFE", False),
        "fail": ("SAFE", False),
        "http_get": ("ELEVATED", True),
        "find": ("DANGEROUS", True),
    }
    for taken in ("find", *DEFAULTS):
        answer = await installation.post(path, json={**body, "name": taken})
        assert answer.status_code == 409, taken
    script = [{"kind": "TOOL_CALL", "tool": "find", "arguments": {"q": 7}}]
    agent = await installation.post(
        f"/api/workspaces/{tenant.workspace_id}/agents/", json={"name": "a", "script": script}
    )
    assert (agent.status_code, agent.json()["field"]) == (422, "script[0].arguments")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "two words"}, "name"),
        ({"tool": "hammer"}, "tool"),
        ({"risk": "HARMLESS"}, "risk"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"timeout_seconds": 1e9}, "timeout_seconds"),
        ({"schema": {"type": "thing"}}, "schema"),
        ({"schema": {"$ref": "http://example.invalid/schema"}}, "schema"),
        ({"schema": {"properties": {"a": {"$ref": "file:///etc/passwd"}}}}, "schema"),
        ({"colour": "red"}, "colour"),
    ],
)
async def test_a_definition_names_the_field_that_is_wrong(
    tenant: Any, installation: httpx.AsyncClient, change: dict[str, Any], field: str
) -> None:
    body = {"name": "a", "tool": "echo", "risk": "SAFE", **change}
    answer = await installation.post(f"/api/workspaces/{tenant.workspace_id}/tools/", json=body)
    assert (answer.status_code, answer.json()["field"]) == (422, field), answer.text


async def test_tools_and_models_are_made_with_an_installation_token_in_a_workspace_that_exists(
    tenant: Any, installation: httpx.AsyncClient
) -> None:
    body = {"name": "a", "tool": "echo", "risk": "SAFE"}
    owner = await tenant.as_role("OWNER").post(f"/api/workspaces/{tenant.workspace_id}/tools/", json=body)
    absent = await installation.post(f"/api/workspaces/{uuid.uuid4()}/tools/", json=body)
    unknown = await tenant.operator.get(f"/api/workspaces/{uuid.uuid4()}/tools/")
    assert (owner.status_code, absent.status_code, unknown.status_code) == (403, 404, 404)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"model": {"model": "m"}}, "model.base_url"),
        ({"model": {"model": "m", "base_url": "http://169.254.169.254/v1"}}, "model.base_url"),
        ({"model": {"model": "m"}, "script": [{"kind": "PLAN"}]}, "model"),
        ({"model": {"temperature": 9, "model": "m"}}, "model"),
        ({"max_steps": 0}, "max_steps"),
        ({"max_tool_calls": -1}, "max_tool_calls"),
        ({"max_steps": "many"}, "max_steps"),
    ],
)
async def test_an_agent_names_the_field_that_is_wrong(
    tenant: Any, installation: httpx.AsyncClient, body: dict[str, Any], field: str
) -> None:
    answer = await installation.post(f"/api/workspaces/{tenant.workspace_id}/agents/", json={"name": "a", **body})
    assert (answer.status_code, answer.json()["field"]) == (422, field), answer.text
