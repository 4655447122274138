"""The shadow revision: what it would refuse, counted beside the active one, while nobody is refused by it.

Rates are observed in `gate`, that of ticks for each turn that is taken (`backstop`); caps are compared with the counts
that were taken for the active one's sake (`caps`, `keeper`, `settling` for tool calls). Every process adds what it
observed to one row for each limit, at most twice a second and only while there is a shadow, so that `quotas history`,
metrics and a recalibration read the sum of all processes.

Where the active revision refuses less than the shadow would, a workspace holds more than the shadow would have let it;
so for a lowered cap every request above it is counted, and the figures err on the side of too many.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec
from sqlalchemy import BigInteger, ForeignKey, select, text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import Mapped, mapped_column

from service.db import Base, Database
from service.quota.limits import Limit
from service.quota.tally import Tally
from service.runs import Instant

ADD_EVERY_S = 0.5
"""How long a process gathers counts before it adds them to the database's, seconds."""


class QuotaShadowCount(Base, kw_only=True):
    """What one limit of a revision would have done while it was the shadow: the sum of all processes."""

    __tablename__ = "quota_shadow_counts"

    revision: Mapped[int] = mapped_column(ForeignKey("quota_revisions.revision"), primary_key=True)
    limit_name: Mapped[str] = mapped_column(primary_key=True)
    """A Limit."""
    asked: Mapped[int] = mapped_column(BigInteger)
    """Requests that touched the limit."""
    refused: Mapped[int] = mapped_column(BigInteger)
    """Those that it would have refused."""
    newly_refused: Mapped[int] = mapped_column(BigInteger)
    """Those of them that the active revision admitted."""
    first_at: Mapped[dt.datetime] = mapped_column(Instant)
    last_at: Mapped[dt.datetime] = mapped_column(Instant)


class Observation(NamedTuple):
    """One request, and what the shadow's limit would have said to it."""

    revision: int
    limit: Limit
    refused: bool
    newly: bool  # refused, where the active revision admitted


class ShadowCount(msgspec.Struct, frozen=True):
    """A limit's sums; QuotaShadowCount explains each."""

    limit: Limit
    asked: int
    refused: int
    newly_refused: int
    first_at: dt.datetime
    last_at: dt.datetime


ADD = text("""
    INSERT INTO quota_shadow_counts AS c (revision, limit_name, asked, refused, newly_refused, first_at, last_at)
    SELECT revision, limit_name, asked, refused, newly_refused, now(), now()
    FROM json_to_recordset(CAST(:counts AS json))
        AS n(revision int, limit_name text, asked bigint, refused bigint, newly_refused bigint)
    ORDER BY revision, limit_name
    ON CONFLICT (revision, limit_name) DO UPDATE SET
        asked = c.asked + excluded.asked, refused = c.refused + excluded.refused,
        newly_refused = c.newly_refused + excluded.newly_refused, last_at = excluded.last_at
""")
"""In order, so that two processes never wait for each other in a circle."""


async def shadow_counts(connection: AsyncConnection, revisions: Sequence[int]) -> dict[int, list[ShadowCount]]:
    """Return what was counted for each of these revisions, by the limit's name."""
    told: dict[int, list[ShadowCount]] = {revision: [] for revision in revisions}
    found = await connection.execute(
        select(QuotaShadowCount.__table__)
        .where(QuotaShadowCount.revision.in_(list(revisions)))
        .order_by(QuotaShadowCount.revision, QuotaShadowCount.limit_name)
    )
    for row in found:
        told[row.revision].append(
            ShadowCount(Limit(row.limit_name), row.asked, row.refused, row.newly_refused, row.first_at, row.last_at)
        )
    return told


class ShadowTally(Tally):
    """Gathers one process's observations and adds them to the database's sums."""

    def __init__(self, database: Database, add_every_s: float = ADD_EVERY_S) -> None:
        super().__init__(database, ADD, ("asked", "refused", "newly_refused"), add_every_s)

    def count(self, observations: Iterable[Observation]) -> None:
        """Take observations."""
        for revision, limit, refused, newly in observations:
            self.add(revision, limit, 1, refused, newly)


IN_USE = text("SELECT state, revision FROM quota_revisions WHERE state IN ('active', 'shadow') ORDER BY state")


async def revision_figures(connection: AsyncConnection) -> str:
    """Return the revisions in use, and what the shadow would refuse, in Prometheus' text format (version 0.0.4)."""
    in_use = {row.state: int(row.revision) for row in await connection.execute(IN_USE)}
    lines = [
        "# HELP plimsoll_quota_revision The quota revision in this state.",
        "# TYPE plimsoll_quota_revision gauge",
        *(f'plimsoll_quota_revision{{state="{state}"}} {revision}' for state, revision in in_use.items()),
    ]
    if "shadow" in in_use:
        revision = in_use["shadow"]
        counts = (await shadow_counts(connection, [revision]))[revision]
        for name, help_, values in (
            ("requests", "Requests that the shadow revision was asked about.", {c.limit: c.asked for c in counts}),
            ("refusals", "Those that it would have refused.", {c.limit: c.refused for c in counts}),
            ("new_refusals", "Those of them that were admitted.", {c.limit: c.newly_refused for c in counts}),
        ):
            lines += [
                f"# HELP plimsoll_quota_shadow_{name}_total {help_}",
                f"# TYPE plimsoll_quota_shadow_{name}_total counter",
                *(
                    f'plimsoll_quota_shadow_{name}_total{{revision="{revision}",limit="{limit}"}} {value}'
                    for limit, value in values.items()
                ),
            ]
    return "\n".join([*lines, ""])
