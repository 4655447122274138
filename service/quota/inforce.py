"""Which quota a workspace is under right now. What was read is trusted for a second, so a change is soon everywhere.

One query for all workspaces that are asked for in one turn of the loop says which class each is in, what is overridden
for it, and which revisions are active and shadow. A revision never changes, so its tables are read once a process.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.db import Database
from service.errors import NotFound
from service.grouping import Grouping
from service.quota.limits import Limit, Quota
from service.quota.overrides import parse_value
from service.quota.revisions import find
from service.quota.tables import ClassTable, apply, quota_of, tables_by_class

REMEMBERED_S = 1.0
"""How long a process trusts what it read of a workspace, seconds."""

MOST = 10_000
"""How many workspaces a process remembers."""

MOST_REVISIONS = 8
"""How many revisions' tables a process remembers: two are in use, and a rollback goes back to one of the last."""

MOST_QUOTAS = 1_000
"""How many quotas that were put together a process remembers: all workspaces without overrides share one."""

READ = text("""
    SELECT w.workspace_id, w.quota_class,
           CASE WHEN is_canary THEN in_use.canary ELSE in_use.active END AS active,
           CASE WHEN is_canary THEN NULL ELSE in_use.shadow END AS shadow,
           (SELECT json_object_agg(o.limit_name, o.value)::text FROM quota_overrides o
            WHERE o.workspace_id = w.workspace_id) AS overrides
    FROM workspaces w CROSS JOIN (
        SELECT (SELECT revision FROM quota_revisions WHERE state = 'active') AS active,
               (SELECT revision FROM quota_revisions WHERE state = 'shadow') AS shadow,
               (SELECT revision FROM quota_recalibrations WHERE phase = 'canary') AS canary,
               (SELECT (plan->>'canary_percent')::int FROM quota_recalibrations WHERE phase = 'canary') AS percent
    ) in_use CROSS JOIN LATERAL (
        SELECT in_use.canary IS NOT NULL AND w.quota_class = 'default'
               AND mod(('x' || right(w.workspace_id::text, 7))::bit(28)::int, 100) < in_use.percent AS is_canary
    ) AS chosen
    WHERE w.workspace_id = ANY(:ids)
""")

Key = tuple[int, int | None, str, str | None]
"""All that a quota depends on: active and shadow revision, quota class, overrides as JSON. For the canaries of a
recalibration the active one is what it proposes (docs/recalibration.md)."""


class Quotas:
    """Answers which quota a workspace is under, for one process."""

    def __init__(self, database: Database, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._monotonic = monotonic
        self._known: dict[uuid.UUID, tuple[float, Quota]] = {}
        self._tables: OrderedDict[int, dict[str, ClassTable]] = OrderedDict()
        self._quotas: dict[Key, Quota] = {}
        self._grouping: Grouping[uuid.UUID, Quota] = Grouping(self._read, lanes=2)

    def known(self, workspace_id: uuid.UUID) -> Quota | None:
        """Return what was read within the last second, without asking the database."""
        entry = self._known.get(workspace_id)
        return entry[1] if entry is not None and self._monotonic() < entry[0] else None

    def trusted_for_s(self, workspace_id: uuid.UUID) -> float:
        """Return for how many seconds more what was read is trusted; 0 when it has to be read again."""
        entry = self._known.get(workspace_id)
        return 0.0 if entry is None else max(0.0, entry[0] - self._monotonic())

    async def of(self, workspace_id: uuid.UUID) -> Quota:
        """Return the workspace's quota; raises NotFound when there is no such workspace."""
        return self.known(workspace_id) or await self._grouping.submit(workspace_id)

    async def read(self, workspace_ids: Iterable[uuid.UUID]) -> dict[uuid.UUID, Quota]:
        """Ask the database for the quotas of workspaces as they are now; raises NotFound when there is no such one."""
        asked = list(workspace_ids)
        return dict(zip(asked, await asyncio.gather(*map(self._grouping.submit, asked)), strict=True))

    async def _read(self, workspace_ids: Sequence[uuid.UUID]) -> Sequence[Quota | Exception]:
        asked_at = self._monotonic()
        async with self._database.read() as connection:
            found = (await connection.execute(READ, {"ids": list(set(workspace_ids))})).all()
            for revision in {row.active for row in found} | {row.shadow for row in found} - {None}:
                await self._learn(connection, revision)
        quotas = {
            row.workspace_id: self._quota((row.active, row.shadow, row.quota_class, row.overrides)) for row in found
        }
        if len(self._known) >= MOST:
            self._known.clear()
        self._known.update((each, (asked_at + REMEMBERED_S, quota)) for each, quota in quotas.items())
        return [quotas.get(each) or NotFound("no such workspace") for each in workspace_ids]

    async def _learn(self, connection: AsyncConnection, revision: int) -> None:
        """Read a revision's tables unless they are known; what was in use longest ago is forgotten."""
        if revision not in self._tables:
            self._tables[revision] = tables_by_class((await find(connection, revision)).limits)
        self._tables.move_to_end(revision)
        while len(self._tables) > MOST_REVISIONS:
            self._tables.popitem(last=False)

    def _quota(self, key: Key) -> Quota:
        """Return the quota that these make together."""
        quota = self._quotas.get(key)
        if quota is None:
            if len(self._quotas) >= MOST_QUOTAS:
                self._quotas.clear()
            quota = self._quotas[key] = self._build(*key)
        return quota

    def _build(self, active: int, shadow: int | None, quota_class: str, overrides: str | None) -> Quota:
        values = {} if overrides is None else msgspec.json.decode(overrides)
        own = {name: parse_value(Limit(name), value) for name, value in values.items()}

        def under(revision: int) -> Quota:
            return replace(quota_of(apply(self._tables[revision][quota_class], own)), revision=revision)

        quota = under(active)
        return quota if shadow is None else replace(quota, shadow=under(shadow))
