"""Whoever was delayed under another tick rate than is in force is called, on a real PostgreSQL and Redis."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import redis.asyncio
from redis.asyncio.client import Pipeline
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from service import backstop
from service.backstop import CALL, LOOK, MOSTLY_NOBODYS
from service.control import pause_run, resume_run
from service.db import Database
from service.families import cancel_run
from service.guarded import connect_redis
from service.joins import FailurePolicy, JoinPolicy
from service.quota.limits import Limit
from service.quota.overrides import clear_override, set_override
from service.quota.revisions import activate, propose
from service.quota.tables import RateValue
from service.workspaces import create_agent, create_workspace
from tests.quotatables import BY, file_of, rate, tables
from tests.tenants import Tenant, drain, open_tenant, settle
from tests.tickhands import HOURLY, HUNG, STEP, Hands, lift, limit, one_step, throttled


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


async def control(tenant: Tenant, run_id: uuid.UUID, *verbs: Callable[..., Awaitable[object]]) -> None:
    """Do to a run what a caller asks for."""
    for verb in verbs:
        async with tenant.database.begin() as connection:
            await verb(connection, run_id, None)


@pytest.mark.parametrize("resumed", ["before the change", "after it was seen"])
async def test_a_change_of_the_rate_reaches_a_delayed_run_that_was_paused(
    tenant: Tenant, hands: Hands, resumed: str
) -> None:
    run_id = await throttled(tenant, hands)
    await control(tenant, run_id, pause_run, *([resume_run] if resumed == "before the change" else []))
    await lift(tenant)
    hands.now_s += 1.0
    await drain(hands.ticker)
    if resumed == "after it was seen":
        assert await tenant.status(run_id) == "PAUSED"
        assert (await tenant.row(run_id))["delayed_under"] is None
        await control(tenant, run_id, resume_run)
        await drain(hands.ticker)

    assert await tenant.status(run_id) == "COMPLETED"
    assert await tenant.faults() == []


async def test_a_change_of_the_rate_reaches_a_delayed_run_that_was_woken_for_its_groups_deadline(
    tenant: Tenant, hands: Hands
) -> None:
    parent = await throttled(tenant, hands)
    await tenant.spawn(
        parent, await tenant.agent(HUNG), join_policy=JoinPolicy.TIMEOUT, timeout_seconds=0.05,
        failure_policy=FailurePolicy.IGNORE_FAILURE,
    )  # fmt: skip
    await asyncio.sleep(0.06)
    await drain(hands.ticker)
    (woken,) = await tenant.rows("SELECT state FROM subrun_groups")
    assert (woken["state"], await tenant.status(parent)) == ("JOINED", "RUNNING")

    await lift(tenant)
    hands.now_s += 1.0
    await drain(hands.ticker)

    assert await tenant.status(parent) == "COMPLETED"


async def test_a_rate_that_is_lifted_calls_everybody_whoever_they_are_in_the_hands_of(
    tenant: Tenant, client: redis.asyncio.Redis
) -> None:
    workers = [Hands(tenant, client) for _ in range(3)]
    await limit(tenant, HOURLY, 1)
    run_ids = await tenant.runs(9, await one_step(tenant))
    for each in workers:
        await settle(each.ticker, await each.ticker.claim(most=3))
    await drain(workers[-1].ticker)
    late = [each["run_id"] for each in await tenant.rows("SELECT run_id FROM runs WHERE ended_at IS NULL")]
    assert len(late) == 8
    await control(tenant, late[0], pause_run, resume_run)
    await tenant.write("UPDATE runs SET next_tick_at = now() WHERE run_id = :id", id=late[1])  # as a child's end does
    await drain(workers[-1].ticker)
    await lift(tenant)

    await drain(Hands(tenant, client).ticker)  # a worker that knows nobody

    assert await tenant.statuses(*run_ids) == ["COMPLETED"] * 9
    assert await tenant.faults() == []


async def test_two_workers_that_look_at_once_call_each_run_once(tenant: Tenant, client: redis.asyncio.Redis) -> None:
    first = Hands(tenant, client)
    await limit(tenant, HOURLY, 1)
    run_ids = await tenant.runs(40, await one_step(tenant))
    await drain(first.ticker)
    await lift(tenant)

    await asyncio.gather(*(Hands(tenant, client).backstop.look() for _ in range(4)))

    first.now_s += 1.0
    await drain(first.ticker)
    assert await tenant.statuses(*run_ids) == ["COMPLETED"] * 40
    claims = await tenant.rows("SELECT epoch, count(*) FROM runs GROUP BY epoch ORDER BY epoch")
    assert [tuple(row.values()) for row in claims] == [(1, 1), (2, 39)]


async def test_who_is_delayed_is_found_in_an_index_without_reading_a_run(tenant: Tenant, hands: Hands) -> None:
    await throttled(tenant, hands)
    async with tenant.database.read() as connection:
        plan = "\n".join((await connection.execute(text(f"EXPLAIN {LOOK}"))).scalars())

    assert plan.count("Index Only Scan using runs_delayed_idx") == 2
    assert "Seq Scan" not in plan


async def test_a_new_worker_calls_those_whom_a_dead_one_delayed(tenant: Tenant, client: redis.asyncio.Redis) -> None:
    await throttled(tenant, Hands(tenant, client))
    async with tenant.database.begin() as connection:
        await clear_override(connection, tenant.workspace_id, Limit.TICK)

    await drain(Hands(tenant, client).ticker)

    assert await tenant.rows("SELECT 1 FROM runs WHERE ended_at IS NULL") == []


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


async def test_a_change_of_the_rate_reaches_those_whom_a_worker_delayed_that_is_gone(
    tenant: Tenant, client: redis.asyncio.Redis
) -> None:
    gone, staying = Hands(tenant, client), Hands(tenant, client)
    await staying.ticker.claim()
    run_id = await throttled(tenant, gone)

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


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of both stores during the test: `redis` for a round trip, and the backstop's own statements."""
    questions: list[str] = []
    send, execute = Pipeline.execute, AsyncConnection.execute

    async def sent(pipe: Pipeline, raise_on_error: bool = True) -> list[Any]:
        questions.append("redis")
        return await send(pipe, raise_on_error)

    async def executed(connection: AsyncConnection, statement: Any, *rest: Any, **options: Any) -> Any:
        names = {id(MOSTLY_NOBODYS): "lines", id(CALL): "call"}
        questions.append(names.get(id(statement), "another"))
        return await execute(connection, statement, *rest, **options)

    monkeypatch.setattr(Pipeline, "execute", sent)
    monkeypatch.setattr(AsyncConnection, "execute", executed)
    return questions


@contextlib.asynccontextmanager
async def several(tenant: Tenant, hands: Hands, redis_url: str) -> AsyncIterator[list[Tenant]]:
    """Five workspaces of whose eight runs seven are delayed by an hour or so."""
    async with contextlib.AsyncExitStack() as stack:
        tenants = [await stack.enter_async_context(open_tenant(tenant.database, redis_url)) for _ in range(5)]
        for each in tenants:
            await limit(each, HOURLY, 1)
            await each.runs(8, await one_step(each))
        await drain(hands.ticker)
        yield tenants


async def test_however_many_wait_a_look_asks_each_store_once_about_their_lines(
    tenant: Tenant, hands: Hands, redis_url: str, asked: list[str]
) -> None:
    async with several(tenant, hands, redis_url):
        asked.clear()
        hands.now_s += 1.0
        await hands.backstop.look()

    assert (asked.count("redis"), asked.count("lines"), asked.count("call")) == (1, 1, 0)


async def test_however_many_workspaces_a_change_concerns_all_are_called_at_once(
    tenant: Tenant, hands: Hands, redis_url: str, asked: list[str]
) -> None:
    async with several(tenant, hands, redis_url) as tenants:
        for each in tenants:
            await lift(each)
        asked.clear()
        hands.now_s += 1.0
        await hands.backstop.look()
        assert (asked.count("redis"), asked.count("lines"), asked.count("call")) == (1, 0, 1)

        await drain(hands.ticker)
    assert await tenant.rows("SELECT 1 FROM runs WHERE ended_at IS NULL") == []


async def test_more_runs_than_one_transaction_calls_are_all_called_and_their_line_is_forgotten_once(
    tenant: Tenant, hands: Hands, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backstop, "MOST_CALLED", 6)
    await limit(tenant, HOURLY, 1)
    run_ids = await tenant.runs(20, await one_step(tenant))
    await drain(hands.ticker)
    await lift(tenant)
    asked.clear()

    hands.now_s += 1.0
    await hands.backstop.look()

    assert (asked.count("redis"), asked.count("call")) == (1, 4)
    await drain(hands.ticker)
    assert await tenant.statuses(*run_ids) == ["COMPLETED"] * 20


async def test_a_paused_run_whose_step_is_due_is_found_by_one_look_and_by_none_after_it(
    tenant: Tenant, hands: Hands, asked: list[str]
) -> None:
    run_id = await throttled(tenant, hands)
    await tenant.write("UPDATE runs SET step_due_at = now(), next_tick_at = now() WHERE run_id = :id", id=run_id)
    await control(tenant, run_id, pause_run)
    before = await tenant.row(run_id)
    await lift(tenant)
    for _ in range(2):
        asked.clear()
        hands.now_s += 1.0
        await hands.backstop.look()
    assert "call" not in asked
    assert await tenant.row(run_id) == {**before, "delayed_under": None}

    await control(tenant, run_id, resume_run)
    await drain(hands.ticker)
    assert await tenant.status(run_id) == "COMPLETED"


async def test_who_is_called_in_vain_is_delayed_again_from_the_front(
    tenant: Tenant, client: redis.asyncio.Redis
) -> None:
    await throttled(tenant, Hands(tenant, client))
    await limit(tenant, 2 * HOURLY, 1)

    await drain(Hands(tenant, client).ticker)

    (row,) = await tenant.rows("SELECT next_tick_at - now() AS wait, epoch, delayed_under FROM runs")
    assert (round(row["wait"].total_seconds(), -2), row["epoch"], row["delayed_under"]) == (500, 3, "2:1")
