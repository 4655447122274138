"""The tick backstop on a real PostgreSQL and Redis: who is delayed, who is not, and what becomes of them."""

from __future__ import annotations

import asyncio
import datetime as dt
import itertools
import time

import pytest
import redis.asyncio
from structlog.typing import EventDict

from service.claims import BATCH
from service.control import pause_run, resume_run
from service.db import Database
from service.families import cancel_run
from service.guarded import connect_redis
from service.joins import FailurePolicy, JoinPolicy
from service.quota.revisions import propose, shadow
from service.quota.shadow import shadow_counts
from service.tallies import worker_figures
from service.tick import Ticker
from service.toolcalls import create_definition
from service.worker import Worker
from service.workspaces import create_agent, create_workspace
from tests.quotatables import BY, file_of, rate, tables
from tests.tenants import Tenant, drain, expire_leases, open_tenant, settle
from tests.tickhands import HOURLY, HUNG, STEP, Hands, limit, one_step, throttled
from tests.workers import Watched, working


async def test_of_more_turns_than_the_burst_the_others_are_delayed_and_nothing_happens_to_them(
    tenant: Tenant, hands: Hands
) -> None:
    await limit(tenant, HOURLY, 3)
    run_ids = await tenant.runs(5, await one_step(tenant))

    await drain(hands.ticker)

    assert sorted(await tenant.statuses(*run_ids)) == ["COMPLETED"] * 3 + ["PENDING"] * 2
    delayed = await tenant.rows(
        "SELECT ticks, epoch, vain_attempts, last_seq, started_at, delayed_under, next_tick_at = step_due_at AS is_due"
        " FROM runs WHERE status = 'PENDING'"
    )
    kept = {"ticks": 0, "epoch": 1, "vain_attempts": 0, "last_seq": 1, "started_at": None}
    assert [dict(row) for row in delayed] == [{**kept, "delayed_under": "1:3", "is_due": True}] * 2
    assert await tenant.rows("SELECT 1 FROM runs WHERE ended_at IS NOT NULL AND delayed_under IS NOT NULL") == []
    waits = await tenant.rows("SELECT next_tick_at - now() AS wait FROM runs WHERE ended_at IS NULL ORDER BY 1")
    assert [round(row["wait"].total_seconds(), -2) for row in waits] == [1000, 2000]
    assert await tenant.faults() == []


async def test_delayed_turns_are_counted_by_workspace(tenant: Tenant, hands: Hands) -> None:
    await limit(tenant, HOURLY, 1)
    await tenant.runs(4, await one_step(tenant))

    claims = await hands.ticker.claim()

    assert sum(claim.delay is not None for claim in claims) == 3
    assert hands.tallies.take()[f"ticks_delayed:{tenant.workspace_id}"] == 3


async def test_every_run_ends_at_the_workspaces_rate_each_turn_claimed_about_twice(
    tenant: Tenant, client: redis.asyncio.Redis
) -> None:
    per_s, burst, runs = 60.0, 6, 40
    await limit(tenant, per_s, burst)
    watched = [Watched(tenant, backstop=Hands(tenant, client).backstop) for _ in range(2)]
    for each in watched:
        assert each._backstop is not None
        each._backstop.quotas._monotonic = time.monotonic
    started_s = time.monotonic()
    run_ids = await tenant.runs(runs)  # of two turns each

    async with (
        working(Worker(tenant.database, watched[0], sweep_interval_s=0.05)),
        working(Worker(tenant.database, watched[1], sweep_interval_s=0.05)),
    ):
        await asyncio.gather(*(each.until_all_ended(tenant) for each in watched))

    assert time.monotonic() - started_s >= (2 * runs - burst) / per_s  # no faster than the rate allows
    assert await tenant.statuses(*run_ids) == ["COMPLETED"] * runs
    (sums,) = await tenant.rows("SELECT sum(ticks) AS ticks, sum(epoch) AS claims FROM runs")
    assert sums["ticks"] == 2 * runs
    assert sums["claims"] <= 2.5 * sums["ticks"]
    assert await tenant.faults() == []


async def test_two_workers_together_take_no_more_turns_than_the_burst(
    tenant: Tenant, client: redis.asyncio.Redis
) -> None:
    await limit(tenant, HOURLY, 7)
    await tenant.runs(60, await one_step(tenant))
    workers = [Hands(tenant, client).ticker for _ in range(2)]

    taken = await asyncio.gather(*(each.claim(most=10) for each in workers for _ in range(3)))

    claims = [claim for batch in taken for claim in batch]
    assert sum(claim.delay is None for claim in claims) == 7
    waits = sorted(claim.delay.by for claim in claims if claim.delay is not None)
    assert len(waits) == len(claims) - 7
    assert all(later - sooner > dt.timedelta(seconds=999) for sooner, later in itertools.pairwise(waits))


async def test_a_worker_that_dies_between_claim_and_settle_costs_its_tokens_and_no_run(
    tenant: Tenant, client: redis.asyncio.Redis
) -> None:
    await limit(tenant, HOURLY, 4)
    run_ids = await tenant.runs(2, await one_step(tenant))
    await Hands(tenant, client).ticker.claim()  # and is heard of no more
    await expire_leases(tenant)

    other = Hands(tenant, client).ticker
    await drain(other)
    third = await tenant.run(await one_step(tenant))
    await drain(other)

    assert await tenant.statuses(*run_ids, third) == ["COMPLETED", "COMPLETED", "PENDING"]
    assert await tenant.faults() == []


async def test_a_neighbour_with_many_due_runs_does_not_keep_another_workspaces_batch_waiting(
    tenant: Tenant, ticker: Ticker, redis_url: str
) -> None:
    await tenant.runs(3 * BATCH)
    async with open_tenant(tenant.database, redis_url) as quiet:
        run_ids = await quiet.runs(3)  # behind all of them

        first, second, third = [await ticker.claim() for _ in range(3)]

    assert {claim.workspace_id for claim in first} == {tenant.workspace_id}
    assert sorted(claim.run_id for claim in second) == sorted(run_ids)
    assert len(third) == BATCH


async def test_a_workspace_over_its_rate_delays_nobody_else(tenant: Tenant, hands: Hands, redis_url: str) -> None:
    await limit(tenant, HOURLY, 1)
    await tenant.runs(30)
    async with open_tenant(tenant.database, redis_url) as quiet:
        run_ids = await quiet.runs(5)
        await drain(hands.ticker)
        assert await quiet.statuses(*run_ids) == ["COMPLETED"] * 5


@pytest.mark.parametrize("policy", [JoinPolicy.TIMEOUT, JoinPolicy.QUORUM])
async def test_a_groups_deadline_is_kept_while_its_parent_is_delayed(
    tenant: Tenant, hands: Hands, policy: JoinPolicy
) -> None:
    parent = await throttled(tenant, hands)
    before = await tenant.row(parent)
    child = await tenant.spawn(
        parent, await tenant.agent(HUNG), join_policy=policy, timeout_seconds=0.05,
        failure_policy=FailurePolicy.IGNORE_FAILURE, quorum=1 if policy is JoinPolicy.QUORUM else None,
    )  # fmt: skip
    assert (await tenant.row(parent))["next_tick_at"] < before["next_tick_at"]
    await asyncio.sleep(0.06)

    await drain(hands.ticker)

    (group,) = await tenant.rows("SELECT state, decided_at - deadline_at AS late FROM subrun_groups")
    assert group["late"] < dt.timedelta(seconds=1)
    if policy is JoinPolicy.QUORUM:
        assert (group["state"], await tenant.statuses(parent, child)) == ("FAILED", ["FAILED", "CANCELED"])
    else:
        after = await tenant.row(parent)
        kept = {name: after[name] for name in ("status", "ticks", "step_due_at")}
        assert (group["state"], kept) == ("JOINED", {name: before[name] for name in kept})
    assert await tenant.faults() == []


async def test_a_run_is_joined_and_ended_without_a_token(tenant: Tenant, hands: Hands) -> None:
    parent = await tenant.run(await one_step(tenant), expected_subruns=1)
    child = await tenant.spawn(parent, await tenant.agent(HUNG))
    await drain(hands.ticker)
    assert await tenant.status(parent) == "WAITING_FOR_SUBRUN"
    await limit(tenant, HOURLY, 1)
    hands.now_s += 1.0
    await tenant.write("UPDATE runs SET step_due_at = now(), next_tick_at = now() WHERE run_id = :c", c=child)

    await drain(hands.ticker)  # the only token is the child's

    assert await tenant.statuses(parent, child) == ["COMPLETED", "COMPLETED"]


async def test_a_delayed_run_is_cancelled_at_once(tenant: Tenant, hands: Hands) -> None:
    run_id = await throttled(tenant, hands)

    async with tenant.database.begin() as connection:
        await cancel_run(connection, run_id)

    assert await tenant.status(run_id) == "CANCELED"
    assert await tenant.faults() == []


async def test_a_delayed_run_that_was_paused_goes_on_with_as_much_delay_as_it_had_left(
    tenant: Tenant, hands: Hands
) -> None:
    run_id = await throttled(tenant, hands)
    before = await tenant.row(run_id)
    for control in (pause_run, resume_run):
        async with tenant.database.begin() as connection:
            await control(connection, run_id, None)

    after = await tenant.row(run_id)

    assert after["status"] == "RUNNING"
    assert dt.timedelta() < after["step_due_at"] - before["step_due_at"] < dt.timedelta(seconds=30)
    assert after["next_tick_at"] == after["step_due_at"]
    assert after["delayed_under"] == before["delayed_under"] == "1:1"


async def test_a_turn_that_came_for_a_deadline_takes_no_step_though_it_is_due_by_then(
    tenant: Tenant, hands: Hands
) -> None:
    run_id = await throttled(tenant, hands)
    await tenant.write("UPDATE runs SET next_tick_at = now() WHERE run_id = :id", id=run_id)
    claims = await hands.ticker.claim()
    await tenant.write("UPDATE runs SET step_due_at = now() WHERE run_id = :id", id=run_id)

    await settle(hands.ticker, claims)

    row = await tenant.row(run_id)
    assert (claims[0].pays, row["status"], row["ticks"], row["delayed_under"]) == (False, "RUNNING", 1, "1:1")
    assert row["next_tick_at"] == row["step_due_at"]


async def test_without_redis_a_worker_keeps_the_rate_by_itself_and_says_so(
    tenant: Tenant, client: redis.asyncio.Redis, logged: list[EventDict]
) -> None:
    await limit(tenant, HOURLY, 3)
    run_ids = await tenant.runs(5, await one_step(tenant))
    async with connect_redis("redis://127.0.0.1:1") as away:
        hands = Hands(tenant, away)
        await drain(hands.ticker)

    assert sorted(await tenant.statuses(*run_ids)) == ["COMPLETED"] * 3 + ["PENDING"] * 2
    figures = (await worker_figures(client)).decode().splitlines()  # the tenant's announcer reaches Redis
    assert [line for line in figures if line.startswith("plimsoll_ticks_local_total")] == [
        'plimsoll_ticks_local_total{outcome="admitted"} 3',
        'plimsoll_ticks_local_total{outcome="delayed"} 2',
    ]
    assert "tick rates are checked here" in [line["event"] for line in logged]


async def test_a_delayed_turn_asks_no_model_and_runs_no_tool(tenant: Tenant, hands: Hands) -> None:
    agent_id = await tenant.agent({"kind": "TOOL_CALL", "tool": "echo", "arguments": {"say": "hello"}})
    await limit(tenant, HOURLY, 1)
    run_id = await tenant.run(agent_id)
    await settle(hands.ticker, await hands.ticker.claim())  # asks for the tool

    claims = await hands.ticker.claim()
    parted = await hands.ticker.part(claims)
    await settle(hands.ticker, claims)

    assert ([len(each) for each in parted], claims[0].delay is not None) == ([1, 0], True)
    assert (await tenant.rows("SELECT status FROM tool_calls"))[0]["status"] == "APPROVED"
    assert (await tenant.row(run_id))["ticks"] == 1


async def counted(tenant: Tenant, hands: Hands) -> dict[str, tuple[int, int, int]]:
    """Return what the shadow, revision 2, counted."""
    await hands.gate.drain()
    await hands.tally.close()
    async with tenant.database.read() as connection:
        told = (await shadow_counts(connection, [2]))[2]
    return {each.limit.value: (each.asked, each.refused, each.newly_refused) for each in told}


async def test_a_shadows_tick_rate_is_asked_about_every_turn_that_is_taken(database: Database, redis_url: str) -> None:
    async with open_tenant(database, redis_url) as tenant, connect_redis(redis_url) as client:
        async with database.begin() as connection:
            tenant.workspace_id = await create_workspace(connection, "ordinary", "default")
            tenant.agent_id = await create_agent(connection, tenant.workspace_id, "agent", [STEP])
            await propose(connection, file_of(tables(tick=rate(HOURLY, 4))), BY)
            await shadow(connection, 2, BY)
        hands = Hands(tenant, client, shadowed=True)
        await tenant.runs(10)
        await drain(hands.ticker)

        assert await tenant.rows("SELECT 1 FROM runs WHERE ended_at IS NULL") == []
        assert await counted(tenant, hands) == {"tick": (10, 6, 6)}


async def test_a_shadows_caps_on_tool_calls_are_asked_about_every_call_that_needs_approval(
    database: Database, redis_url: str
) -> None:
    async with open_tenant(database, redis_url) as tenant, connect_redis(redis_url) as client:
        async with database.begin() as connection:
            tenant.workspace_id = await create_workspace(connection, "ordinary", "default")
            await create_definition(connection, tenant.workspace_id, "guarded", "echo", "ELEVATED")
            script = [{"kind": "TOOL_CALL", "tool": "guarded", "arguments": {"say": "may I?"}}]
            tenant.agent_id = await create_agent(connection, tenant.workspace_id, "agent", script)
            await propose(connection, file_of(tables(pending_tool_calls=2)), BY)
            await shadow(connection, 2, BY)
        hands = Hands(tenant, client)
        await tenant.runs(8)
        await drain(hands.ticker)  # six find room under the active cap of six

        assert len(await tenant.rows("SELECT 1 FROM tool_calls WHERE status = 'PENDING'")) == 6
        assert await counted(tenant, hands) == {
            "pending_tool_calls": (8, 6, 4), "pending_tool_calls_per_run": (8, 0, 0),
        }  # fmt: skip
