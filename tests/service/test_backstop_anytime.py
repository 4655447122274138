"""The tick rate changes at any time, with Redis and without: nobody is lost, and no step is taken twice."""

from __future__ import annotations

import contextlib
import random
import uuid

import pytest
import redis.asyncio

from service.approvals import decide_tool_call
from service.auth import Caller, Role
from service.claims import Claim
from service.control import pause_run, resume_run
from service.db import Database
from service.errors import IllegalState
from service.families import cancel_run
from service.guarded import connect_redis
from service.quota import revisions
from service.quota.limits import Limit
from service.quota.overrides import clear_override
from service.toolcalls import create_definition
from service.workspaces import create_agent, create_workspace
from tests.quotatables import BY, file_of, rate, tables
from tests.tenants import Tenant, drain, open_tenant, settle
from tests.tickhands import HOURLY, STEP, Hands, limit

OPERATOR = Caller(uuid.UUID(int=7), None, Role.OPERATOR, None)
GUARDED = {"kind": "TOOL_CALL", "tool": "guarded", "arguments": {"say": "may I?"}}
MOVES = 60


class Meddler:
    """Does to a workspace whatever callers and operators may do, in an order drawn by lot, beside two workers."""

    def __init__(self, tenant: Tenant, workers: list[Hands], lot: random.Random) -> None:
        self.tenant, self.workers, self.lot = tenant, workers, lot
        self.held: list[tuple[Hands, list[Claim]]] = []  # claimed, and not settled yet

    async def move(self) -> None:
        """Do one thing."""
        one_of = self.lot.choice
        kind = one_of(("control", "control", "decide", "quota", "claim", "claim", "settle", "time"))
        if kind == "control":
            live = await self.tenant.rows("SELECT run_id FROM runs WHERE ended_at IS NULL ORDER BY run_id")
            verb = one_of((pause_run, pause_run, resume_run, resume_run, cancel_run))
            if live:
                with contextlib.suppress(IllegalState):
                    async with self.tenant.database.begin() as connection:
                        await verb(connection, one_of(live)["run_id"])
        elif kind == "decide":
            await self.decide(self.lot.random() < 0.7)
        elif kind == "quota":
            await one_of((self.override, self.override, self.forget, self.activate_two, self.roll_back))()
        elif kind == "claim":
            hands = one_of(self.workers)
            if claims := await hands.ticker.claim(self.lot.randint(1, 4)):
                self.held.append((hands, claims))
        elif kind == "settle" and self.held:
            hands, claims = self.held.pop(self.lot.randrange(len(self.held)))
            await settle(hands.ticker, claims)
        elif kind == "time":
            self.pass_a_second()

    async def decide(self, approve: bool) -> None:
        """Decide on every tool call that waits."""
        for call in await self.tenant.rows("SELECT tool_call_id FROM tool_calls WHERE status = 'PENDING'"):
            async with self.tenant.database.begin() as connection:
                await decide_tool_call(connection, OPERATOR, call["tool_call_id"], approve=approve)

    async def override(self) -> None:
        await limit(self.tenant, self.lot.choice((HOURLY, 2 * HOURLY)), self.lot.randint(1, 3))

    async def forget(self) -> None:
        async with self.tenant.database.begin() as connection:
            await clear_override(connection, self.tenant.workspace_id, Limit.TICK)

    async def activate_two(self) -> None:
        for burst in (1, 2):
            async with self.tenant.database.begin() as connection:
                revision = await revisions.propose(connection, file_of(tables(tick=rate(HOURLY, burst))), BY)
                await revisions.activate(connection, revision, BY, "a test", force=True, guardrails=())

    async def roll_back(self) -> None:
        with contextlib.suppress(IllegalState):
            async with self.tenant.database.begin() as connection:
                await revisions.rollback(connection, BY)

    def pass_a_second(self) -> None:
        for hands in self.workers:
            hands.now_s += 1.0

    async def make_way(self) -> None:
        """Lift the rate, settle what is held, resume and approve everything; each run can end now."""
        async with self.tenant.database.begin() as connection:
            lifted = await revisions.propose(connection, file_of(tables(tick=None)), BY)
            await revisions.activate(connection, lifted, BY, "a test", force=True, guardrails=())
        await self.forget()
        for hands, claims in self.held:
            await settle(hands.ticker, claims)
        for paused in await self.tenant.rows("SELECT run_id FROM runs WHERE status = 'PAUSED'"):
            async with self.tenant.database.begin() as connection:
                await resume_run(connection, paused["run_id"])
        for _ in range(3):
            await self.decide(approve=True)
            self.pass_a_second()
            for hands in self.workers:
                await drain(hands.ticker)


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_is_done_meanwhile_every_run_ends_and_no_step_is_taken_twice(
    database: Database, redis_url: str, client: redis.asyncio.Redis, seed: int
) -> None:
    lot = random.Random(seed)  # noqa: S311 - no secret
    async with open_tenant(database, redis_url) as tenant, connect_redis("redis://127.0.0.1:1") as nobody:
        async with database.begin() as connection:
            tenant.workspace_id = await create_workspace(connection, "ordinary", "default")
            await create_definition(connection, tenant.workspace_id, "guarded", "echo", "ELEVATED")
            tenant.agent_id = await create_agent(connection, tenant.workspace_id, "agent", [STEP, GUARDED, STEP])
        await limit(tenant, HOURLY, 2)
        run_ids = await tenant.runs(4)  # with the parents as many as may wait for approval at once
        parents = await tenant.runs(2, expected_subruns=1)
        children = [await tenant.spawn(parent, await tenant.agent(STEP, STEP)) for parent in parents]
        meddler = Meddler(tenant, [Hands(tenant, client), Hands(tenant, nobody)], lot)

        for _ in range(MOVES):
            await meddler.move()
        await meddler.make_way()

        assert set(await tenant.statuses(*run_ids, *children)) <= {"COMPLETED", "CANCELED"}
        assert set(await tenant.statuses(*parents)) <= {"COMPLETED", "CANCELED", "FAILED"}  # by a child's cancellation
        assert await tenant.faults() == []
        assert await tenant.rows("SELECT run_id FROM runs WHERE delayed_under IS NOT NULL") == []
