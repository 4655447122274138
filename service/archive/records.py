"""The row that stands for a bundle: where its file is, and what it must be like to be believed.

A path in a row is relative to the archive folder and has one form only; what has another form is not opened. The row
outlives its run: a purged run is gone, its bundles are still listed and downloaded through their rows.
"""

from __future__ import annotations

import datetime as dt
import re
import uuid
from typing import NamedTuple

from sqlalchemy import ForeignKey, Text, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import Mapped, mapped_column

from service.db import Base
from service.runs import Instant


class RunArchive(Base, kw_only=True):
    """One bundle of one run."""

    __tablename__ = "run_archives"
    __table_args__ = (UniqueConstraint("run_id", "last_seq", name="run_archives_run_id_last_seq_key"),)

    archive_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    run_id: Mapped[uuid.UUID]
    """No foreign key: the run may be purged."""
    workspace_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("workspaces.workspace_id"))
    path: Mapped[str] = mapped_column(unique=True)
    """Relative to the archive folder, as `path_of` makes it."""
    sha256: Mapped[str]
    """Of the zip file; 64 hexadecimal digits."""
    size_bytes: Mapped[int]
    """Of the zip file."""
    schema_version: Mapped[int]
    """Form of the bundle's JSON, as `bundle.SCHEMA_VERSION` counts it."""
    last_seq: Mapped[int]
    """Number of the newest event in the bundle: its own run_archived event."""
    compacted_through_seq: Mapped[int]
    """Events with this number and below may be missing in the bundle: an older bundle has them."""
    compacted_types: Mapped[list[str]] = mapped_column(ARRAY(Text), default_factory=list)
    """Event types of which the database has none left, as far as this bundle covers the run."""
    created_at: Mapped[dt.datetime] = mapped_column(Instant)


class Stored(NamedTuple):
    """What is known of a bundle's file."""

    archive_id: uuid.UUID
    run_id: uuid.UUID
    path: str  # relative to the archive folder
    sha256: str
    size_bytes: int


_UUID = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_PATH = re.compile(rf"run_archives/({_UUID})/run_snapshot_\d{{8}}T\d{{6}}\.\d{{6}}Z\.json\.zip", re.ASCII)


def path_of(run_id: uuid.UUID, created_at: dt.datetime) -> str:
    """Return the path of a bundle made at that instant, to the microsecond, relative to the archive folder."""
    return f"run_archives/{run_id}/run_snapshot_{created_at.astimezone(dt.UTC):%Y%m%dT%H%M%S.%fZ}.json.zip"


def is_path_of(path: str, run_id: uuid.UUID) -> bool:
    """Tell whether a path is one that `path_of` makes for that run."""
    matched = _PATH.fullmatch(path)
    return matched is not None and matched.group(1) == str(run_id)


COVERING = """(
    SELECT a.archive_id FROM run_archives a WHERE a.run_id = r.run_id
    ORDER BY a.compacted_through_seq <= {since_seq} DESC, a.last_seq DESC LIMIT 1)"""
"""The newest bundle of `r` that holds its events after a number: for use in a statement, with the number filled in."""

_COVERING = text(f"SELECT {COVERING.format(since_seq=':since_seq')} FROM (SELECT CAST(:run_id AS uuid) AS run_id) r")  # noqa: S608 - constants


async def covering(connection: AsyncConnection, run_id: uuid.UUID, since_seq: int) -> uuid.UUID | None:
    """Return the newest bundle that holds a run's events after `since_seq`; None when the run has no bundle."""
    found: uuid.UUID | None = (
        await connection.execute(_COVERING, {"run_id": run_id, "since_seq": since_seq})
    ).scalar_one()
    return found
