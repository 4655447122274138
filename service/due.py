"""What is due, in figures: for /metrics and for the sweeper.

A claim moves `next_tick_at` to the end of its lease, so a run whose `next_tick_at` has passed is due and in nobody's
hands. Instants are compared by the database's clock alone. Who claims: `claims`.
"""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

_QUEUE = text("""
    SELECT count(*), CAST(coalesce(extract(epoch FROM now() - min(next_tick_at)), 0) AS float8)
    FROM runs WHERE next_tick_at <= now()
""")
_NEXT_DUE_IN_S = text("SELECT CAST(extract(epoch FROM min(next_tick_at) - clock_timestamp()) AS float8) FROM runs")


class Queue(NamedTuple):
    """The runs that are due and unclaimed."""

    depth: int  # how many
    oldest_due_s: float  # for how many seconds the oldest of them has been due; 0 when there is none


async def queue(connection: AsyncConnection) -> Queue:
    """Count what waits for a worker at this moment."""
    return Queue(*(await connection.execute(_QUEUE)).one())


async def next_due_in_s(connection: AsyncConnection) -> float | None:
    """Return the seconds until the next run is due or a lease ends; negative when one is overdue, None when none is."""
    found: float | None = (await connection.execute(_NEXT_DUE_IN_S)).scalar_one()
    return found
