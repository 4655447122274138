"""Claim and settle on a real PostgreSQL: leases, fences, families, races."""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid

import pytest
from sqlalchemy.exc import DBAPIError
from structlog.typing import EventDict

from service.announce import Announcer
from service.db import Database
from service.doorbell import Doorbell
from service.due import next_due_in_s, queue
from service.errors import IllegalState
from service.families import cancel_run
from service.guarded import connect_redis
from service.settings import Settings
from service.tallies import Tallies
from service.tick import MOST_ATTEMPTS, Ticker
from service.workspaces import Agents
from tests.tenants import Tenant, drain, expire_leases, settle

FAILING = {"kind": "TOOL_CALL", "error": "out of tea"}
SLOW = {"kind": "MODEL_CALL", "latency_ms": 3_600_000}


async def test_a_default_run_takes_two_ticks_and_five_events(tenant: Tenant, ticker: Ticker) -> None:
    run_id = await tenant.run()

    turns = await drain(ticker)

    row = await tenant.row(run_id)
    assert turns == 2
    assert {name: row[name] for name in ("status", "ticks", "epoch", "step_count", "next_tick_at")} == {
        "status": "COMPLETED",
        "ticks": 2,
        "epoch": 2,
        "step_count": 2,
        "next_tick_at": None,
    }
    assert await tenant.steps(run_id) == [(1, "MODEL_CALL"), (2, "OBSERVATION")]
    assert [(seq, event_type) for seq, event_type, _ in await tenant.events(run_id)] == [
        (1, "run_created"),
        (2, "state_changed"),
        (3, "step_created"),
        (4, "step_created"),
        (5, "state_changed"),
    ]
    assert row["created_at"] <= row["started_at"] <= row["ended_at"]
    assert await tenant.faults() == []


async def test_a_claim_moves_the_run_to_the_end_of_its_lease(tenant: Tenant, ticker: Ticker) -> None:
    run_id = await tenant.run()

    claims = await ticker.claim()

    left = await tenant.rows("SELECT next_tick_at - now() AS lease FROM runs")
    assert [(c.run_id, c.parent_run_id, c.agent_id, c.epoch) for c in claims] == [(run_id, None, tenant.agent_id, 1)]
    assert dt.timedelta() < left[0]["lease"] <= dt.timedelta(seconds=Settings.lease_s)
    assert await ticker.claim() == []


async def test_a_run_whose_worker_died_is_claimed_again_when_the_lease_ends(tenant: Tenant, ticker: Ticker) -> None:
    run_id = await tenant.run()
    await ticker.claim()

    await expire_leases(tenant)

    assert [(c.run_id, c.epoch) for c in await ticker.claim()] == [(run_id, 2)]


async def test_two_workers_that_claim_at_once_share_the_runs(tenant: Tenant, ticker: Ticker) -> None:
    run_ids = await tenant.runs(100)

    taken = await asyncio.gather(*(ticker.claim(most=20) for _ in range(6)), ticker.claim())

    assert sorted(c.run_id for claims in taken for c in claims) == sorted(run_ids)


async def test_the_longest_due_run_is_claimed_first(tenant: Tenant, ticker: Ticker) -> None:
    run_ids = await tenant.runs(3)
    await tenant.write(
        "UPDATE runs SET next_tick_at = now() - interval '1 hour' WHERE run_id = :run_id", run_id=run_ids[1]
    )

    assert [c.run_id for c in await ticker.claim(most=1)] == [run_ids[1]]


async def test_a_worker_that_stalled_past_its_lease_writes_nothing(tenant: Tenant, ticker: Ticker) -> None:
    run_id = await tenant.run()
    stalled = await ticker.claim()
    await expire_leases(tenant)
    await settle(ticker, await ticker.claim())
    before = await tenant.row(run_id), await tenant.events(run_id)
    tallies = Tallies()

    await settle(Ticker(tenant.database, tenant.announcer, Agents(), tallies, Settings.lease_s), stalled)

    assert (await tenant.row(run_id), await tenant.events(run_id)) == before


@pytest.mark.usefixtures("logged")
async def test_turns_thrown_away_are_counted(tenant: Tenant, redis_url: str) -> None:
    tallies = Tallies()
    async with connect_redis("redis://127.0.0.1:1") as away:  # so that the figures stay where the test can see them
        announcer = Announcer(away, Doorbell(redis_url))
        ticker = Ticker(tenant.database, announcer, Agents(), tallies, Settings.lease_s)
        await tenant.runs(2)
        stalled = await ticker.claim(most=1)
        await expire_leases(tenant)
        claims = await ticker.claim()

        await settle(ticker, claims)
        await settle(ticker, stalled)

    amounts = tallies.take()
    assert (amounts["ticks"], amounts["ticks_fenced"], amounts["tick_write_count"]) == (2, 1, 2)


async def test_two_workers_that_hold_one_run_write_one_step(tenant: Tenant, ticker: Ticker) -> None:
    for _ in range(10):
        run_id = await tenant.run()
        first = await ticker.claim()
        await expire_leases(tenant)
        second = await ticker.claim()

        await asyncio.gather(settle(ticker, first), settle(ticker, second))

        assert await tenant.steps(run_id) == [(1, "MODEL_CALL")]
        await drain(ticker)
    assert await tenant.faults() == []


async def test_a_run_cancelled_while_it_was_claimed_stays_cancelled(tenant: Tenant, ticker: Ticker) -> None:
    run_id = await tenant.run()
    claims = await ticker.claim()
    async with tenant.database.begin() as connection:
        await cancel_run(connection, run_id)

    await settle(ticker, claims)

    assert (await tenant.status(run_id), await tenant.steps(run_id)) == ("CANCELED", [])
    assert await tenant.faults() == []


async def test_a_parent_and_its_children_in_one_batch_settle_in_one_transaction(tenant: Tenant, ticker: Ticker) -> None:
    parent = await tenant.run(expected_subruns=3)
    children = [await tenant.spawn(parent) for _ in range(3)]

    turns = await drain(ticker)

    assert turns == 2  # the children end in the batch of the parent's last step, and before it
    assert await tenant.statuses(parent, *children) == ["COMPLETED"] * 4
    joined = [payload["child_run_id"] for _, kind, payload in await tenant.events(parent) if kind == "subrun_completed"]
    assert sorted(joined) == sorted(map(str, children))
    assert await tenant.faults() == []


async def test_a_parent_waits_for_a_slow_child_and_takes_one_tick_more(tenant: Tenant, ticker: Ticker) -> None:
    parent = await tenant.run(expected_subruns=1)
    child = await tenant.spawn(parent, await tenant.agent(SLOW))
    await drain(ticker)
    assert await tenant.statuses(parent, child) == ["WAITING_FOR_SUBRUN", "RUNNING"]

    await tenant.write("UPDATE runs SET next_tick_at = now(), step_due_at = now() WHERE run_id = :child", child=child)
    turns = await drain(ticker)

    assert turns == 2  # the child's step, then the parent's join
    assert await tenant.statuses(parent, child) == ["COMPLETED", "COMPLETED"]
    assert (await tenant.row(parent))["ticks"] == 3
    assert await tenant.faults() == []


async def test_a_spurious_wake_leaves_no_trace_but_its_claim(tenant: Tenant, ticker: Ticker) -> None:
    parent = await tenant.run(expected_subruns=1)
    await drain(ticker)
    before, events = await tenant.row(parent), await tenant.events(parent)
    await tenant.write("UPDATE runs SET next_tick_at = now() WHERE run_id = :parent", parent=parent)

    await drain(ticker)

    assert await tenant.row(parent) == {**before, "epoch": before["epoch"] + 1}
    assert await tenant.events(parent) == events


async def test_a_wait_for_a_spawn_that_never_comes_ends(tenant: Tenant, ticker: Ticker) -> None:
    parent = await tenant.run(expected_subruns=2, max_wait_seconds=0.001)

    await drain(ticker)
    await expire_leases(tenant)
    await drain(ticker)

    row = await tenant.row(parent)
    assert (row["status"], row["error_summary"]) == (
        "FAILED",
        "waited 0.001 s for 2 of 2 expected subruns: 2 never spawned, 0 unfinished",
    )
    assert await tenant.faults() == []


async def test_a_failed_child_fails_its_parent_and_takes_its_siblings_with_it(tenant: Tenant, ticker: Ticker) -> None:
    slow, failing = await tenant.agent(SLOW), await tenant.agent(FAILING)
    parent = await tenant.run(slow)
    sibling = await tenant.spawn(parent, slow)
    nephew = await tenant.spawn(sibling, slow)
    await drain(ticker)
    child = await tenant.spawn(parent, failing)

    await drain(ticker)

    assert await tenant.statuses(parent, child, sibling, nephew) == ["FAILED", "FAILED", "CANCELED", "CANCELED"]
    assert [kind for _, kind, _ in (await tenant.events(parent))[-3:]] == [
        "subrun_failed",
        "subrun_cancelled",
        "state_changed",
    ]
    assert (await tenant.row(parent))["error_summary"] == (
        f"group group of {parent}: 1 of 2 subruns ended FAILED or CANCELED (WAIT_ALL, FAIL_FAST)"
    )
    assert await tenant.faults() == []


async def test_a_step_that_fails_takes_pending_subruns_with_it(tenant: Tenant, ticker: Ticker) -> None:
    parent = await tenant.run(await tenant.agent(FAILING))
    children = [await tenant.spawn(parent, await tenant.agent(SLOW)) for _ in range(2)]

    await drain(ticker)

    assert await tenant.statuses(parent, *children) == ["FAILED", "CANCELED", "CANCELED"]
    assert await tenant.steps(parent) == [(1, "SUBRUN_SPAWN"), (2, "SUBRUN_SPAWN"), (3, "TOOL_CALL")]
    assert await tenant.faults() == []


async def test_a_child_that_fails_in_its_parents_batch_is_counted_once(tenant: Tenant, ticker: Ticker) -> None:
    failing, slow = await tenant.agent(FAILING), await tenant.agent(SLOW)
    parent = await tenant.run()
    children = [await tenant.spawn(parent, failing), await tenant.spawn(parent, slow)]
    claims = await ticker.claim()
    assert len(claims) == 3

    await settle(ticker, claims)
    await drain(ticker)

    assert await tenant.statuses(parent, *children) == ["FAILED", "FAILED", "CANCELED"]
    assert await tenant.faults() == []


async def test_a_spawn_that_races_with_the_parents_end_is_joined_or_refused(tenant: Tenant, ticker: Ticker) -> None:
    accepted = refused = 0
    for round_ in range(30):
        parent = await tenant.run()
        await settle(ticker, await ticker.claim())
        last = await ticker.claim()

        async def spawn(parent: uuid.UUID = parent, pause: int = round_ % 5) -> uuid.UUID | None:
            for _ in range(pause):
                await asyncio.sleep(0)
            try:
                return await tenant.spawn(parent)
            except IllegalState:
                return None

        child, _ = await asyncio.gather(spawn(), settle(ticker, last))
        accepted, refused = accepted + (child is not None), refused + (child is None)
        assert await tenant.status(parent) == ("COMPLETED" if child is None else "WAITING_FOR_SUBRUN")
        await drain(ticker)
        assert await tenant.status(parent) == "COMPLETED"
    assert accepted + refused == 30
    assert await tenant.faults() == []


async def test_a_run_that_cannot_be_written_stops_nobody_else(
    tenant: Tenant, ticker: Ticker, logged: list[EventDict]
) -> None:
    run_ids = await tenant.runs(5)
    culprit = run_ids[2]
    await tenant.write(
        "INSERT INTO steps SELECT run_id, 1, 'PLAN', '{}', correlation_id, now() FROM runs WHERE run_id = :culprit",
        culprit=culprit,
    )

    await drain(ticker)

    assert [(line["event"], line["run_id"]) for line in logged] == [("a run cannot be advanced", str(culprit))]
    others = [run_id for run_id in run_ids if run_id != culprit]
    assert await tenant.statuses(culprit, *others) == ["PENDING", *["COMPLETED"] * 4]


@pytest.mark.usefixtures("logged")
async def test_a_run_that_cannot_be_written_is_tried_ever_more_rarely(tenant: Tenant, ticker: Ticker) -> None:
    culprit = await tenant.run()
    await tenant.write(
        "INSERT INTO steps SELECT run_id, 1, 'PLAN', '{}', correlation_id, now() FROM runs WHERE run_id = :culprit",
        culprit=culprit,
    )
    delays = []

    for _ in range(3):
        await drain(ticker)
        async with tenant.database.read() as connection:
            delays.append(await next_due_in_s(connection) or 0.0)
        await expire_leases(tenant)

    assert [round(delay / Settings.lease_s) for delay in delays] == [2, 4, 8]
    assert (await tenant.row(culprit))["vain_attempts"] == 3


@pytest.mark.usefixtures("logged")
async def test_the_last_of_many_vain_attempts_fails_the_run_with_its_family(tenant: Tenant, ticker: Ticker) -> None:
    parent = await tenant.run(await tenant.agent(SLOW))
    culprit = await tenant.spawn(parent, await tenant.agent({"kind": "PLAN"}))
    grandchild = await tenant.spawn(culprit, await tenant.agent(SLOW))
    await tenant.write(
        "INSERT INTO steps SELECT run_id, 2, 'PLAN', '{}', correlation_id, now() FROM runs WHERE run_id = :culprit",
        culprit=culprit,
    )

    for attempt in range(MOST_ATTEMPTS):
        assert await tenant.status(culprit) == "PENDING", attempt
        await drain(ticker)
        await tenant.write(
            "UPDATE runs SET next_tick_at = now() WHERE run_id = :culprit AND ended_at IS NULL", culprit=culprit
        )
    await drain(ticker)

    assert await tenant.statuses(parent, culprit, grandchild) == ["FAILED", "FAILED", "CANCELED"]
    assert (await tenant.row(culprit))["error_summary"] == (
        "could not be advanced in 8 attempts, the last one: UniqueViolationError"
    )


@pytest.mark.usefixtures("logged")
async def test_a_turn_that_succeeds_sets_the_vain_attempts_back(tenant: Tenant, ticker: Ticker) -> None:
    run_id = await tenant.run()
    claims = await ticker.claim()
    await ticker.postpone(claims[0], RuntimeError("the endpoint did not answer"))
    assert (await tenant.row(run_id))["vain_attempts"] == 1

    await expire_leases(tenant)
    await drain(ticker)

    row = await tenant.row(run_id)
    assert (row["status"], row["vain_attempts"], row["ticks"]) == ("COMPLETED", 0, 2)


@pytest.mark.usefixtures("logged")
async def test_a_worker_that_lost_its_claim_postpones_nothing(tenant: Tenant, ticker: Ticker) -> None:
    run_id = await tenant.run()
    claims = await ticker.claim()
    await expire_leases(tenant)
    await ticker.claim()
    before = await tenant.row(run_id)

    await ticker.postpone(claims[0], RuntimeError("too late"))

    assert await tenant.row(run_id) == before


async def test_an_outage_is_the_callers_to_handle(tenant: Tenant, ticker: Ticker) -> None:
    await tenant.run()
    claims = await ticker.claim()
    outcomes = await ticker.outcomes(claims)
    nowhere = Database("postgresql://postgres@127.0.0.1:1/nowhere")
    cut_off = Ticker(nowhere, tenant.announcer, Agents(), Tallies(), Settings.lease_s)

    with pytest.raises((OSError, DBAPIError)):
        await cut_off.settle(claims, outcomes)
    await nowhere.close()


async def test_a_latency_is_a_later_due_time(tenant: Tenant, ticker: Ticker) -> None:
    run_id = await tenant.run(await tenant.agent({"kind": "MODEL_CALL"}, {"kind": "OBSERVATION", "latency_ms": 60_000}))

    await drain(ticker)

    row = await tenant.row(run_id)
    assert (row["status"], row["step_count"]) == ("RUNNING", 1)
    assert row["next_tick_at"] == row["started_at"] + dt.timedelta(minutes=1)


async def test_the_queue_holds_what_is_due_and_not_what_is_claimed(tenant: Tenant, ticker: Ticker) -> None:
    async with tenant.database.read() as connection:
        assert await queue(connection) == (0, 0.0)
        assert await next_due_in_s(connection) is None
        await tenant.runs(3)
        await tenant.write("UPDATE runs SET next_tick_at = now() - interval '10 s'")

        depth, oldest_due_s = await queue(connection)
        assert (depth, int(oldest_due_s)) == (3, 10)

        await ticker.claim()
        assert await queue(connection) == (0, 0.0)
        assert 0 < (await next_due_in_s(connection) or 0.0) <= Settings.lease_s
