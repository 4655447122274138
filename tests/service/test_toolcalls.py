"""Tool calls on a real PostgreSQL: requested, started once at most, observed and cancelled."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from service.control import pause_run, resume_run
from service.errors import Invalid
from service.joins import JoinPolicy
from service.outside import Outside
from service.settings import Settings
from service.tick import Ticker
from service.toolcalls import UNKNOWN_END, create_definition
from service.workspaces import create_agent
from tests.tenants import Tenant, drain, settle
from tests.toolcalls import ECHO, LAST, call_of, cancel, observation, until_started


async def test_a_safe_tool_is_called_and_observed_without_anybody(tenant: Tenant, ticker: Ticker) -> None:
    run_id = await tenant.run(await tenant.agent(ECHO, LAST))

    await drain(ticker)

    call = await call_of(tenant, run_id)
    told = {"tool_call_id": str(call["tool_call_id"]), "tool": "echo", "risk": "SAFE"}
    assert (call["status"], call["result"], call["error"]) == ("COMPLETED", {"say": "hello"}, None)
    assert await tenant.steps(run_id) == [(1, "TOOL_CALL"), (2, "OBSERVATION"), (3, "MESSAGE")]
    assert await observation(tenant, run_id) == {**told, "status": "COMPLETED", "result": {"say": "hello"}}
    assert [(kind, payload) for _, kind, payload in await tenant.events(run_id) if kind.startswith("tool")] == [
        (
            "tool_call_requested",
            {**told, "arguments": {"say": "hello"}, "needs_approval": False, "step_index": 1},
        ),
        ("tool_call_completed", {**told, "status": "COMPLETED"}),
    ]
    assert await tenant.status(run_id) == "COMPLETED"
    assert await tenant.faults() == []


async def test_a_tool_call_without_a_tool_is_a_plain_step(tenant: Tenant, ticker: Ticker) -> None:
    run_id = await tenant.run(await tenant.agent({"kind": "TOOL_CALL"}))

    await drain(ticker)

    assert await tenant.steps(run_id) == [(1, "TOOL_CALL")]
    assert await tenant.rows("SELECT * FROM tool_calls") == []


async def test_a_tool_that_fails_is_observed_and_the_run_goes_on(tenant: Tenant, ticker: Ticker) -> None:
    fail = {"kind": "TOOL_CALL", "tool": "fail", "arguments": {"message": "out of tea"}}
    run_id = await tenant.run(await tenant.agent(fail, LAST))

    await drain(ticker)

    seen = await observation(tenant, run_id)
    assert (seen["status"], seen["error"]) == ("FAILED", "out of tea")
    assert await tenant.status(run_id) == "COMPLETED"


async def test_a_tool_that_takes_too_long_is_stopped(tenant: Tenant, ticker: Ticker) -> None:
    async with tenant.database.begin() as connection:
        await create_definition(connection, tenant.workspace_id, "nap", "sleep", "SAFE", timeout_seconds=0.01)
    agent_id = await tenant.agent({"kind": "TOOL_CALL", "tool": "nap", "arguments": {"seconds": 3600}})
    run_id = await tenant.run(agent_id)

    await drain(ticker)

    assert (await observation(tenant, run_id))["error"] == "timed out after 0.01 s"
    assert await tenant.status(run_id) == "COMPLETED"


async def test_a_started_call_whose_worker_died_is_failed_and_not_started_again(tenant: Tenant, ticker: Ticker) -> None:
    run_id = await tenant.run(await tenant.agent(ECHO, LAST))
    await settle(ticker, await ticker.claim())
    await ticker.claim()
    # As a worker that died after the start leaves it.
    await tenant.write(
        "UPDATE tool_calls SET status = 'RUNNING', started_at = now(), epoch = 2, lease_until = now() - interval '1 s'"
    )
    await tenant.write("UPDATE runs SET next_tick_at = now() WHERE next_tick_at IS NOT NULL")

    await drain(ticker)

    call, seen = await call_of(tenant, run_id), await observation(tenant, run_id)
    assert (call["status"], call["error"], call["epoch"]) == ("FAILED", UNKNOWN_END, 2)
    assert (seen["status"], seen["error"]) == ("FAILED", UNKNOWN_END)
    assert await tenant.status(run_id) == "COMPLETED"
    assert await tenant.faults() == []


async def test_a_call_that_another_worker_is_executing_is_left_to_it(tenant: Tenant, ticker: Ticker) -> None:
    run_id = await tenant.run(await tenant.agent(ECHO, LAST))
    await settle(ticker, await ticker.claim())
    await tenant.write(
        "UPDATE tool_calls SET status = 'RUNNING', started_at = now(), epoch = 2, lease_until = now() + interval '60 s'"
    )

    await settle(ticker, await ticker.claim())

    row, call = await tenant.row(run_id), await call_of(tenant, run_id)
    assert (call["status"], row["ticks"], row["next_tick_at"]) == ("RUNNING", 1, call["lease_until"])


async def test_of_two_workers_that_hold_one_run_one_starts_its_tool(tenant: Tenant, ticker: Ticker) -> None:
    for _ in range(10):
        run_id = await tenant.run(await tenant.agent(ECHO))
        await settle(ticker, await ticker.claim())
        first = await ticker.claim()
        await tenant.write("UPDATE runs SET next_tick_at = now() WHERE next_tick_at IS NOT NULL")
        second = await ticker.claim()

        await asyncio.gather(settle(ticker, first), settle(ticker, second))

        call = await call_of(tenant, run_id)
        assert (call["status"], call["epoch"]) == ("COMPLETED", second[0].epoch)
        await drain(ticker)
    assert await tenant.faults() == []


async def test_a_cancelled_runs_tool_is_stopped_and_its_end_is_not_recorded(tenant: Tenant, ticker: Ticker) -> None:
    outside = Outside(tenant.database, lease_s=0.05)
    run_id = await tenant.run(await tenant.agent({"kind": "TOOL_CALL", "tool": "sleep", "arguments": {"seconds": 20}}))
    await settle(ticker, await ticker.claim())
    (claim,) = await ticker.claim()
    running = asyncio.create_task(outside.run_tool(claim.run_id, claim.epoch))
    await until_started(tenant, run_id)

    await cancel(tenant, run_id)
    await running  # returns long before the tool would have

    call = await call_of(tenant, run_id)
    assert (call["status"], call["error"]) == ("CANCELED", "its run ended while the tool was running")
    assert await tenant.faults() == []


async def test_the_lease_of_a_running_tool_is_renewed(tenant: Tenant, ticker: Ticker) -> None:
    outside = Outside(tenant.database, lease_s=Settings.lease_s)
    run_id = await tenant.run(await tenant.agent({"kind": "TOOL_CALL", "tool": "sleep", "arguments": {"seconds": 20}}))
    await settle(ticker, await ticker.claim())
    (claim,) = await ticker.claim()
    running = asyncio.create_task(outside.run_tool(claim.run_id, claim.epoch))
    await until_started(tenant, run_id)
    first, row = await call_of(tenant, run_id), await tenant.row(run_id)

    renewed = first
    for _ in itertools.count():
        renewed = await call_of(tenant, run_id)
        if renewed["lease_until"] != first["lease_until"]:
            break

    assert renewed["lease_until"] > first["lease_until"]
    assert (await tenant.row(run_id))["next_tick_at"] != row["next_tick_at"]
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    stopped = await call_of(tenant, run_id)
    assert (stopped["status"], stopped["error"]) == (
        "FAILED",
        "interrupted: the worker was stopped while the tool was running",
    )


async def test_a_running_tool_does_not_hold_up_the_deadline_of_a_group(tenant: Tenant, ticker: Ticker) -> None:
    outside = Outside(tenant.database, lease_s=Settings.lease_s)
    run_id = await tenant.run(await tenant.agent({"kind": "TOOL_CALL", "tool": "sleep", "arguments": {"seconds": 20}}))
    await settle(ticker, await ticker.claim())
    (claim,) = await ticker.claim()
    running = asyncio.create_task(outside.run_tool(claim.run_id, claim.epoch))
    await until_started(tenant, run_id)
    hung = await tenant.agent({"kind": "MODEL_CALL", "latency_ms": 3_600_000})
    await tenant.spawn(run_id, hung, "g", join_policy=JoinPolicy.TIMEOUT, timeout_seconds=0.1)

    for _ in itertools.count():
        await drain(ticker)
        (group,) = await tenant.rows("SELECT state FROM subrun_groups WHERE run_id = :run_id", run_id=run_id)
        if group["state"] == "JOINED":
            break

    assert (await call_of(tenant, run_id))["status"] == "RUNNING"
    assert await tenant.status(run_id) == "RUNNING"
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await outside.close()


async def test_a_run_ends_at_its_bounds(tenant: Tenant, ticker: Ticker) -> None:
    script = [ECHO, ECHO, LAST]
    async with tenant.database.begin() as connection:
        few_steps = await create_agent(connection, tenant.workspace_id, "a", script, max_steps=3)
        few_calls = await create_agent(connection, tenant.workspace_id, "b", script, max_tool_calls=1)
    first, second = await tenant.run(few_steps), await tenant.run(few_calls)

    await drain(ticker)

    assert [(row["status"], row["error_summary"]) for row in (await tenant.row(first), await tenant.row(second))] == [
        ("FAILED", "max_steps: the run has taken 2 of 3 steps and is not finished"),
        ("FAILED", "max_tool_calls: the run has requested 1 of 1 tool calls"),
    ]
    assert await tenant.faults() == []


@pytest.mark.parametrize(
    ("step", "field"),
    [
        ({"kind": "TOOL_CALL", "tool": "hammer"}, "script[0].tool"),
        ({"kind": "PLAN", "tool": "echo"}, "script[0].tool"),
        ({"kind": "TOOL_CALL", "tool": "sleep", "arguments": {"seconds": "long"}}, "script[0].arguments"),
        ({"kind": "TOOL_CALL", "tool": "sleep"}, "script[0].arguments"),
        ({"kind": "TOOL_CALL", "arguments": {"a": 1}}, "script[0].arguments"),
        ({"kind": "TOOL_CALL", "tool": "echo", "arguments": {"a": "\x00"}}, "script[0].arguments"),
    ],
)
async def test_a_script_that_calls_what_cannot_be_called_is_refused(
    tenant: Tenant, step: dict[str, Any], field: str
) -> None:
    with pytest.raises(Invalid) as refused:
        await tenant.agent(step)
    assert refused.value.extensions["field"] == field


async def test_a_tool_that_was_started_before_a_pause_goes_on_and_is_observed_after_the_resume(
    tenant: Tenant, ticker: Ticker
) -> None:
    outside = Outside(tenant.database, lease_s=0.05)
    run_id = await tenant.run(await tenant.agent({"kind": "TOOL_CALL", "tool": "sleep", "arguments": {"seconds": 0.3}}))
    await settle(ticker, await ticker.claim())
    (claim,) = await ticker.claim()
    running = asyncio.create_task(outside.run_tool(claim.run_id, claim.epoch))
    await until_started(tenant, run_id)
    async with tenant.database.begin() as connection:
        await pause_run(connection, run_id)

    await running

    assert (await tenant.status(run_id), (await call_of(tenant, run_id))["status"]) == ("PAUSED", "COMPLETED")
    async with tenant.database.begin() as connection:
        await resume_run(connection, run_id)
    await drain(ticker)
    assert (await observation(tenant, run_id))["result"] == {"slept_s": 0.3}
    assert await tenant.status(run_id) == "COMPLETED"
    assert await tenant.faults() == []
