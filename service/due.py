"""What is due, in figures: for /metrics and for the sweeper.

A claim moves `next_tick_at` to the end of its lease, so a run whose `next_tick_at` has passed is due and in nobody's
hands. Instants are compared by the database's clock alone. Who claims: `tick`.
"""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

_QUEUE_DEPTH = text("SELECT count(*) FROM runs WHERE next_tick_at <= now()")
_NEXT_DUE_IN_S = text("SELECT CAST(extract(epoch FROM min(next_tick_at) - clock_timestamp()) AS float8) FROM runs")


async def queue_depth(connection: AsyncConnection) -> int:
    """Return how many runs are due and unclaimed."""
    return int((await connection.execute(_QUEUE_DEPTH)).scalar_one())


async def oldest_due_s(connection: AsyncConnection) -> float:
    """Return for how many seconds the oldest due run has been waiting; 0 when none is due."""
    return max(0.0, -(await next_due_in_s(connection) or 0.0))


async def next_due_in_s(connection: AsyncConnection) -> float | None:
    """Return the seconds until the next run is due or a lease ends; negative when one is overdue, None when none is."""
    found = (await connection.execute(_NEXT_DUE_IN_S)).scalar_one()
    return None if found is None else float(found)
