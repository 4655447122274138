"""What traffic says about a table: requests and refusals under each revision, runs that failed, and what is used.

Every process adds its counts to one row for each minute, revision and rate, once a second at most. They are figures to
judge by: a process that is killed loses a second of them. Rows older than eight days are deleted by whoever looks.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Collection, Sequence

from sqlalchemy import BigInteger, ForeignKey, text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import Mapped, mapped_column

from service.db import Base, Database
from service.quota.limits import Limit, Quota
from service.quota.recalibration_cycle import Count
from service.quota.tally import Tally
from service.runs import Instant

ADD_EVERY_S = 1.0
"""How long a process gathers counts before it adds them to the database's, seconds."""

PERIOD = dt.timedelta(days=7)
"""How far back use is looked at: a week, so that each weekday's busy hour is in it."""

BEFORE = dt.timedelta(days=1)
"""How far back a share of refusals is compared with: a day, so that each hour is in it once."""


class QuotaRequestCount(Base, kw_only=True):
    """Requests of one minute that one rate of one revision was asked about: the sum of all processes."""

    __tablename__ = "quota_request_counts"

    minute: Mapped[dt.datetime] = mapped_column(Instant, primary_key=True)
    revision: Mapped[int] = mapped_column(ForeignKey("quota_revisions.revision"), primary_key=True)
    limit_name: Mapped[str] = mapped_column(primary_key=True)
    """A Limit."""
    asked: Mapped[int] = mapped_column(BigInteger)
    refused: Mapped[int] = mapped_column(BigInteger)


ADD = text("""
    INSERT INTO quota_request_counts AS c (minute, revision, limit_name, asked, refused)
    SELECT date_trunc('minute', now()), revision, limit_name, asked, refused
    FROM json_to_recordset(CAST(:counts AS json)) AS n(revision int, limit_name text, asked bigint, refused bigint)
    ORDER BY revision, limit_name
    ON CONFLICT (minute, revision, limit_name) DO UPDATE SET
        asked = c.asked + excluded.asked, refused = c.refused + excluded.refused
""")
"""In order, so that two processes never wait for each other in a circle."""


class RequestTally(Tally):
    """Gathers one process's requests and adds them to the database's sums."""

    def __init__(self, database: Database, add_every_s: float = ADD_EVERY_S) -> None:
        super().__init__(database, ADD, ("asked", "refused"), add_every_s)

    def count(self, quota: Quota, limits: Sequence[Limit], *, refused: Collection[str] = ()) -> None:
        """Take one request that these limits were asked about, and which of them refused it."""
        if quota.revision is None:
            return
        for limit in limits:
            if limit in quota.rates:
                self.add(quota.revision, limit, 1, limit in refused)


REQUESTS = text("""
    SELECT limit_name, sum(asked)::bigint AS asked, sum(refused)::bigint AS refused FROM quota_request_counts
    WHERE revision = :revision AND minute >= date_trunc('minute', CAST(:since AS timestamptz)) GROUP BY limit_name
""")
FAILURES = text("""
    SELECT count(*) AS ended, count(*) FILTER (WHERE r.status = 'FAILED') AS failed
    FROM runs r JOIN workspaces w USING (workspace_id)
    WHERE r.ended_at >= :since AND r.ended_at < :until AND w.quota_class = 'default'
""")
USE = text("""
    SELECT is_parent, percentile_disc(0.99) WITHIN GROUP (ORDER BY requests) / 60.0 AS per_s FROM (
        SELECT r.parent_run_id IS NULL AS is_parent, count(*) AS requests
        FROM runs r JOIN workspaces w USING (workspace_id)
        WHERE r.run_id >= :first AND r.created_at >= :since AND w.quota_class = 'default'
        GROUP BY 1, r.workspace_id, date_trunc('minute', r.created_at)
    ) AS busy GROUP BY is_parent
""")
FORGET = text("DELETE FROM quota_request_counts WHERE minute < now() - make_interval(days => 8)")


async def requests_under(connection: AsyncConnection, revision: int, since: dt.datetime) -> dict[str, Count]:
    """Return requests and refusals under a revision, by limit."""
    found = await connection.execute(REQUESTS, {"revision": revision, "since": since})
    return {row.limit_name: Count(row.asked, row.refused) for row in found}


async def failures(connection: AsyncConnection, since: dt.datetime, until: dt.datetime) -> Count:
    """Return the runs that ended in a time, and those of them that failed."""
    row = (await connection.execute(FAILURES, {"since": since, "until": until})).one()
    return Count(row.ended, row.failed)


async def observed_use(connection: AsyncConnection, now: dt.datetime) -> dict[Limit, float]:
    """Return the p99 of what a workspace used of creates and spawns in its busy minutes of the last week, per second.

    Over all minutes in which it made one. Polls and ticks leave no rows to count; a shadow is asked about them instead.
    """
    since = now - PERIOD
    found = await connection.execute(USE, {"first": _first_id(since), "since": since})
    return {(Limit.RUN_CREATION if row.is_parent else Limit.SUBRUN_SPAWN): float(row.per_s) for row in found}


def _first_id(at: dt.datetime) -> uuid.UUID:
    """Return the smallest id that a run created at that instant can have (RFC 9562, version 7): ids are in order."""
    return uuid.UUID(int=int(at.timestamp() * 1000) << 80)
