"""A tenant on a real database, and factories for what it owns."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest
from sqlalchemy import text

from service.db import Database, rows
from service.events import APPEND_EVENTS, EventType, NewEvent
from service.runs import StepKind, new_id
from service.workspaces import create_agent, create_workspace


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A migrated database of the test's own."""
    opened = Database(database_url)
    yield opened
    await opened.close()


class Tenant:
    """A workspace with an agent, and the ways in which runs of it come to be."""

    def __init__(self, database: Database, workspace_id: uuid.UUID, agent_id: uuid.UUID) -> None:
        self.database = database
        self.workspace_id = workspace_id
        self.agent_id = agent_id

    async def agent(self, script: list[dict[str, Any]]) -> uuid.UUID:
        """Make one more agent."""
        async with self.database.begin() as connection:
            return await create_agent(connection, self.workspace_id, "scripted", script)

    async def runs(self, count: int, agent_id: uuid.UUID | None = None, expected_subruns: int = 0) -> list[uuid.UUID]:
        """Accept runs that are due at once, all in one transaction."""
        run_ids = [new_id() for _ in range(count)]
        new = [
            {
                "run_id": run_id,
                "workspace_id": self.workspace_id,
                "agent_id": agent_id or self.agent_id,
                "correlation_id": new_id(),
                "expected_subruns": expected_subruns,
            }
            for run_id in run_ids
        ]
        await self._accept(new)
        return run_ids

    async def run(self, agent_id: uuid.UUID | None = None, expected_subruns: int = 0) -> uuid.UUID:
        """Accept one run that is due at once."""
        return (await self.runs(1, agent_id, expected_subruns))[0]

    async def spawn(self, parent_run_id: uuid.UUID, agent_id: uuid.UUID | None = None) -> uuid.UUID | None:
        """Accept a subrun the way a spawn does, under its parent's lock; None when the parent has ended."""
        async with self.database.begin() as connection:
            found = await connection.execute(
                text("SELECT * FROM runs WHERE run_id = :run_id FOR NO KEY UPDATE"), {"run_id": parent_run_id}
            )
            parent = found.one()
            if parent.ended_at is not None:
                return None
            child = new_id()
            spawned = {"child_run_id": child, "group_id": "group"}
            step = {"step_index": parent.step_count + 1, "kind": StepKind.SUBRUN_SPAWN}
            whose = (parent.correlation_id, parent.workspace_id)
            events = [
                NewEvent(parent_run_id, parent.last_seq + 1, EventType.STEP_CREATED, step, *whose),
                NewEvent(parent_run_id, parent.last_seq + 2, EventType.SUBRUN_SPAWNED, spawned, *whose),
            ]
            await connection.execute(_SPAWNED, {"run_id": parent_run_id, "events": rows(events), "spawned": rows([spawned])})
            new = {
                "run_id": child,
                "workspace_id": self.workspace_id,
                "agent_id": agent_id or parent.agent_id,
                "correlation_id": parent.correlation_id,
                "parent_run_id": parent_run_id,
                "depth": parent.depth + 1,
                "group_id": "group",
            }
            await connection.execute(_ACCEPTED, {"runs": rows([new])})
            return child

    async def _accept(self, new: list[dict[str, Any]]) -> None:
        async with self.database.begin() as connection:
            await connection.execute(_ACCEPTED, {"runs": rows(new)})
