"""Overrides: a limit's value for one workspace, on top of its class's, whichever revision is in force.

They are no part of a revision: a recalibration moves everybody else and leaves them alone, and so does a rollback. One
is set or taken back by `quotas override`, with a name and a reason, and is in force within a second like a revision
(`inforce`). No guardrail is asked: a cap of 0 for one workspace stops it, and may be meant.
"""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import ForeignKey, delete, func, select
from sqlalchemy.dialects.postgresql import JSON, insert
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import Mapped, mapped_column

from service.db import Base
from service.errors import Invalid, NotFound
from service.quota.limits import RATES, Limit
from service.quota.revisions import MOST_REASON_CHARACTERS, require_name
from service.quota.tables import CapValue, RateValue, rate_of
from service.runs import Instant
from service.workspaces import Workspace

Value = RateValue | int | None
"""A rate, a cap, or null: lifted."""


class QuotaOverride(Base, kw_only=True):
    """One limit of one workspace."""

    __tablename__ = "quota_overrides"

    workspace_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("workspaces.workspace_id"), primary_key=True)
    limit_name: Mapped[str] = mapped_column(primary_key=True)
    """A Limit."""
    value: Mapped[Any] = mapped_column(JSON)
    """`tables.RateValue`, a whole number, or JSON's null: lifted."""
    set_at: Mapped[dt.datetime] = mapped_column(Instant)
    set_by: Mapped[str]
    reason: Mapped[str | None]


class Override(NamedTuple):
    """An override, and whose wish it was."""

    limit: Limit
    value: Value
    set_at: dt.datetime
    set_by: str
    reason: str | None


def parse_value(limit: Limit, value: object) -> Value:
    """Return what a limit is set to, from plain values; raises Invalid."""
    try:
        if limit in RATES:
            rate = msgspec.convert(value, RateValue | None)
            if rate is not None:
                rate_of(rate, limit)
            return rate
        return msgspec.convert(value, CapValue | None)
    except msgspec.ValidationError as wrong:
        raise Invalid("value", str(wrong)) from None


async def set_override(
    connection: AsyncConnection, workspace_id: uuid.UUID, limit: Limit, value: Value, by: str, reason: str | None = None
) -> None:
    """Give a workspace its own value of a limit, in place of an earlier one; raises NotFound for the workspace."""
    await _require_workspace(connection, workspace_id)
    if reason is not None and (len(reason) > MOST_REASON_CHARACTERS or "\x00" in reason):
        raise Invalid("reason", f"give at most {MOST_REASON_CHARACTERS} characters, without U+0000")
    row = {
        "value": JSON.NULL if value is None else msgspec.to_builtins(value),
        "set_at": func.now(),
        "set_by": require_name(by),
        "reason": reason,
    }
    await connection.execute(
        insert(QuotaOverride)
        .values(workspace_id=workspace_id, limit_name=limit.value, **row)
        .on_conflict_do_update(index_elements=["workspace_id", "limit_name"], set_=row)
    )


async def clear_override(connection: AsyncConnection, workspace_id: uuid.UUID, limit: Limit) -> bool:
    """Put a workspace under its class's value again; False when it was. Raises NotFound for the workspace."""
    await _require_workspace(connection, workspace_id)
    gone = await connection.execute(
        delete(QuotaOverride)
        .where(QuotaOverride.workspace_id == workspace_id, QuotaOverride.limit_name == limit.value)
        .returning(QuotaOverride.limit_name)
    )
    return gone.first() is not None


async def overrides_of(connection: AsyncConnection, workspace_id: uuid.UUID) -> list[Override]:
    """Return a workspace's overrides, by the limit's name."""
    found = await connection.execute(
        select(QuotaOverride.__table__)
        .where(QuotaOverride.workspace_id == workspace_id)
        .order_by(QuotaOverride.limit_name)
    )
    told = []
    for row in found:
        limit = Limit(row.limit_name)
        told.append(Override(limit, parse_value(limit, row.value), row.set_at, row.set_by, row.reason))
    return told


async def _require_workspace(connection: AsyncConnection, workspace_id: uuid.UUID) -> None:
    found = await connection.execute(select(Workspace.name).where(Workspace.workspace_id == workspace_id))
    if found.first() is None:
        raise NotFound("no such workspace")
