"""Tool calls that wait for a person on a real PostgreSQL: decided once, never bypassed, and capped."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from service.control import pause_run, resume_run
from service.errors import IllegalState
from service.quota.limits import DEFAULT
from service.settings import Settings
from service.tallies import Tallies
from service.tick import Ticker
from service.workspaces import Agents
from tests.tenants import Tenant, drain, settle
from tests.toolcalls import OPERATOR, call_of, cancel, decide, observation


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
