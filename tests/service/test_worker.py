"""The worker's loop: what wakes it, what it does about an outage, how it ends."""

from __future__ import annotations

import asyncio

import pytest
from structlog.typing import EventDict

from service.worker import Worker
from tests.tenants import Tenant
from tests.workers import Watched, working

NEVER_S = 3600.0
"""A sweep that does not come during a test."""


@pytest.fixture
def ticker(tenant: Tenant) -> Watched:
    """A ticker that can be watched."""
    return Watched(tenant)


async def test_what_is_due_at_the_start_is_turned_over_until_nothing_is_left(tenant: Tenant, ticker: Watched) -> None:
    await tenant.runs(300)

    async with working(Worker(tenant.database, ticker, NEVER_S)):
        await ticker.until_all_ended(tenant)

    assert await tenant.faults() == []


async def test_a_ring_wakes_it(tenant: Tenant, ticker: Watched) -> None:
    worker = Worker(tenant.database, ticker, NEVER_S)
    async with working(worker):
        await tenant.run()
        worker.ring()
        await ticker.until_all_ended(tenant)


async def test_without_a_ring_the_sweep_wakes_it(tenant: Tenant, ticker: Watched) -> None:
    async with working(Worker(tenant.database, ticker, sweep_interval_s=0.05)):
        await tenant.run()
        await ticker.until_all_ended(tenant)


async def test_while_nobody_can_ring_it_looks_more_often_than_it_sweeps(tenant: Tenant, ticker: Watched) -> None:
    async with working(Worker(tenant.database, ticker, NEVER_S, is_unheard=lambda: True)):
        await tenant.run()
        await ticker.until_all_ended(tenant)


async def test_a_latency_ends_the_rest_without_a_ring_and_before_the_sweep(tenant: Tenant, ticker: Watched) -> None:
    agent = await tenant.agent({"kind": "PLAN", "latency_ms": 30}, {"kind": "MESSAGE", "latency_ms": 30})
    run_id = await tenant.run(agent)

    async with working(Worker(tenant.database, ticker, NEVER_S)):
        await ticker.until_all_ended(tenant)

    row = await tenant.row(run_id)
    assert (row["ended_at"] - row["created_at"]).total_seconds() >= 0.06
    assert (row["ticks"], row["step_count"]) == (3, 2)


async def test_a_join_timeout_comes_without_a_ring_and_before_the_sweep(tenant: Tenant, ticker: Watched) -> None:
    run_id = await tenant.run(expected_subruns=1, max_wait_seconds=0.05)

    async with working(Worker(tenant.database, ticker, NEVER_S)):
        await ticker.until_all_ended(tenant)

    assert await tenant.status(run_id) == "FAILED"


async def test_an_outage_is_waited_out(tenant: Tenant, logged: list[EventDict]) -> None:
    ticker = Watched(tenant, outages=2)
    await tenant.run()

    async with working(Worker(tenant.database, ticker, NEVER_S)):
        await ticker.until_all_ended(tenant)

    assert [(line["log_level"], line["fault"]) for line in logged] == [("warning", "the database is starting up")] * 2


async def test_a_worker_told_to_stop_settles_what_it_holds_and_claims_nothing_more(
    tenant: Tenant, ticker: Watched
) -> None:
    await tenant.runs(50)
    worker = Worker(tenant.database, ticker, NEVER_S)
    task = asyncio.create_task(worker.work())
    await ticker.until(tenant, "epoch > 0")

    worker.stop()
    await task

    held = await tenant.rows("SELECT run_id FROM runs WHERE epoch > 0 AND ended_at IS NULL AND ticks < epoch")
    assert held == []
    assert await tenant.faults() == []
