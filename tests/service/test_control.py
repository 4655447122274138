"""Pause and resume on a real PostgreSQL."""

from __future__ import annotations

import asyncio
import uuid

import pytest
from sqlalchemy import text

from service.control import pause_run, resume_run
from service.errors import IllegalState, NotFound
from service.families import cancel_run
from service.ledger import Written
from service.runs import new_id
from service.tick import Ticker
from tests.tenants import Tenant, drain, expire_leases

SLOW = {"kind": "MODEL_CALL", "latency_ms": 3_600_000}


async def pause(tenant: Tenant, run_id: uuid.UUID, reason: str | None = None) -> Written:
    """Pause in a transaction of its own."""
    async with tenant.database.begin() as connection:
        return await pause_run(connection, run_id, reason)


async def resume(tenant: Tenant, run_id: uuid.UUID, reason: str | None = None) -> Written:
    """Resume in a transaction of its own."""
    async with tenant.database.begin() as connection:
        return await resume_run(connection, run_id, reason)


async def test_a_paused_run_is_not_claimed_and_goes_on_when_resumed(tenant: Tenant, ticker: Ticker) -> None:
    run_id = await tenant.run()
    await pause(tenant, run_id, "lunch")
    assert await ticker.claim() == []

    outcome = await resume(tenant, run_id, "back")
    await drain(ticker)

    assert outcome.due
    assert await tenant.status(run_id) == "COMPLETED"
    assert [payload for _, kind, payload in await tenant.events(run_id) if kind == "state_changed"] == [
        {"from": "PENDING", "to": "PAUSED", "reason": "lunch"},
        {"from": "PAUSED", "to": "PENDING", "reason": "back"},
        {"from": "PENDING", "to": "RUNNING"},
        {"from": "RUNNING", "to": "COMPLETED"},
    ]
    assert await tenant.faults() == []


async def test_a_pause_fences_the_worker_that_holds_the_run(tenant: Tenant, ticker: Ticker) -> None:
    run_id = await tenant.run()
    held = await ticker.claim()
    await pause(tenant, run_id)

    await ticker.settle(held, await ticker.outcomes(held))
    assert (await tenant.status(run_id), await tenant.steps(run_id)) == ("PAUSED", [])
    await resume(tenant, run_id)
    await ticker.settle(held, await ticker.outcomes(held))
    assert (await tenant.status(run_id), await tenant.steps(run_id)) == ("PENDING", [])

    await drain(ticker)
    assert await tenant.steps(run_id) == [(1, "MODEL_CALL"), (2, "OBSERVATION")]
    assert await tenant.faults() == []


async def test_a_run_paused_in_its_join_counts_its_children_and_returns_to_the_join(
    tenant: Tenant, ticker: Ticker
) -> None:
    slow = await tenant.agent(SLOW)
    parent = await tenant.run(expected_subruns=2)
    children = [await tenant.spawn(parent, slow) for _ in range(2)]
    await drain(ticker)
    await pause(tenant, parent)
    await finish(tenant, ticker, children[0])

    paused = await tenant.row(parent)
    await resume(tenant, parent)

    assert (paused["status"], paused["paused_from"], paused["pending_subruns"]) == ("PAUSED", "WAITING_FOR_SUBRUN", 1)
    assert await tenant.status(parent) == "WAITING_FOR_SUBRUN"
    assert (await tenant.row(parent))["wait_until"] > paused["wait_until"]
    await pause(tenant, parent)
    await finish(tenant, ticker, children[1])
    await resume(tenant, parent)
    await drain(ticker)
    assert await tenant.statuses(parent, *children) == ["COMPLETED"] * 3
    assert await tenant.faults() == []


async def finish(tenant: Tenant, ticker: Ticker, run_id: uuid.UUID) -> None:
    """Let a run that waits for its latency go on now."""
    await tenant.write("UPDATE runs SET next_tick_at = now(), step_due_at = now() WHERE run_id = :id", id=run_id)
    await drain(ticker)


async def test_a_child_that_fails_during_a_pause_fails_its_parent_at_the_resume(tenant: Tenant, ticker: Ticker) -> None:
    parent = await tenant.run(await tenant.agent(SLOW))
    children = [await tenant.spawn(parent, await tenant.agent(SLOW)) for _ in range(2)]
    await drain(ticker)
    await pause(tenant, parent)
    async with tenant.database.begin() as connection:
        await cancel_run(connection, children[0])
    await drain(ticker)
    assert await tenant.statuses(parent, *children) == ["PAUSED", "CANCELED", "RUNNING"]

    await resume(tenant, parent)
    await drain(ticker)

    assert await tenant.statuses(parent, *children) == ["FAILED", "CANCELED", "CANCELED"]
    assert await tenant.faults() == []


async def test_a_paused_run_ends_with_the_run_that_spawned_it(tenant: Tenant) -> None:
    parent = await tenant.run()
    child = await tenant.spawn(parent)
    await pause(tenant, child)

    async with tenant.database.begin() as connection:
        await cancel_run(connection, parent)

    assert await tenant.statuses(parent, child) == ["CANCELED", "CANCELED"]
    assert await tenant.faults() == []


async def test_what_has_ended_or_never_was_is_neither_paused_nor_resumed(tenant: Tenant, ticker: Ticker) -> None:
    run_id = await tenant.run()
    with pytest.raises(IllegalState, match="the run is PENDING: only a paused run can be resumed"):
        await resume(tenant, run_id)
    await drain(ticker)
    with pytest.raises(IllegalState, match="the run is COMPLETED: only a run that has not ended"):
        await pause(tenant, run_id)
    for control in (pause, resume):
        with pytest.raises(NotFound):
            await control(tenant, new_id())


async def test_a_pause_that_waited_for_a_turn_leaves_nothing_of_its_wait_in_the_runs_clocks(
    tenant: Tenant, ticker: Ticker
) -> None:
    run_id = await tenant.run(await tenant.agent({"kind": "PLAN"}, {"kind": "MESSAGE"}))
    async with tenant.database.begin() as connection:
        began_at = (await connection.execute(text("SELECT now()"))).scalar_one()
        await ticker.settle(held := await ticker.claim(), await ticker.outcomes(held))
        step_due_at = (await tenant.row(run_id))["step_due_at"]
        await pause_run(connection, run_id)
    assert began_at < step_due_at

    outcome = await resume(tenant, run_id)

    assert outcome.due
    assert (await tenant.row(run_id))["step_due_at"] <= outcome.created_at


async def test_events_are_stamped_in_their_order_whoever_had_to_wait(tenant: Tenant, ticker: Ticker) -> None:
    run_id = await tenant.run(await tenant.agent(SLOW))
    async with tenant.database.begin() as connection:
        await connection.execute(text("SELECT now()"))
        await drain(ticker)
        await cancel_run(connection, run_id)

    assert [kind for _, kind, _ in await tenant.events(run_id)] == ["run_created", "state_changed", "state_changed"]
    assert await tenant.faults() == []


async def test_pauses_resumes_ticks_and_cancels_at_once_lose_nothing(tenant: Tenant, ticker: Ticker) -> None:
    async def turn() -> None:
        while claims := await ticker.claim(most=5):
            await ticker.settle(claims, await ticker.outcomes(claims))

    parents = await tenant.runs(12)
    children = [await tenant.spawn(parent) for parent in parents]

    answers = await asyncio.gather(
        *(turn() for _ in range(2)),
        *(pause(tenant, run_id) for run_id in (*parents, *children)),
        *(resume(tenant, run_id) for run_id in (*parents, *children)),
        turn(),
        return_exceptions=True,
    )
    for paused in await tenant.rows("SELECT run_id FROM runs WHERE status = 'PAUSED'"):
        await resume(tenant, paused["run_id"])
    await expire_leases(tenant)
    await drain(ticker)

    assert {type(answer) for answer in answers} <= {type(None), Written, IllegalState}
    assert await tenant.rows("SELECT run_id FROM runs WHERE status <> 'COMPLETED'") == []
    assert await tenant.faults() == []
