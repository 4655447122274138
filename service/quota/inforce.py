"""Which quota a workspace is under right now. What was read is trusted for a second, so a change is soon everywhere."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence

from sqlalchemy import text

from service.db import Database
from service.errors import NotFound
from service.grouping import Grouping
from service.quota.limits import DEFAULT, LIFTED, Quota
from service.workspaces import QuotaClass

REMEMBERED_S = 1.0
"""How long a process trusts what it read of a workspace, seconds."""

MOST = 10_000
"""How many workspaces a process remembers."""


READ = text("SELECT workspace_id, quota_class FROM workspaces WHERE workspace_id = ANY(:ids)")

QUOTAS = {QuotaClass.DEFAULT: DEFAULT, QuotaClass.CALIBRATION: LIFTED}
"""The quota of each class."""


class Quotas:
    """Answers which quota a workspace is under, for one process."""

    def __init__(self, database: Database, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._monotonic = monotonic
        self._known: dict[uuid.UUID, tuple[float, Quota]] = {}
        self._grouping: Grouping[uuid.UUID, Quota] = Grouping(self._read, lanes=2)

    def known(self, workspace_id: uuid.UUID) -> Quota | None:
        """Return what was read within the last second, without asking the database."""
        entry = self._known.get(workspace_id)
        return entry[1] if entry is not None and self._monotonic() < entry[0] else None

    async def of(self, workspace_id: uuid.UUID) -> Quota:
        """Return the workspace's quota; raises NotFound when there is no such workspace."""
        return self.known(workspace_id) or await self._grouping.submit(workspace_id)

    async def _read(self, workspace_ids: Sequence[uuid.UUID]) -> Sequence[Quota | Exception]:
        asked_at = self._monotonic()
        async with self._database.read() as connection:
            found = await connection.execute(READ, {"ids": list(set(workspace_ids))})
            quotas = {row.workspace_id: QUOTAS[QuotaClass(row.quota_class)] for row in found}
        if len(self._known) >= MOST:
            self._known.clear()
        self._known.update((each, (asked_at + REMEMBERED_S, quota)) for each, quota in quotas.items())
        return [quotas.get(each) or NotFound("no such workspace") for each in workspace_ids]
