"""Which runs and workspaces a caller may see. A run of another workspace is as absent as one that never was."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import text

from service.auth import Caller
from service.db import Database
from service.errors import NotFound
from service.grouping import Grouping
from service.quota.inforce import Quotas


class RunFacts(NamedTuple):
    """What never changes of a run, and so may be remembered."""

    workspace_id: uuid.UUID
    agent_id: uuid.UUID


READ = text("SELECT run_id, workspace_id, agent_id FROM runs WHERE run_id = ANY(:ids)")


async def require_workspace(quotas: Quotas, caller: Caller, workspace_id: uuid.UUID) -> None:
    """Raise NotFound unless the workspace exists and the caller may see it."""
    if not caller.may_see(workspace_id):
        raise NotFound("no such workspace")
    await quotas.of(workspace_id)


class Sight:
    """Finds runs for callers, for one process."""

    MOST = 50_000
    """How many runs' facts are remembered; past that all are forgotten and read again when needed."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[uuid.UUID, RunFacts] = {}
        self._grouping: Grouping[uuid.UUID, RunFacts] = Grouping(self._read, lanes=2)

    def learn(self, run_id: uuid.UUID, facts: RunFacts) -> None:
        """Remember a run that this process has just written or read."""
        if len(self._known) >= self.MOST:
            self._known.clear()
        self._known[run_id] = facts

    async def find(self, caller: Caller, run_id: uuid.UUID) -> RunFacts:
        """Return the run's facts; raises NotFound when it is absent or not the caller's."""
        facts = self._known.get(run_id)
        if facts is None:
            facts = await self._grouping.submit(run_id)
        if not caller.may_see(facts.workspace_id):
            raise NotFound("no such run")
        return facts

    async def _read(self, run_ids: Sequence[uuid.UUID]) -> Sequence[RunFacts | Exception]:
        async with self._database.read() as connection:
            rows = await connection.execute(READ, {"ids": list(set(run_ids))})
            found = {row.run_id: RunFacts(row.workspace_id, row.agent_id) for row in rows}
        for run_id, facts in found.items():
            self.learn(run_id, facts)
        return [found.get(run_id) or NotFound("no such run") for run_id in run_ids]  # learning may have forgotten some
