"""What a worker has to keep the tick rates, without the worker; and workspaces that are over theirs."""

from __future__ import annotations

import uuid

import redis.asyncio

from service.backstop import Backstop
from service.quota.gate import Gate
from service.quota.inforce import Quotas
from service.quota.limits import Limit
from service.quota.overrides import clear_override, set_override
from service.quota.rates import Rates
from service.quota.shadow import ShadowTally
from service.quota.ticks import TickRates
from service.settings import Settings
from service.tallies import Tallies
from service.tick import Ticker
from service.workspaces import Agents
from tests.quotatables import BY, rate
from tests.tenants import Tenant, drain

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


async def limit(tenant: Tenant, per_s: float, burst: int) -> None:
    """Give the tenant's workspace a tick rate of its own."""
    async with tenant.database.begin() as connection:
        await set_override(connection, tenant.workspace_id, Limit.TICK, rate(per_s, burst), BY)


async def one_step(tenant: Tenant) -> uuid.UUID:
    """Make an agent whose runs end with their first turn."""
    return await tenant.agent(STEP)


async def lift(tenant: Tenant) -> None:
    """Put the tenant's workspace under its class's tick rate again, which is none."""
    async with tenant.database.begin() as connection:
        await clear_override(connection, tenant.workspace_id, Limit.TICK)


async def throttled(tenant: Tenant, hands: Hands, *script: dict[str, object]) -> uuid.UUID:
    """Return a run that is RUNNING, whose next step is due, and delayed by an hour or so."""
    await limit(tenant, HOURLY, 1)
    run_id = await tenant.run(await tenant.agent(*(script or (STEP, STEP))))
    await drain(hands.ticker)
    assert await tenant.status(run_id) == "RUNNING"
    return run_id
