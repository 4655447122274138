"""Callers who want opposite things of one run at the same moment, while a worker advances it."""

from __future__ import annotations

import asyncio
import itertools
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest

from service.announce import Announcer
from service.db import Database
from service.doorbell import Doorbell
from service.guarded import connect_redis
from service.tallies import Tallies
from service.tick import Ticker
from service.toolcalls import create_definition
from service.worker import Worker
from service.workspaces import Agents, create_agent
from tests.tenants import Tenant

ROUNDS = 12
"""Runs that are pulled at in one test."""


@pytest.fixture
async def workers(database: Database, redis_url: str) -> AsyncIterator[None]:
    """Two workers that look for due runs all the time."""
    client = connect_redis(redis_url)
    tickers = [Ticker(database, Announcer(client, Doorbell(redis_url)), Agents(), Tallies(), 0.5) for _ in range(2)]
    working = [Worker(database, ticker, sweep_interval_s=0.01) for ticker in tickers]
    tasks = [asyncio.create_task(each.work()) for each in working]
    yield
    for each in working:
        each.stop()
    await asyncio.gather(*tasks)
    for ticker in tickers:
        await ticker.close()
    await client.aclose()


@pytest.fixture
async def tenant(database: Database, new_tenant: Callable[..., Awaitable[Any]]) -> Any:
    """A tenant without limits whose agent asks for a tool, then says something."""
    made = await new_tenant("calibration")
    async with database.begin() as connection:
        await create_definition(connection, made.workspace_id, "guarded", "echo", "ELEVATED")
        script: list[dict[str, Any]] = [{"kind": "TOOL_CALL", "tool": "guarded", "arguments": {}}, {"kind": "MESSAGE"}]
        made.agent_id = await create_agent(connection, made.workspace_id, "asks", script)
    return made


async def call_of(tenant: Any, run_id: str) -> str:
    """Return the run's tool call when it waits; the test's own timeout bounds it."""
    for _ in itertools.count():
        calls = (await tenant.operator.get("/api/toolcalls/", params={"run_id": run_id})).json()["tool_calls"]
        if calls:
            return str(calls[0]["tool_call_id"])
        await asyncio.sleep(0.01)
    raise AssertionError("unreachable")


async def faults_of(database: Database, tenant: Any) -> list[str]:
    """Return how the stored facts about this tenant's runs contradict each other."""
    announcer: Any = None
    stored = Tenant(database, announcer, tenant.workspace_id, tenant.agent_id)
    own = await stored.rows(
        "SELECT run_id AS id FROM runs WHERE workspace_id = :id"
        " UNION ALL SELECT tool_call_id FROM tool_calls WHERE workspace_id = :id",
        id=tenant.workspace_id,
    )
    return [fault for fault in await stored.faults() if any(str(row["id"]) in fault for row in own)]


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("seed", range(3))
async def test_whatever_is_asked_of_a_run_at_once_it_ends_and_nothing_contradicts(
    tenant: Any, database: Database, seed: int
) -> None:
    order = random.Random(seed)  # noqa: S311 - not for secrets
    told: Counter[tuple[str, int]] = Counter()

    async def ask(path: str) -> None:
        answer: httpx.Response = await tenant.operator.post(path, json={})
        told[path.rstrip("/").rpartition("/")[2], answer.status_code] += 1
        assert answer.status_code in (200, 409), answer.text

    for _ in range(ROUNDS):
        run_id = (await tenant.create())["run_id"]
        call_id = await call_of(tenant, run_id)
        wanted = [f"/api/runs/{run_id}/{what}/" for what in ("pause", "pause", "resume", "resume", "spawn_subrun")]
        wanted += [f"/api/toolcalls/{call_id}/{what}/" for what in ("approve", "approve", "reject")]
        wanted += [f"/api/runs/{run_id}/cancel/"] * order.choice([0, 0, 1, 2])
        order.shuffle(wanted)
        await asyncio.gather(*map(ask, wanted))
        await tenant.operator.post(f"/api/runs/{run_id}/resume/", json={})  # one that stayed paused would wait for ever
        children = (await tenant.operator.get("/api/runs/", params={"parent_run_id": run_id})).json()["runs"]
        for child in children:
            await ask_until_decided(tenant, child["run_id"])
        await until_final(tenant, run_id)
    assert told["approve", 200] + told["reject", 200] <= 2 * ROUNDS
    assert told["approve", 409] + told["reject", 409] >= 2 * ROUNDS  # of three who decide on a call, one at most counts
    assert told["pause", 200] > 0
    assert await faults_of(database, tenant) == []


async def ask_until_decided(tenant: Any, run_id: str) -> None:
    """Reject what a subrun asks for, unless it has ended before."""
    while not (await tenant.snapshot(run_id))["run"]["ended_at"]:
        calls = (await tenant.operator.get("/api/toolcalls/", params={"run_id": run_id, "status": "PENDING"})).json()
        for call in calls["tool_calls"]:
            await tenant.operator.post(f"/api/toolcalls/{call['tool_call_id']}/reject/", json={})
        await asyncio.sleep(0.01)


async def until_final(tenant: Any, run_id: str) -> None:
    """Return when a run has ended; the test's own timeout bounds it."""
    for _ in itertools.count():
        if (await tenant.snapshot(run_id))["run"]["ended_at"]:
            return
        await asyncio.sleep(0.01)


@pytest.mark.usefixtures("workers")
async def test_a_call_of_a_cancelled_run_cannot_be_decided_any_more(tenant: Any) -> None:
    run_id = (await tenant.create())["run_id"]
    call_id = await call_of(tenant, run_id)
    assert (await tenant.operator.post(f"/api/runs/{run_id}/cancel/", json={})).status_code == 200
    for what in ("approve", "reject"):
        answer = await tenant.operator.post(f"/api/toolcalls/{call_id}/{what}/", json={})
        assert (answer.status_code, answer.json()["error"]) == (
            409,
            "the tool call does not wait for approval any more",
        )


@pytest.mark.usefixtures("workers")
async def test_a_spawn_at_the_moment_of_its_parents_end_is_joined_or_refused(
    new_tenant: Callable[..., Awaitable[Any]], database: Database
) -> None:
    tenant = await new_tenant("calibration")
    told: Counter[int] = Counter()
    for _ in range(ROUNDS):
        run_id = (await tenant.create())["run_id"]
        answers = await asyncio.gather(
            *(tenant.operator.post(f"/api/runs/{run_id}/spawn_subrun/", json={}) for _ in range(6))
        )
        told.update(answer.status_code for answer in answers)
        await until_final(tenant, run_id)
    assert set(told) <= {200, 409}
    assert await faults_of(database, tenant) == []


async def test_a_create_that_is_sent_many_times_at_once_makes_one_run(tenant: Any) -> None:
    body = {"workspace_id": str(tenant.workspace_id), "agent_id": str(tenant.agent_id)}
    for key in ("k", "inner spaces", "'; DROP TABLE runs; --", "\xe4\xf6", "%00", "k" * 255):
        headers = {"idempotency-key": (key + uuid.uuid4().hex)[-255:].encode("latin-1")}
        answers = await asyncio.gather(
            *(tenant.operator.post("/api/runs/", json=body, headers=headers) for _ in range(12))
        )
        assert {answer.status_code for answer in answers} <= {200, 409}
        assert len({answer.json()["run_id"] for answer in answers if answer.status_code == 200}) == 1
