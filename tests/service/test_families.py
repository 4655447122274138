"""Runs and their descendants, ended together on a real PostgreSQL."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from service.errors import IllegalState, NotFound
from service.families import cancel_run
from service.ledger import Written
from service.runs import new_id
from service.tick import Ticker
from tests.tenants import Tenant

SLOW = {"kind": "MODEL_CALL", "latency_ms": 3_600_000}


async def cancel(tenant: Tenant, run_id: uuid.UUID, reason: str | None = None) -> Written:
    """Cancel in a transaction of its own."""
    async with tenant.database.begin() as connection:
        return await cancel_run(connection, run_id, reason)


async def test_a_cancelled_run_takes_its_descendants_with_it(tenant: Tenant) -> None:
    parent = await tenant.run()
    children = [await tenant.spawn(parent) for _ in range(2)]
    grandchildren = [await tenant.spawn(child) for child in children]
    stranger = await tenant.run()

    outcome = await cancel(tenant, parent, "changed my mind")

    assert await tenant.statuses(parent, *children, *grandchildren) == ["CANCELED"] * 5
    assert await tenant.status(stranger) == "PENDING"
    assert (await tenant.row(parent))["error_summary"] == "changed my mind"
    assert [(kind, payload.get("to")) for _, kind, payload in (await tenant.events(parent))[-3:]] == [
        ("subrun_cancelled", None),
        ("subrun_cancelled", None),
        ("state_changed", "CANCELED"),
    ]
    assert len(outcome.events) == 9  # each of five ends, and four are counted on a parent
    assert not outcome.due
    assert await tenant.faults() == []


async def test_what_was_cancelled_is_never_ticked(tenant: Tenant, ticker: Ticker) -> None:
    parent = await tenant.run()
    await tenant.spawn(parent)

    await cancel(tenant, parent)

    assert await ticker.claim() == []


async def test_a_cancelled_child_makes_its_parent_due_and_fails_it(tenant: Tenant, ticker: Ticker) -> None:
    parent = await tenant.run(await tenant.agent(SLOW))
    child = await tenant.spawn(parent, await tenant.agent(SLOW))
    claims = await ticker.claim()
    await ticker.settle(claims, await ticker.outcomes(claims))

    outcome = await cancel(tenant, child)
    claims = await ticker.claim()
    await ticker.settle(claims, await ticker.outcomes(claims))

    assert outcome.due
    assert [claim.run_id for claim in claims] == [parent]
    assert await tenant.statuses(parent, child) == ["FAILED", "CANCELED"]
    assert await tenant.faults() == []


async def test_a_run_that_has_ended_is_not_cancelled(tenant: Tenant) -> None:
    run_id = await tenant.run()
    await cancel(tenant, run_id)

    with pytest.raises(IllegalState, match="the run is CANCELED"):
        await cancel(tenant, run_id)


async def test_a_run_that_does_not_exist_is_not_found(tenant: Tenant) -> None:
    with pytest.raises(NotFound):
        await cancel(tenant, new_id())


async def test_a_run_cancelled_by_many_at_once_is_cancelled_once(tenant: Tenant) -> None:
    run_id = await tenant.run()
    await tenant.spawn(run_id)

    answers = await asyncio.gather(*(cancel(tenant, run_id) for _ in range(5)), return_exceptions=True)

    assert sorted(type(answer).__name__ for answer in answers) == [*["IllegalState"] * 4, "Written"]
    assert await tenant.faults() == []


async def test_a_spawn_that_races_with_a_cancel_is_cancelled_or_refused(tenant: Tenant) -> None:
    for _ in range(20):
        parent = await tenant.run()
        child = await tenant.spawn(parent)

        answers = await asyncio.gather(
            cancel(tenant, parent),
            tenant.spawn(parent),
            tenant.spawn(child),
            cancel(tenant, child),
            return_exceptions=True,
        )

        assert all(isinstance(answer, (uuid.UUID, Written, IllegalState)) for answer in answers)
    assert await tenant.rows("SELECT run_id FROM runs WHERE ended_at IS NULL") == []
    assert await tenant.faults() == []


async def test_cancels_ticks_and_spawns_at_once_leave_whole_families(tenant: Tenant, ticker: Ticker) -> None:
    async def turn() -> None:
        while claims := await ticker.claim(most=5):
            await ticker.settle(claims, await ticker.outcomes(claims))

    failing = await tenant.agent({"kind": "PLAN"}, {"kind": "TOOL_CALL", "error": "no"})
    parents = await tenant.runs(10)
    for parent in parents:
        await tenant.spawn(await tenant.spawn(parent), failing)

    answers = await asyncio.gather(
        *(turn() for _ in range(3)),
        *(cancel(tenant, parent) for parent in parents[::3]),
        *(tenant.spawn(parent, failing) for parent in parents[::2]),
        return_exceptions=True,
    )
    await turn()

    assert {type(answer) for answer in answers} <= {type(None), uuid.UUID, Written, IllegalState}
    assert await tenant.rows("SELECT run_id FROM runs WHERE ended_at IS NULL") == []
    assert await tenant.faults() == []
