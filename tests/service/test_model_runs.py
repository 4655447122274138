"""Runs of a model's agent: it calls tools, waits for people, and holds up nobody while it thinks."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from service.joins import JoinPolicy
from service.outside import Outside
from service.settings import Settings
from service.tallies import Tallies
from service.tick import Ticker
from service.toolcalls import create_definition
from service.worker import Worker
from service.workspaces import Agents, create_agent
from tests.modelendpoint import KEY, Endpoint, Pauses, completion
from tests.tenants import Tenant, drain


@asynccontextmanager
async def ticking(tenant: Tenant, settings: Settings) -> AsyncIterator[Ticker]:
    """A worker's hands that may ask models."""
    outside = Outside(tenant.database, Settings.lease_s, settings, Pauses())
    yield Ticker(tenant.database, tenant.announcer, Agents(), Tallies(), Settings.lease_s, outside)
    await outside.close()


async def model_agent(tenant: Tenant, endpoint: Endpoint, *tools: str, **more: Any) -> uuid.UUID:
    """Make an agent that asks the endpoint."""
    async with tenant.database.begin() as connection:
        model = {"model": "tiny", "system_prompt": "be brief", "tools": list(tools)}
        return await create_agent(
            connection, tenant.workspace_id, "model", model=model, settings=endpoint.settings(), **more
        )


async def test_a_model_calls_its_tools_and_has_the_last_word(tenant: Tenant, endpoint: Endpoint) -> None:
    endpoint.answers = [
        completion(None, ("c1", "echo", '{"a":1}'), ("c2", "hammer", "{}")),
        completion("done"),
    ]
    run_id = await tenant.run(await model_agent(tenant, endpoint, "echo"))

    async with ticking(tenant, endpoint.settings()) as ticker:
        await drain(ticker)

    steps = await tenant.rows("SELECT kind, payload FROM steps WHERE run_id = :id ORDER BY step_index", id=run_id)
    assert [step["kind"] for step in steps] == [
        "MODEL_CALL",
        "TOOL_CALL",
        "OBSERVATION",
        "TOOL_CALL",
        "OBSERVATION",
        "MODEL_CALL",
        "MESSAGE",
    ]
    assert steps[0]["payload"]["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    assert (steps[2]["payload"]["model_call_id"], steps[2]["payload"]["result"]) == ("c1", {"a": 1})
    assert steps[4]["payload"]["error"] == "there is no tool 'hammer'; there are: echo"
    assert steps[6]["payload"] == {"content": "done"}
    assert [message["role"] for message in endpoint.asked[1]["messages"]] == [
        "system",
        "user",
        "assistant",
        "tool",
        "tool",
    ]
    assert await tenant.status(run_id) == "COMPLETED"
    assert await tenant.faults() == []
    stored = await tenant.rows(
        "SELECT runs::text, steps::text, events::text, agents::text FROM runs, steps, events, agents"
    )
    assert KEY not in str(stored)


async def test_a_model_that_wants_a_guarded_tool_waits_for_a_person(tenant: Tenant, endpoint: Endpoint) -> None:
    async with tenant.database.begin() as connection:
        await create_definition(connection, tenant.workspace_id, "guarded", "echo", "DANGEROUS")
    endpoint.answers = [completion(None, ("c1", "guarded", "{}"))]
    run_id = await tenant.run(await model_agent(tenant, endpoint, "guarded"))

    async with ticking(tenant, endpoint.settings()) as ticker:
        await drain(ticker)

    assert await tenant.status(run_id) == "WAITING_FOR_APPROVAL"
    assert await tenant.rows("SELECT status, model_call_id FROM tool_calls") == [
        {"status": "PENDING", "model_call_id": "c1"}
    ]


async def test_a_model_that_cannot_be_asked_fails_its_run(tenant: Tenant, endpoint: Endpoint) -> None:
    run_id = await tenant.run(await model_agent(tenant, endpoint))

    async with ticking(tenant, endpoint.settings(model_key="wrong")) as ticker:
        await drain(ticker)

    row = await tenant.row(run_id)
    assert (row["status"], row["error_summary"]) == (
        "FAILED",
        "the model's endpoint answered 401: Incorrect API key provided: [key].",
    )
    assert await tenant.faults() == []


async def test_a_model_that_never_ends_is_ended(tenant: Tenant, endpoint: Endpoint) -> None:
    endpoint.answers = [completion(None, (f"c{n}", "echo", "{}")) for n in range(9)]
    bounds = ({"max_tool_calls": 2}, {"max_steps": 5})
    run_ids = [await tenant.run(await model_agent(tenant, endpoint, "echo", **bound)) for bound in bounds]

    async with ticking(tenant, endpoint.settings()) as ticker:
        await drain(ticker)

    assert [(await tenant.row(run_id))["error_summary"] for run_id in run_ids] == [
        "max_tool_calls: the run has requested 2 of 2 tool calls",
        "max_steps: the run has taken 4 of 5 steps and is not finished",
    ]
    assert await tenant.faults() == []


async def test_a_model_that_thinks_holds_up_nobody_and_nobody_else_asks_it(tenant: Tenant, endpoint: Endpoint) -> None:
    endpoint.hold, endpoint.answers = asyncio.Event(), [completion("at last")]
    outside = Outside(tenant.database, Settings.lease_s, endpoint.settings())
    ticker = Ticker(tenant.database, tenant.announcer, Agents(), Tallies(), Settings.lease_s, outside)
    worker = Worker(tenant.database, ticker, sweep_interval_s=0.05)
    thinking = await tenant.run(await model_agent(tenant, endpoint))
    scripted = await tenant.runs(20)

    working = asyncio.create_task(worker.work())
    await until(tenant, scripted, "COMPLETED")
    (first,) = await tenant.rows("SELECT epoch, next_tick_at FROM runs WHERE run_id = :id", id=thinking)
    for _ in itertools.count():  # its lease goes on, and so nobody claims it
        (later,) = await tenant.rows("SELECT epoch, next_tick_at FROM runs WHERE run_id = :id", id=thinking)
        if later["next_tick_at"] > first["next_tick_at"]:
            break
    endpoint.hold.set()
    await until(tenant, [thinking], "COMPLETED")
    worker.stop()
    await working
    await outside.close()

    assert (first["epoch"], later["epoch"], len(endpoint.asked)) == (1, 1, 1)
    assert await tenant.faults() == []


async def test_a_model_that_thinks_does_not_hold_up_the_deadline_of_a_group(tenant: Tenant, endpoint: Endpoint) -> None:
    endpoint.hold, endpoint.answers = asyncio.Event(), [completion("for nobody"), completion("at last")]
    outside = Outside(tenant.database, 5.0, endpoint.settings())
    ticker = Ticker(tenant.database, tenant.announcer, Agents(), Tallies(), 5.0, outside)
    worker = Worker(tenant.database, ticker, sweep_interval_s=0.05)
    hung = await tenant.agent({"kind": "MODEL_CALL", "latency_ms": 3_600_000})
    thinking = await tenant.run(await model_agent(tenant, endpoint))
    working = asyncio.create_task(worker.work())
    await until_asked(endpoint, 1)
    await tenant.spawn(thinking, hung, "g", join_policy=JoinPolicy.TIMEOUT, timeout_seconds=0.3)

    await until_asked(endpoint, 2)  # once more, after the turn that decided about the group
    groups = await tenant.rows("SELECT state FROM subrun_groups WHERE run_id = :run_id", run_id=thinking)
    endpoint.hold.set()
    await until(tenant, [thinking], "COMPLETED")
    worker.stop()
    await working
    await outside.close()

    assert groups == [{"state": "JOINED"}]
    assert await tenant.faults() == []


async def until_asked(endpoint: Endpoint, times: int) -> None:
    """Return when the endpoint was asked so often; the test's own timeout bounds it."""
    for _ in itertools.count():
        if len(endpoint.asked) >= times:
            return
        await asyncio.sleep(0)


async def test_a_cancelled_run_stops_waiting_for_its_model(tenant: Tenant, endpoint: Endpoint) -> None:
    endpoint.hold = asyncio.Event()
    outside = Outside(tenant.database, 0.05, endpoint.settings())
    ticker = Ticker(tenant.database, tenant.announcer, Agents(), Tallies(), 0.05, outside)
    run_id = await tenant.run(await model_agent(tenant, endpoint))
    claims = await ticker.claim()
    waiting = asyncio.create_task(ticker.outcomes(claims))
    for _ in itertools.count():
        if endpoint.asked:
            break
        await tenant.status(run_id)
    await tenant.write("UPDATE runs SET epoch = epoch + 1 WHERE run_id = :run_id", run_id=run_id)

    outcomes = await waiting
    await ticker.settle(claims, outcomes)
    endpoint.answers = [completion("nobody listens")]
    endpoint.hold.set()
    await outside.close()

    assert outcomes[run_id].means.move is None
    assert (await tenant.status(run_id), await tenant.steps(run_id)) == ("PENDING", [])


async def until(tenant: Tenant, run_ids: list[uuid.UUID], status: str) -> None:
    """Return when all runs have the status; the test's own timeout bounds it."""
    for _ in itertools.count():
        if set(await tenant.statuses(*run_ids)) == {status}:
            return
