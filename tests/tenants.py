"""A tenant for tests: runs accepted as the service accepts them, and what became of them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from sqlalchemy import text

from service.announce import Announcer
from service.changes import GroupOptions
from service.claims import Claim
from service.commits import Commits, Create, Spawn
from service.db import Database
from service.doorbell import Doorbell
from service.guarded import connect_redis
from service.quota.limits import LIFTED
from service.tick import Ticker
from service.workspaces import create_agent, create_workspace

NO_METADATA = msgspec.Raw(b"{}")


class Tenant:
    """A workspace without limits, an agent of its own, and what becomes of their runs."""

    def __init__(self, database: Database, announcer: Announcer, workspace_id: uuid.UUID, agent_id: uuid.UUID) -> None:
        self.database = database
        self.announcer = announcer
        self.workspace_id = workspace_id
        self.agent_id = agent_id
        """An agent with the default script."""
        self._commits = Commits(database, announcer)

    async def agent(self, *script: dict[str, Any]) -> uuid.UUID:
        """Make one more agent."""
        async with self.database.begin() as connection:
            return await create_agent(connection, self.workspace_id, "scripted", list(script))

    async def run(
        self, agent_id: uuid.UUID | None = None, expected_subruns: int = 0, max_wait_seconds: float = 60.0
    ) -> uuid.UUID:
        """Accept one run; it is due at once."""
        create = Create(
            self.workspace_id,
            agent_id or self.agent_id,
            "",
            "test",
            NO_METADATA,
            expected_subruns,
            max_wait_seconds,
            LIFTED,
        )
        return (await self._commits.submit(create)).run_id

    async def runs(self, count: int, agent_id: uuid.UUID | None = None, expected_subruns: int = 0) -> list[uuid.UUID]:
        """Accept several runs at once."""
        return await asyncio.gather(*(self.run(agent_id, expected_subruns) for _ in range(count)))

    async def spawn(
        self,
        parent_run_id: uuid.UUID,
        agent_id: uuid.UUID | None = None,
        group_id: str | None = None,
        **options: Any,
    ) -> uuid.UUID:
        """Accept a subrun with GroupOptions; it is due at once. Raises IllegalState when the parent has ended."""
        spawn = Spawn(
            parent_run_id,
            self.workspace_id,
            agent_id or self.agent_id,
            "",
            NO_METADATA,
            group_id or f"group of {parent_run_id}",
            LIFTED,
            GroupOptions(**options),
        )
        return (await self._commits.submit(spawn)).run_id

    async def row(self, run_id: uuid.UUID) -> Mapping[str, Any]:
        """Return a run as the database has it."""
        found = await self.rows("SELECT * FROM runs WHERE run_id = :run_id", run_id=run_id)
        return found[0]

    async def status(self, run_id: uuid.UUID) -> str:
        """Return a run's status."""
        return str((await self.row(run_id))["status"])

    async def statuses(self, *run_ids: uuid.UUID) -> list[str]:
        """Return the status of each run."""
        return [await self.status(run_id) for run_id in run_ids]

    async def events(self, run_id: uuid.UUID) -> list[tuple[int, str, dict[str, Any]]]:
        """Return (seq, event_type, payload) of every event of a run, in order."""
        found = await self.rows(
            "SELECT seq, event_type, payload FROM events WHERE run_id = :run_id ORDER BY seq", run_id=run_id
        )
        return [(row["seq"], row["event_type"], row["payload"]) for row in found]

    async def steps(self, run_id: uuid.UUID) -> list[tuple[int, str]]:
        """Return (step_index, kind) of every step of a run, in order."""
        found = await self.rows(
            "SELECT step_index, kind FROM steps WHERE run_id = :run_id ORDER BY step_index", run_id=run_id
        )
        return [(row["step_index"], row["kind"]) for row in found]

    async def rows(self, statement: str, **parameters: Any) -> list[Mapping[str, Any]]:
        """Read with a statement of the test's own."""
        async with self.database.read() as connection:
            return [dict(row) for row in (await connection.execute(text(statement), parameters)).mappings()]

    async def write(self, statement: str, **parameters: Any) -> None:
        """Write with a statement of the test's own."""
        async with self.database.begin() as connection:
            await connection.execute(text(statement), parameters)

    async def faults(self) -> list[str]:
        """Return what no run of the database may ever be: an empty list, or a sentence for each fault."""
        return [str(row["fault"]) for row in await self.rows(FAULTS)]


FAULTS = """
    SELECT 'events of ' || runs.run_id || ' have gaps' AS fault FROM runs
    LEFT JOIN events ON events.run_id = runs.run_id AND seq > runs.compacted_through_seq
    GROUP BY runs.run_id HAVING count(seq) <> runs.last_seq - runs.compacted_through_seq
        OR max(seq) <> runs.last_seq OR min(seq) <> runs.compacted_through_seq + 1
    UNION ALL
    SELECT DISTINCT 'events of ' || run_id || ' are stamped out of order'
    FROM (SELECT run_id, created_at < lag(created_at) OVER (PARTITION BY run_id ORDER BY seq) AS is_older FROM events)
    WHERE is_older
    UNION ALL
    SELECT 'steps of ' || runs.run_id || ' have gaps' FROM runs
    LEFT JOIN steps ON steps.run_id = runs.run_id
    GROUP BY runs.run_id HAVING count(step_index) <> runs.step_count OR coalesce(max(step_index), 0) <> runs.step_count
    UNION ALL
    SELECT 'a step of the script of ' || runs.run_id || ' was executed twice or passed over' FROM runs
    LEFT JOIN steps ON steps.run_id = runs.run_id AND payload ? 'script_position'
    GROUP BY runs.run_id HAVING count(step_index) <> runs.script_position
        OR count(DISTINCT payload->>'script_position') <> runs.script_position
    UNION ALL
    SELECT 'children of ' || parent.run_id || ' are miscounted' FROM runs parent
    LEFT JOIN runs child ON child.parent_run_id = parent.run_id
    GROUP BY parent.run_id
    HAVING count(child.run_id) <> parent.spawned_subruns
        OR count(child.run_id) FILTER (WHERE child.ended_at IS NULL) <> parent.pending_subruns
        OR count(child.run_id) FILTER (WHERE child.status IN ('FAILED', 'CANCELED')) <> parent.failed_subruns
    UNION ALL
    SELECT 'group ' || g.group_id || ' of ' || g.run_id || ' is miscounted' FROM subrun_groups g
    LEFT JOIN runs child ON child.parent_run_id = g.run_id AND child.group_id = g.group_id
    GROUP BY g.run_id, g.group_id
    HAVING count(child.run_id) <> g.spawned
        OR count(child.run_id) FILTER (WHERE child.ended_at IS NULL) <> g.pending
        OR count(child.run_id) FILTER (WHERE child.status IN ('FAILED', 'CANCELED')) <> g.failed
    UNION ALL
    SELECT 'the group of ' || child.run_id || ' is not known' FROM runs child
    LEFT JOIN subrun_groups g ON g.run_id = child.parent_run_id AND g.group_id = child.group_id
    WHERE child.parent_run_id IS NOT NULL AND g.group_id IS NULL
    UNION ALL
    SELECT run_id || ' has nobody who will ever wake it' FROM runs
    WHERE ended_at IS NULL AND status <> 'PAUSED' AND next_tick_at IS NULL AND pending_subruns = 0
    UNION ALL
    SELECT child.run_id || ' was settled ' || count(settled.seq) || ' times' FROM runs child
    LEFT JOIN events settled ON settled.run_id = child.parent_run_id
        AND settled.event_type IN ('subrun_completed', 'subrun_failed', 'subrun_cancelled')
        AND settled.payload->>'child_run_id' = CAST(child.run_id AS text)
    WHERE child.parent_run_id IS NOT NULL
    GROUP BY child.run_id HAVING count(settled.seq) <> CASE WHEN child.ended_at IS NULL THEN 0 ELSE 1 END
    UNION ALL
    SELECT child.run_id || ' outlived its parent' FROM runs child JOIN runs parent
        ON parent.run_id = child.parent_run_id WHERE child.ended_at IS NULL AND parent.ended_at IS NOT NULL
    UNION ALL
    SELECT 'a tool call of ' || run_id || ' is open after its end' FROM runs JOIN tool_calls USING (run_id)
    WHERE runs.ended_at IS NOT NULL AND tool_calls.ended_at IS NULL
    UNION ALL
    SELECT 'tool calls of ' || run_id || ' are miscounted' FROM runs
    WHERE tool_calls <> (SELECT count(*) FROM tool_calls t WHERE t.run_id = runs.run_id)
    UNION ALL
    SELECT 'tool call ' || t.tool_call_id || ' was told ' || count(seq) || ' times' FROM tool_calls t
    LEFT JOIN events e ON e.run_id = t.run_id AND e.payload->>'tool_call_id' = CAST(t.tool_call_id AS text)
        AND event_type IN ('tool_call_requested', 'tool_call_completed', 'tool_call_rejected')
    JOIN runs ON runs.run_id = t.run_id WHERE runs.ended_at IS NOT NULL
    GROUP BY t.tool_call_id HAVING count(seq) <> 2
    UNION ALL
    SELECT 'something happened to ' || run_id || ' after its end' FROM runs JOIN events USING (run_id)
    WHERE ended_at IS NOT NULL AND (event_type <> 'state_changed' OR payload->>'to' <> status)
        AND seq = (SELECT max(e.seq) FROM events e WHERE e.run_id = runs.run_id AND e.event_type <> 'run_archived')
"""
"""One row for each way in which the stored facts contradict each other."""


async def settle(ticker: Ticker, claims: list[Claim]) -> None:
    """Do what a worker does with claims."""
    await ticker.settle(claims, await ticker.outcomes(claims))


async def drain(ticker: Ticker) -> int:
    """Turn over until nothing is due; returns how many turns it took."""
    turns = 0
    while claims := await ticker.claim():
        await settle(ticker, claims)
        turns += 1
    return turns


async def expire_leases(tenant: Tenant) -> None:
    """Let every lease end now."""
    await tenant.write("UPDATE runs SET next_tick_at = now() - interval '1 ms' WHERE next_tick_at > now()")


@asynccontextmanager
async def open_tenant(database: Database, redis_url: str) -> AsyncIterator[Tenant]:
    """Make a workspace without limits and an agent with the default script."""
    async with database.begin() as connection:
        workspace_id = await create_workspace(connection, "tenant", "calibration")
        agent_id = await create_agent(connection, workspace_id, "default")
    client = connect_redis(redis_url)
    announcer = Announcer(client, Doorbell(redis_url))
    yield Tenant(database, announcer, workspace_id, agent_id)
    await client.aclose()
