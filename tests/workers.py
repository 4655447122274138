"""Workers that a test can watch: what they do, and when they have done it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from service.backstop import Backstop
from service.claims import BATCH, Claim
from service.settings import Settings
from service.settling import Outcomes
from service.tallies import Tallies
from service.tick import Ticker
from service.worker import Worker
from service.workspaces import Agents
from tests.tenants import Tenant


class Watched(Ticker):
    """A ticker that tells when it has claimed or settled something, and whose first claims fail when told so."""

    def __init__(self, tenant: Tenant, outages: int = 0, backstop: Backstop | None = None) -> None:
        super().__init__(tenant.database, tenant.announcer, Agents(), Tallies(), Settings.lease_s, backstop=backstop)
        self.moved = asyncio.Event()
        self._outages = outages

    async def claim(self, most: int = BATCH) -> list[Claim]:
        if self._outages:
            self._outages -= 1
            raise ConnectionRefusedError("the database is starting up")
        claims = await super().claim(most)
        self.moved.set()
        return claims

    async def settle(self, claims: Sequence[Claim], outcomes: Outcomes, *, ring: bool = False) -> None:
        await super().settle(claims, outcomes, ring=ring)
        self.moved.set()

    async def until(self, tenant: Tenant, condition: str) -> None:
        """Return when some run meets the condition; the test's own timeout bounds it."""
        while True:
            self.moved.clear()
            if await tenant.rows(f"SELECT run_id FROM runs WHERE {condition}"):  # noqa: S608 - the test's own
                return
            await self.moved.wait()

    async def until_all_ended(self, tenant: Tenant) -> None:
        """Return when no run is live."""
        await self.until(tenant, "NOT EXISTS (SELECT run_id FROM runs WHERE ended_at IS NULL)")


@asynccontextmanager
async def working(worker: Worker) -> AsyncIterator[None]:
    """Let a worker work during the block, and see it end after it."""
    task = asyncio.create_task(worker.work())
    yield
    worker.stop()
    await task
