"""The tick backstop on a real PostgreSQL and Redis: who is delayed, who is not, and what becomes of them."""

from __future__ import annotations

import asyncio
import datetime as dt
import itertools
import time
import uuid
from collections.abc import AsyncIterator

import pytest
import redis.asyncio
from sqlalchemy import text
from structlog.typing import EventDict

from service.announce import connect_redis
from service.backstop import Backstop
from service.claims import BATCH
from service.control import pause_run, resume_run
from service.db import Database
from service.families import cancel_run
from service.joins import FailurePolicy, JoinPolicy
from service.pen import BEHIND
from service.quota.gate import Gate
from service.quota.inforce import Quotas
from service.quota.limits import Limit
from service.quota.overrides import clear_override, set_override
from service.quota.rates import Rates
from service.quota.revisions import activate, propose, shadow
from service.quota.shadow import ShadowTally, shadow_counts
from service.quota.tables import RateValue
from service.quota.ticks import TickRates
from service.settings import Settings
from service.tallies import Tallies, worker_figures
from service.tick import Ticker
from service.toolcalls import create_definition
from service.worker import Worker
from service.workspaces import Agents, create_agent, create_workspace
from tests.quotatables import BY, file_of, rate, tables
from tests.tenants import Tenant, drain, expire_leases, open_tenant, settle
from tests.workers import Watched, working

STEP = {"kind": "MESSAGE"}
HUNG = {"kind": "MODEL_CALL", "latency_ms": 3_600_000}
HOURLY = 0.001
"""A rate per second that gives nothing during a test."""


class Hands:
    """What a worker has to keep the tick rates."""

    def __init__(self, tenant: Tenant, client: redis.asyncio.Redis, *, shadowed: bool = False) -> None:
        self.now_s = 0.0
        self.tallies = Tallies()
        self.tally = ShadowTally(tenant.database)
        self.gate = Gate(Rates(client), client, self.tally)
        quotas = Quotas(tenant.database, lambda: self.now_s)
        gate = self.gate if shadowed else None
        self.backstop = Backstop(
            tenant.database, quotas, TickRates(client), self.tallies, gate, monotonic=lambda: self.now_s
        )
        self.ticker = Ticker(
            tenant.database,
            tenant.announcer,
            Agents(),
            self.tallies,
            Settings.lease_s,
            backstop=self.backstop,
            shadow=self.tally,
        )


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    """A worker's client."""
    async with connect_redis(redis_url) as opened:
        yield opened


@pytest.fixture
async def hands(tenant: Tenant, client: redis.asyncio.Redis) -> Hands:
    """A worker's hands."""
    return Hands(tenant, client)


async def limit(tenant: Tenant, per_s: float, burst: int) -> None:
    """Give the tenant's workspace a tick rate of its own."""
    async with tenant.database.begin() as connection:
        await set_override(connection, tenant.workspace_id, Limit.TICK, rate(per_s, burst), BY)


async def one_step(tenant: Tenant) -> uuid.UUID:
    """Make an agent whose runs end with their first turn."""
    return await tenant.agent(STEP)


async def test_of_more_turns_than_the_burst_the_others_are_delayed_and_nothing_happens_to_them(
    tenant: Tenant, hands: Hands
) -> None:
    await limit(tenant, HOURLY, 3)
    run_ids = await tenant.runs(5, await one_step(tenant))

    await drain(hands.ticker)

    assert sorted(await tenant.statuses(*run_ids)) == ["COMPLETED"] * 3 + ["PENDING"] * 2
    delayed = await tenant.rows(
        "SELECT ticks, epoch, vain_attempts, last_seq, started_at, next_tick_at - step_due_at AS behind FROM runs"
        " WHERE status = 'PENDING'"
    )
    assert [dict(row) for row in delayed] == [
        {"ticks": 0, "epoch": 1, "vain_attempts": 0, "last_seq": 1, "started_at": None, "behind": BEHIND}
    ] * 2
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


async def throttled(tenant: Tenant, hands: Hands, *script: dict[str, object]) -> uuid.UUID:
    """Return a run that is RUNNING, whose next step is due, and delayed by an hour or so."""
    await limit(tenant, HOURLY, 1)
    run_id = await tenant.run(await tenant.agent(*(script or (STEP, STEP))))
    await drain(hands.ticker)
    assert await tenant.status(run_id) == "RUNNING"
    return run_id


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


@pytest.mark.parametrize("change", ["lifted", "faster"])
async def test_a_change_of_the_rate_reaches_those_who_are_delayed_when_a_second_has_passed(
    tenant: Tenant, client: redis.asyncio.Redis, change: str
) -> None:
    hands = Hands(tenant, client)
    await limit(tenant, HOURLY, 1)
    sleeping = await tenant.run(await tenant.agent(HUNG))
    await drain(hands.ticker)
    run_ids = await tenant.runs(20, await one_step(tenant))
    await drain(hands.ticker)
    async with tenant.database.begin() as connection:
        if change == "lifted":
            await clear_override(connection, tenant.workspace_id, Limit.TICK)
        else:
            await set_override(connection, tenant.workspace_id, Limit.TICK, rate(100_000.0, 1000), BY)
    assert await hands.ticker.claim() == []  # what was read is trusted for a second
    assert hands.ticker.rest_s() <= 1.0

    hands.now_s += 1.0
    await drain(hands.ticker)

    assert await tenant.statuses(*run_ids, sleeping) == ["COMPLETED"] * 20 + ["RUNNING"]
    assert hands.ticker.rest_s() == float("inf")


async def test_a_revision_in_force_changes_the_tick_rate(database: Database, redis_url: str) -> None:
    async with open_tenant(database, redis_url) as tenant, connect_redis(redis_url) as client:
        async with database.begin() as connection:
            tenant.workspace_id = await create_workspace(connection, "ordinary", "default")
            tenant.agent_id = await create_agent(connection, tenant.workspace_id, "agent", [STEP])
        hands = Hands(tenant, client)
        await put_in_force(database, rate(0.01, 2))
        await tenant.runs(5)
        await drain(hands.ticker)
        assert len(await tenant.rows("SELECT 1 FROM runs WHERE ended_at IS NULL")) == 3

        await put_in_force(database, rate(1000.0, 100))
        hands.now_s += 1.0
        await drain(hands.ticker)

        assert await tenant.rows("SELECT 1 FROM runs WHERE ended_at IS NULL") == []


async def put_in_force(database: Database, tick: RateValue) -> None:
    """Activate a revision with this tick rate for the class `default`."""
    async with database.begin() as connection:
        revision = await propose(connection, file_of(tables(tick=tick)), BY)
        await activate(connection, revision, BY, "a test", force=True, guardrails=())


async def test_a_new_worker_calls_those_whom_a_dead_one_delayed(tenant: Tenant, client: redis.asyncio.Redis) -> None:
    await throttled(tenant, Hands(tenant, client))
    async with tenant.database.begin() as connection:
        await clear_override(connection, tenant.workspace_id, Limit.TICK)

    await drain(Hands(tenant, client).ticker)

    assert await tenant.rows("SELECT 1 FROM runs WHERE ended_at IS NULL") == []


async def lift(tenant: Tenant) -> None:
    """Put the tenant's workspace under its class's tick rate again, which is none."""
    async with tenant.database.begin() as connection:
        await clear_override(connection, tenant.workspace_id, Limit.TICK)


async def test_a_change_of_the_rate_reaches_a_turn_that_was_told_its_delay_and_is_not_written_yet(
    tenant: Tenant, hands: Hands
) -> None:
    await limit(tenant, HOURLY, 1)
    run_ids = await tenant.runs(4, await one_step(tenant))
    claims = await hands.ticker.claim()
    await lift(tenant)
    hands.now_s += 1.0
    assert await hands.ticker.claim() == []  # sees the change, and nobody whom it could call

    await settle(hands.ticker, claims)
    hands.now_s += 1.0
    await drain(hands.ticker)

    assert await tenant.statuses(*run_ids) == ["COMPLETED"] * 4


async def test_a_change_of_the_rate_reaches_a_run_that_was_in_somebodys_hands(tenant: Tenant, hands: Hands) -> None:
    run_id = await throttled(tenant, hands)
    await lift(tenant)
    hands.now_s += 1.0
    async with tenant.database.begin() as connection:
        await connection.execute(text("SELECT 1 FROM runs FOR UPDATE"))
        await hands.ticker.claim()

    hands.now_s += 1.0
    await drain(hands.ticker)

    assert await tenant.status(run_id) == "COMPLETED"


async def test_a_change_of_the_rate_reaches_those_whom_a_worker_delayed_that_has_left(
    tenant: Tenant, client: redis.asyncio.Redis
) -> None:
    leaving, staying = Hands(tenant, client), Hands(tenant, client)
    await staying.ticker.claim()
    run_id = await throttled(tenant, leaving)

    await leaving.ticker.leave()
    await drain(staying.ticker)  # is told of them
    assert await tenant.status(run_id) == "RUNNING"
    await lift(tenant)
    staying.now_s += 1.0
    await drain(staying.ticker)

    assert await tenant.status(run_id) == "COMPLETED"


async def test_nobody_waits_behind_a_line_of_runs_that_were_cancelled(tenant: Tenant, hands: Hands) -> None:
    await limit(tenant, HOURLY, 2)
    run_ids = await tenant.runs(12, await one_step(tenant))
    claims = await hands.ticker.claim(most=10)
    await settle(hands.ticker, claims)
    async with tenant.database.begin() as connection:
        for claim in claims:
            if claim.delay is not None:
                await cancel_run(connection, claim.run_id)
    await drain(hands.ticker)  # the last two are told to come behind all of those
    waits = (
        "SELECT round(extract(epoch FROM next_tick_at - now()) / 1000)::int AS wait FROM runs WHERE ended_at IS NULL"
    )
    assert sorted(row["wait"] for row in await tenant.rows(waits)) == [9, 10]

    for _ in range(2):
        hands.now_s += 1.0
        await drain(hands.ticker)

    assert sorted(row["wait"] for row in await tenant.rows(waits)) == [1, 2]
    assert len(run_ids) == 12


async def test_who_is_called_in_vain_is_delayed_again_from_the_front(
    tenant: Tenant, client: redis.asyncio.Redis
) -> None:
    await throttled(tenant, Hands(tenant, client))

    await drain(Hands(tenant, client).ticker)

    (row,) = await tenant.rows("SELECT next_tick_at - now() AS wait, epoch FROM runs")
    assert (round(row["wait"].total_seconds(), -2), row["epoch"]) == (1000, 3)


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
