"""Which quota a workspace is under right now. What was read is trusted for a second, so a change is soon everywhere."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

from sqlalchemy import select

from service.db import Database
from service.errors import NotFound
from service.quota.limits import DEFAULT, LIFTED, Quota
from service.workspaces import QuotaClass, Workspace

REMEMBERED_S = 1.0
"""How long a process trusts what it read of a workspace, seconds."""

MOST = 10_000
"""How many workspaces a process remembers."""


class Quotas:
    """Answers which quota a workspace is under, for one process."""

    def __init__(self, database: Database, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._monotonic = monotonic
        self._known: dict[uuid.UUID, tuple[float, Quota]] = {}

    async def of(self, workspace_id: uuid.UUID) -> Quota:
        """Return the workspace's quota; raises NotFound when there is no such workspace."""
        entry = self._known.get(workspace_id)
        now = self._monotonic()
        if entry is not None and now < entry[0]:
            return entry[1]
        async with self._database.read() as connection:
            found = await connection.execute(
                select(Workspace.quota_class).where(Workspace.workspace_id == workspace_id)
            )
            row = found.first()
        if row is None:
            raise NotFound("no such workspace")
        quota = LIFTED if row.quota_class == QuotaClass.CALIBRATION else DEFAULT
        if len(self._known) >= MOST:
            self._known.clear()
        self._known[workspace_id] = now + REMEMBERED_S, quota
        return quota
