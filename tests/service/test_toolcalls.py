"""Tool calls on a real PostgreSQL: requested, decided, started once at most, observed; capped and cancelled."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from typing import Any

import pytest

from service.approvals import decide_tool_call
from service.auth import Caller, Role
from service.control import pause_run, resume_run
from service.errors import IllegalState, Invalid
from service.families import cancel_run
from service.joins import JoinPolicy
from service.ledger import Written
from service.outside import Outside
from service.quota.limits import DEFAULT
from service.settings import Settings
from service.tallies import Tallies
from service.tick import Ticker
from service.toolcalls import UNKNOWN_END, create_definition
from service.workspaces import Agents, create_agent
from tests.tenants import Tenant, drain, settle

ECHO: dict[str, Any] = {"kind": "TOOL_CALL", "tool": "echo", "arguments": {"say": "hello"}}
GUARDED: dict[str, Any] = {"kind": "TOOL_CALL", "tool": "guarded", "arguments": {"say": "may I?"}}
LAST: dict[str, Any] = {"kind": "MESSAGE"}
OPERATOR = Caller(uuid.UUID(int=7), None, Role.OPERATOR, None)


@pytest.fixture
async def guarded(tenant: Tenant) -> uuid.UUID:
    """An agent whose first step calls a tool that needs an operator's approval."""
    async with tenant.database.begin() as connection:
        await create_definition(connection, tenant.workspace_id, "guarded", "echo", "ELEVATED")
    return await tenant.agent(GUARDED, LAST)


async def decide(tenant: Tenant, call: dict[str, Any], *, approve: bool, reason: str | None = None) -> Written:
    """Approve or reject in a transaction."""
    async with tenant.database.begin() as connection:
        return await decide_tool_call(connection, OPERATOR, call["tool_call_id"], approve=approve, reason=reason)


async def cancel(tenant: Tenant, run_id: uuid.UUID) -> None:
    """Cancel a run in a transaction."""
    async with tenant.database.begin() as connection:
        await cancel_run(connection, run_id)


async def call_of(tenant: Tenant, run_id: uuid.UUID) -> dict[str, Any]:
    """Return the run's only tool call."""
    (call,) = await tenant.rows("SELECT * FROM tool_calls WHERE run_id = :run_id", run_id=run_id)
    return dict(call)


async def until_started(tenant: Tenant, run_id: uuid.UUID) -> None:
    """Return when the run's tool was started; the test's own timeout bounds it."""
    for _ in itertools.count():
        if (await call_of(tenant, run_id))["status"] == "RUNNING":
            return


async def observation(tenant: Tenant, run_id: uuid.UUID) -> dict[str, Any]:
    """Return the payload of the run's only OBSERVATION."""
    (step,) = await tenant.rows(
        "SELECT payload FROM steps WHERE run_id = :run_id AND kind = 'OBSERVATION'", run_id=run_id
    )
    payload: dict[str, Any] = step["payload"]
    return payload


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


async def test_an_elevated_call_waits_for_a_person_and_is_executed_after_the_approval(
    tenant: Tenant, ticker: Ticker, guarded: uuid.UUID
) -> None:
    run_id = await tenant.run(guarded)
    await drain(ticker)
    row, call = await tenant.row(run_id), await call_of(tenant, run_id)
    assert (row["status"], row["next_tick_at"], call["status"]) == ("WAITING_FOR_APPROVAL", None, "PENDING")

    written = await decide(tenant, call, approve=True, reason="go ahead")

    assert written.due
    approved = await call_of(tenant, run_id)
    assert (approved["status"], approved["decided_by"], approved["reason"]) == (
        "APPROVED",
        OPERATOR.token_id,
        "go ahead",
    )
    assert approved["started_at"] is None, "the decision executes nothing"
    assert await tenant.status(run_id) == "RUNNING"
    await drain(ticker)
    assert (await call_of(tenant, run_id))["status"] == "COMPLETED"
    assert await tenant.status(run_id) == "COMPLETED"
    assert await tenant.faults() == []


async def test_a_rejected_call_is_never_executed_and_the_run_goes_on(
    tenant: Tenant, ticker: Ticker, guarded: uuid.UUID
) -> None:
    run_id = await tenant.run(guarded)
    await drain(ticker)

    await decide(tenant, await call_of(tenant, run_id), approve=False, reason="not today")
    await drain(ticker)

    call, seen = await call_of(tenant, run_id), await observation(tenant, run_id)
    assert (call["status"], call["started_at"]) == ("REJECTED", None)
    assert (seen["status"], seen["reason"], "result" in seen) == ("REJECTED", "not today", False)
    assert await tenant.status(run_id) == "COMPLETED"
    assert await tenant.faults() == []


async def test_of_two_people_who_decide_at_once_the_first_counts(
    tenant: Tenant, ticker: Ticker, guarded: uuid.UUID
) -> None:
    for _ in range(10):
        run_id = await tenant.run(guarded)
        await drain(ticker)
        call = await call_of(tenant, run_id)

        decisions = await asyncio.gather(
            decide(tenant, call, approve=True), decide(tenant, call, approve=False), return_exceptions=True
        )

        assert sorted(type(each).__name__ for each in decisions) == ["IllegalState", "Written"]
        kinds = [kind for _, kind, _ in await tenant.events(run_id)]
        assert kinds.count("tool_call_approved") + kinds.count("tool_call_rejected") == 1
        await drain(ticker)
        assert await tenant.status(run_id) == "COMPLETED"
    assert await tenant.faults() == []


async def test_an_approval_that_races_with_a_cancel_never_leaves_an_open_call(
    tenant: Tenant, ticker: Ticker, guarded: uuid.UUID
) -> None:
    for _ in range(10):
        run_id = await tenant.run(guarded)
        await drain(ticker)
        call = await call_of(tenant, run_id)

        await asyncio.gather(decide(tenant, call, approve=True), cancel(tenant, run_id), return_exceptions=True)
        await drain(ticker)

        assert (await tenant.status(run_id), (await call_of(tenant, run_id))["status"]) == ("CANCELED", "CANCELED")
        assert (await call_of(tenant, run_id))["started_at"] is None
    assert await tenant.faults() == []


async def test_a_cancelled_runs_pending_call_is_cancelled_with_it_and_cannot_be_approved(
    tenant: Tenant, ticker: Ticker, guarded: uuid.UUID
) -> None:
    parent = await tenant.run(expected_subruns=1)
    child = await tenant.spawn(parent, guarded)
    await drain(ticker)
    call = await call_of(tenant, child)
    assert call["status"] == "PENDING"

    await cancel(tenant, parent)

    assert (await call_of(tenant, child))["status"] == "CANCELED"
    with pytest.raises(IllegalState):
        await decide(tenant, call, approve=True)
    assert await tenant.faults() == []


async def test_a_failed_runs_pending_call_is_never_executed(tenant: Tenant, ticker: Ticker, guarded: uuid.UUID) -> None:
    parent = await tenant.run(guarded)
    await drain(ticker)
    await tenant.spawn(parent, await tenant.agent({"kind": "PLAN", "error": "no plan"}))

    await drain(ticker)

    assert (await tenant.status(parent), (await call_of(tenant, parent))["status"]) == ("FAILED", "CANCELED")
    assert await tenant.faults() == []


async def test_a_call_approved_while_its_run_is_paused_is_executed_after_the_resume(
    tenant: Tenant, ticker: Ticker, guarded: uuid.UUID
) -> None:
    run_id = await tenant.run(guarded)
    await drain(ticker)
    async with tenant.database.begin() as connection:
        await pause_run(connection, run_id)

    await decide(tenant, await call_of(tenant, run_id), approve=True)
    await drain(ticker)
    assert (await tenant.status(run_id), (await call_of(tenant, run_id))["status"]) == ("PAUSED", "APPROVED")

    async with tenant.database.begin() as connection:
        await resume_run(connection, run_id)
    assert await tenant.status(run_id) == "WAITING_FOR_APPROVAL"
    await drain(ticker)
    assert (await tenant.status(run_id), (await call_of(tenant, run_id))["status"]) == ("COMPLETED", "COMPLETED")
    assert await tenant.faults() == []


async def test_a_resume_does_not_bypass_an_approval(tenant: Tenant, ticker: Ticker, guarded: uuid.UUID) -> None:
    run_id = await tenant.run(guarded)
    await drain(ticker)
    async with tenant.database.begin() as connection:
        await pause_run(connection, run_id)
    async with tenant.database.begin() as connection:
        await resume_run(connection, run_id)

    await drain(ticker)

    assert (await tenant.status(run_id), (await call_of(tenant, run_id))["status"]) == (
        "WAITING_FOR_APPROVAL",
        "PENDING",
    )


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


async def test_a_call_over_the_cap_is_delayed_and_never_lost(
    tenant: Tenant, ticker: Ticker, guarded: uuid.UUID
) -> None:
    await tenant.write("UPDATE workspaces SET quota_class = 'default'")
    most = DEFAULT.pending_tool_calls or 0
    run_ids = await tenant.runs(most + 3, guarded)
    await drain(ticker)
    statuses = await tenant.statuses(*run_ids)
    assert (statuses.count("WAITING_FOR_APPROVAL"), statuses.count("PENDING")) == (most, 3)
    assert {
        row["due"] for row in await tenant.rows("SELECT next_tick_at > now() AS due FROM runs WHERE ticks = 0")
    } == {True}

    for _ in range(2):
        for call in await tenant.rows("SELECT * FROM tool_calls WHERE status = 'PENDING'"):
            await decide(tenant, dict(call), approve=True)
        await tenant.write("UPDATE runs SET next_tick_at = now(), step_due_at = now() WHERE ticks = 0")
        await drain(ticker)

    assert set(await tenant.statuses(*run_ids)) == {"COMPLETED"}
    assert await tenant.faults() == []


async def test_the_cap_holds_when_many_workers_request_at_once(tenant: Tenant, guarded: uuid.UUID) -> None:
    await tenant.write("UPDATE workspaces SET quota_class = 'default'")
    await tenant.runs(24, guarded)
    tickers = [Ticker(tenant.database, tenant.announcer, Agents(), Tallies(), Settings.lease_s) for _ in range(4)]
    claims = [await ticker.claim(most=6) for ticker in tickers]

    await asyncio.gather(*(settle(ticker, its) for ticker, its in zip(tickers, claims, strict=True)))

    (found,) = await tenant.rows("SELECT count(*) AS pending FROM tool_calls WHERE status = 'PENDING'")
    assert found["pending"] == DEFAULT.pending_tool_calls


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
