"""Caps: how many runs a workspace holds, counted in PostgreSQL inside the transaction that adds one.

The count is taken under the workspace's row lock, by a statement that begins after the lock was granted: an older
snapshot would not see what the last holder of the lock committed. Whoever ends a run needs no lock, since that only
lowers the count; so a cap is never exceeded and no slot can leak. FOR NO KEY UPDATE shuts out the other counters and
lets through the foreign keys of those who need no count: a new agent, a token, a run under no cap.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NoReturn

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import QuotaExceeded
from service.quota.limits import Limit, Quota
from service.quota.shadow import Observation

RETRY_AFTER_S = 1
"""What Retry-After says for a cap: nobody can know when a holder ends, so ask again soon."""

LOCK = text("SELECT 1 FROM workspaces WHERE workspace_id = ANY(:ids) ORDER BY workspace_id FOR NO KEY UPDATE")
COUNT = text("""
    SELECT workspace_id, count(*) AS live_runs, count(*) FILTER (WHERE parent_run_id IS NULL) AS live_parent_runs
    FROM runs WHERE workspace_id = ANY(:ids) AND ended_at IS NULL GROUP BY workspace_id
""")


COUNT_PENDING_TOOL_CALLS = text("""
    SELECT workspace_id, count(*) AS pending FROM tool_calls
    WHERE workspace_id = ANY(:ids) AND status = 'PENDING' GROUP BY workspace_id
""")


@dataclass
class Held:
    """What one workspace holds, as a group of writes goes on adding to it."""

    live_runs: int = 0
    live_parent_runs: int = 0
    observed: list[Observation] = field(default_factory=list)
    """What the shadow revision would have said to each write."""

    def admit_parent(self, quota: Quota) -> None:
        """Count one more parent run; raises QuotaExceeded and counts nothing when a cap forbids it."""
        self._require_room(quota, (Limit.LIVE_PARENT_RUNS, self.live_parent_runs), (Limit.LIVE_RUNS, self.live_runs))
        self.live_parent_runs += 1
        self.live_runs += 1

    def admit_subrun(self, quota: Quota, pending_subruns: int) -> None:
        """Count one more subrun of a parent that has `pending_subruns`; raises QuotaExceeded likewise."""
        self._require_room(quota, (Limit.PENDING_SUBRUNS, pending_subruns), (Limit.LIVE_RUNS, self.live_runs))
        self.live_runs += 1

    def _require_room(self, quota: Quota, *uses: tuple[Limit, int]) -> None:
        """Raise QuotaExceeded for the first cap that is used up; the shadow's opinion is noted either way."""
        full = next(((limit, used) for limit, used in uses if _is_full(quota.cap(limit), used)), None)
        self.observed += observe_caps(quota, uses, admitted=full is None)
        if full is not None:
            _refuse(*full, quota.cap(full[0]) or 0)


async def lock_and_count(connection: AsyncConnection, workspace_ids: set[uuid.UUID]) -> dict[uuid.UUID, Held]:
    """Lock the workspaces in order of id and return what each holds; the locks last as long as the transaction."""
    held = {workspace_id: Held() for workspace_id in workspace_ids}
    if workspace_ids:
        ids = {"ids": sorted(workspace_ids)}
        await connection.execute(LOCK, ids)
        for row in await connection.execute(COUNT, ids):
            held[row.workspace_id] = Held(row.live_runs, row.live_parent_runs)
    return held


async def lock_workspaces(connection: AsyncConnection, workspace_ids: set[uuid.UUID]) -> None:
    """Lock the workspaces in order of id, before any run; the locks last as long as the transaction."""
    await connection.execute(LOCK, {"ids": sorted(workspace_ids)})


async def count_pending_tool_calls(connection: AsyncConnection, workspace_ids: set[uuid.UUID]) -> dict[uuid.UUID, int]:
    """Return how many tool calls of each locked workspace wait for approval."""
    found = await connection.execute(COUNT_PENDING_TOOL_CALLS, {"ids": sorted(workspace_ids)})
    return dict.fromkeys(workspace_ids, 0) | {row.workspace_id: row.pending for row in found}


def tool_calls_left(quota: Quota, pending: int) -> int | None:
    """Return how many more tool calls of a workspace may wait for approval; None for any number.

    A run has one open tool call at most, so its own cap matters only when it is none at all.
    """
    if quota.pending_tool_calls_per_run is not None and quota.pending_tool_calls_per_run < 1:
        return 0
    return None if quota.pending_tool_calls is None else max(0, quota.pending_tool_calls - pending)


def observe_caps(quota: Quota, uses: Iterable[tuple[Limit, int]], *, admitted: bool) -> list[Observation]:
    """Return what the shadow's caps would have said, where there is a shadow and it has these caps."""
    shadow = quota.shadow
    if shadow is None or shadow.revision is None:
        return []
    return [
        Observation(shadow.revision, limit, refused := _is_full(shadow.cap(limit), used), refused and admitted)
        for limit, used in uses
        if shadow.cap(limit) is not None
    ]


def _is_full(most: int | None, used: int) -> bool:
    return most is not None and used >= most


def _refuse(limit: Limit, used: int, most: int) -> NoReturn:
    """Refuse, with how many have to end first: several, when the cap was lowered below what is held."""
    excess = used - most + 1
    enough = "one of them has" if excess == 1 else f"{excess} of them have"
    advice = f"try again when {enough} ended" if most else "none is admitted under a cap of 0"
    raise QuotaExceeded(
        limit,
        f"({used} of {most} in use); {advice}",
        RETRY_AFTER_S,
        {
            "ratelimit-policy": f'"{limit}";q={most};qu="concurrent-requests"',
            "ratelimit": f'"{limit}";r=0;t={RETRY_AFTER_S}',
        },
    )
