"""Where a cap is raced for: workspaces whose runs, users and tool calls ask for its places; and whether all are free.

Used by `cap_races`. After a race each pool is filled again, one place after the other: exactly the cap must fit in.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import redis.asyncio
from sqlalchemy import text

from service.announce import Announcer
from service.commits import Commits, Create, Spawn
from service.db import Database
from service.doorbell import Doorbell
from service.errors import ApiError, QuotaExceeded
from service.families import cancel_run
from service.guarded import connect_redis
from service.quota.limits import DEFAULT, LIFTED, Limit
from service.quota.socket_leases import Lease, Leases
from service.runs import StepKind
from service.tallies import Tallies
from service.tick import Ticker
from service.toolcalls import Risk, create_definition
from service.workspaces import Agents, create_agent, create_workspace
from tests.campaigns.cap_audit import ROWS
from tests.campaigns.cap_racers import CHILD, HOLD_S, NO_METADATA, Field, quota_for

SOCKETS = (Limit.WEBSOCKETS, Limit.WEBSOCKETS_PER_USER)
CALLS = (Limit.PENDING_TOOL_CALLS, Limit.PENDING_TOOL_CALLS_PER_RUN)

WORKSPACES = 4
PARENTS, USERS = 2, 2  # of each workspace
RUNS = {Limit.PENDING_TOOL_CALLS: 40, Limit.PENDING_TOOL_CALLS_PER_RUN: 24}  # of each workspace, that want tool calls
SCRIPT = 100  # tool calls of each of these runs at most


class Arena:
    """One database and one Redis in which a cap is raced for."""

    def __init__(self, database_url: str, redis_url: str, hold_s: float = HOLD_S) -> None:
        self.hold_s = hold_s
        self.database = Database(database_url, statement_timeout_s=None)
        self.redis_url = redis_url
        self.client = connect_redis(redis_url)
        self.sockets = redis.asyncio.from_url(redis_url)
        announcer = Announcer(self.client, Doorbell(redis_url))
        self.commits = Commits(self.database, announcer)
        self.ticker = Ticker(self.database, announcer, Agents(), Tallies(), 30.0)

    async def close(self) -> None:
        """Close what was opened."""
        await self.client.aclose()
        await self.sockets.aclose()
        await self.database.close()

    async def fields(self, limit: Limit) -> list[Field]:
        """Make workspaces to race in."""
        return [await self._field(limit) for _ in range(WORKSPACES)]

    async def _field(self, limit: Limit) -> Field:
        asks = {"kind": StepKind.TOOL_CALL.value, "tool": "ask", "arguments": {}}
        async with self.database.begin() as connection:
            workspace_id = await create_workspace(connection, "arena", "default")
            script: list[dict[str, Any]] = [{"kind": StepKind.OBSERVATION.value, "latency_ms": self.hold_s * 1000}]
            if limit in CALLS:
                await create_definition(connection, workspace_id, "ask", "echo", Risk.ELEVATED)
                script = [asks] * SCRIPT
            agent_id = await create_agent(connection, workspace_id, "racer", script)
        made = Field(workspace_id, agent_id, [], [uuid.uuid4() for _ in range(USERS)])
        if limit in CALLS:
            for _ in range(RUNS[limit]):
                await self.commits.submit(Create(workspace_id, agent_id, "", "", NO_METADATA, 0, 60.0, LIFTED))
        elif limit in (Limit.LIVE_RUNS, Limit.PENDING_SUBRUNS):
            for _ in range(PARENTS):
                parent = Create(workspace_id, agent_id, "", "", NO_METADATA, 1_000_000, 86_400.0, LIFTED)
                made.parents.append((await self.commits.submit(parent)).run_id)
        return made

    async def end_all(self, fields: Sequence[Field]) -> None:
        """End every run that is still live, standing ones included."""
        ids = {"ids": [field.workspace_id for field in fields]}
        live = text("SELECT run_id FROM runs WHERE workspace_id = ANY(:ids) AND ended_at IS NULL ORDER BY depth")
        async with self.database.read() as connection:
            run_ids = (await connection.execute(live, ids)).scalars().all()
        for run_id in run_ids:
            try:
                async with self.database.begin() as connection:
                    await cancel_run(connection, run_id)
            except ApiError:  # ended with its parent
                continue

    async def refill(self, limit: Limit, fields: Sequence[Field]) -> list[bool]:
        """Fill every pool again, one place after the other; tell of each whether exactly its cap fits in."""
        if limit in SOCKETS:
            return [await self._refill_sockets(limit, field) for field in fields]
        if limit in CALLS:
            return [await self._refill_calls(limit)]
        return [await self._refill_runs(limit, field) for field in fields]

    async def _refill_runs(self, limit: Limit, field: Field) -> bool:
        quota, standing, taken = quota_for(limit), len(field.parents) if limit is Limit.LIVE_RUNS else 0, 0
        try:
            for _ in range((DEFAULT.cap(limit) or 0) + 1):
                write: Create | Spawn = Create(field.workspace_id, field.agent_id, "", "", NO_METADATA, 0, 60.0, quota)
                if limit is Limit.PENDING_SUBRUNS:
                    write = Spawn(
                        field.parents[0], field.workspace_id, field.agent_id, "", NO_METADATA, None, quota, CHILD
                    )
                await self.commits.submit(write)
                taken += 1
        except QuotaExceeded:
            pass
        return taken + standing == DEFAULT.cap(limit)

    async def _refill_calls(self, limit: Limit) -> bool:
        """Let new runs of a workspace ask for calls until no turn changes anything."""
        field = await self._field(limit)
        for _ in range(3):
            while claims := await self.ticker.claim(64):
                await self.ticker.settle(claims, await self.ticker.outcomes(claims))
        async with self.database.read() as connection:
            pending = (await connection.execute(ROWS, {"ids": [field.workspace_id]})).one().pending
        most = min(RUNS[limit], DEFAULT.pending_tool_calls or 0)
        await self.end_all([field])
        return bool(pending == most)

    async def _refill_sockets(self, limit: Limit, field: Field) -> bool:
        leases, taken = Leases(self.sockets), []
        quota, user_id = quota_for(limit), field.users[0]
        for number in range((DEFAULT.cap(limit) or 0) + 1):
            mine = user_id if limit is Limit.WEBSOCKETS_PER_USER else uuid.uuid4()
            lease = Lease(f"refill:{number}", field.workspace_id, mine)
            if await leases.take(lease, quota) is None:
                taken.append(lease)
        for lease in taken:
            await leases.give_back(lease)
        return len(taken) == DEFAULT.cap(limit)
