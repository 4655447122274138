"""Leases of what takes long: while a worker waits for a tool or a model, its claim on the run is renewed.

One task renews all of a worker's long claims together, three times in a lease. It also looks whether a claim still
counts: when a run was cancelled, paused or taken by another worker, whoever waits for it is told so (`LeaseLost`) and
can stop. A tool's own lease goes on through a pause of its run, so that what was started once is not taken for dead.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import text

from service.db import Database, is_outage, rows

log = structlog.get_logger()

_RENEW_RUNS = text("""
    WITH held AS (
        SELECT r.run_id FROM runs r
        JOIN json_to_recordset(CAST(:held AS json)) AS h(run_id uuid, epoch int)
            ON h.run_id = r.run_id AND h.epoch = r.epoch
        WHERE r.ended_at IS NULL AND r.next_tick_at > now()
        FOR NO KEY UPDATE OF r SKIP LOCKED
    )
    UPDATE runs SET next_tick_at = least(now() + make_interval(secs => :lease_s), (
        SELECT min(deadline_at) FROM subrun_groups g WHERE g.run_id = held.run_id AND g.state = 'WAITING'
    ))
    FROM held WHERE runs.run_id = held.run_id
""")
"""A run that was made due by somebody else stays due, and one whose group has a deadline is due then: no tool and no
model holds that up. A row that is locked just now is renewed the next time."""

_RENEW_CALLS = text("""
    WITH held AS (
        SELECT t.tool_call_id FROM tool_calls t
        WHERE t.tool_call_id = ANY(CAST(:ids AS uuid[])) AND t.status = 'RUNNING' FOR NO KEY UPDATE SKIP LOCKED
    )
    UPDATE tool_calls SET lease_until = now() + make_interval(secs => :lease_s) FROM held
    WHERE tool_calls.tool_call_id = held.tool_call_id
""")

_LOST_RUNS = text("""
    SELECT r.run_id FROM runs r
    JOIN json_to_recordset(CAST(:held AS json)) AS h(run_id uuid, epoch int) ON h.run_id = r.run_id
    WHERE r.ended_at IS NOT NULL OR r.epoch <> h.epoch
""")

_LOST_CALLS = text("""
    SELECT tool_call_id FROM tool_calls WHERE tool_call_id = ANY(CAST(:ids AS uuid[])) AND status <> 'RUNNING'
""")


class LeaseLost(Exception):
    """What was waited for no longer matters: the run ended, was paused, or is in other hands."""


@dataclass(eq=False)
class _Held:
    """One long wait of this worker."""

    run_id: uuid.UUID
    epoch: int
    tool_call_id: uuid.UUID | None
    task: asyncio.Task[Any]
    lost: bool = False


class Leases:
    """Renews one worker's long claims."""

    def __init__(self, database: Database, lease_s: float) -> None:
        self.lease_s = lease_s
        self._database = database
        self._held: set[_Held] = set()
        self._renewing: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def hold(self, run_id: uuid.UUID, epoch: int, tool_call_id: uuid.UUID | None = None) -> AsyncIterator[None]:
        """Keep the claim during the block; the block is interrupted by LeaseLost when the claim no longer counts."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a lease is held by a task")
        held = _Held(run_id, epoch, tool_call_id, task)
        self._held.add(held)
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew(), name="renew leases")
        try:
            yield
        except asyncio.CancelledError:
            if held.lost and task.uncancel() == 0:
                raise LeaseLost from None
            raise
        finally:
            self._held.discard(held)

    async def _renew(self) -> None:
        """Renew as long as anything is held."""
        while self._held:
            await asyncio.sleep(self.lease_s / 3)
            try:
                await self.renew_once()
            except Exception as fault:
                if not is_outage(fault):
                    log.error("leases were not renewed", exc_info=fault)

    async def renew_once(self) -> None:
        """Renew what is held and interrupt whoever waits for what is lost."""
        held = list(self._held)
        if not held:
            return
        runs = rows({"run_id": each.run_id, "epoch": each.epoch} for each in held)
        calls = [each.tool_call_id for each in held if each.tool_call_id is not None]
        async with self._database.read() as connection:
            await connection.execute(_RENEW_RUNS, {"held": runs, "lease_s": self.lease_s})
            lost_runs = set((await connection.execute(_LOST_RUNS, {"held": runs})).scalars())
            lost_calls: set[uuid.UUID] = set()
            if calls:
                await connection.execute(_RENEW_CALLS, {"ids": calls, "lease_s": self.lease_s})
                lost_calls = set((await connection.execute(_LOST_CALLS, {"ids": calls})).scalars())
        for each in held:
            lost = each.run_id in lost_runs if each.tool_call_id is None else each.tool_call_id in lost_calls
            if lost and each in self._held and not each.lost:
                each.lost = True
                each.task.cancel()
