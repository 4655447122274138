"""Revisions: immutable versions of all quotas, of which one is in force; proposed, shadowed, activated, rolled back.

The states, what may be relied on and what happens when something fails: docs/quotas.md. Each function here is one step
inside the caller's transaction, under one advisory lock; the database itself refuses to change a revision's values, to
forget one, or to be left without an active one (migration 0005). Who learns of a change, and when: `inforce`.
"""

from __future__ import annotations

import datetime as dt
import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Identity, Index, insert, select, text, update
from sqlalchemy.dialects.postgresql import JSON
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import Mapped, mapped_column

from service.db import Base
from service.errors import IllegalState, Invalid, NotFound
from service.quota.guardrails import GUARDRAILS, Finding, Guardrail, ask
from service.quota.tables import Provenance, RevisionFile, Tables
from service.runs import Instant


class State(enum.StrEnum):
    """Where a revision stands."""

    PROPOSED = "proposed"  # stored, without effect
    SHADOW = "shadow"  # asked beside the active one, refuses nobody
    ACTIVE = "active"  # in force
    SUPERSEDED = "superseded"  # was in force
    REJECTED = "rejected"  # never was in force and never will be


class Change(enum.StrEnum):
    """What happened to a revision."""

    INSTALL = "install"  # the first one came with the schema
    PROPOSE = "propose"  # it was stored
    SHADOW = "shadow"  # it is asked beside the active one
    UNSHADOW = "unshadow"  # another one is asked in its place
    ACTIVATE = "activate"  # it was put in force
    REFUSE = "refuse"  # guardrails refused to put it in force; its state stayed
    SUPERSEDE = "supersede"  # another one took its place
    ROLLBACK = "rollback"  # it was put back in force
    REJECT = "reject"  # somebody decided against it
    RECALIBRATE = "recalibrate"  # the recalibration that proposed it went on; its state may be as it was


class QuotaRevision(Base, kw_only=True):
    """One version of all quotas. Only its state ever changes."""

    __tablename__ = "quota_revisions"
    __table_args__ = (
        CheckConstraint("state IN ('proposed','shadow','active','superseded','rejected')", name="state"),
        Index("quota_revisions_active_idx", "state", unique=True, postgresql_where=text("state = 'active'")),
        Index("quota_revisions_shadow_idx", "state", unique=True, postgresql_where=text("state = 'shadow'")),
    )

    revision: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """Counts from 1 without gaps."""
    limits: Mapped[dict[str, Any]] = mapped_column(JSON)
    """`tables.Tables`."""
    provenance: Mapped[dict[str, Any]] = mapped_column(JSON)
    """`tables.Provenance`."""
    state: Mapped[str]
    """A State."""
    proposed_at: Mapped[dt.datetime] = mapped_column(Instant)


class QuotaChange(Base, kw_only=True):
    """One thing that happened to a revision. Rows are added and never changed."""

    __tablename__ = "quota_changes"

    change_id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    """In the order of the changes."""
    revision: Mapped[int] = mapped_column(ForeignKey("quota_revisions.revision"), index=True)
    kind: Mapped[str]
    """A Change."""
    from_state: Mapped[str | None]
    to_state: Mapped[str]
    replaced: Mapped[int | None] = mapped_column(ForeignKey("quota_revisions.revision"))
    """The revision that was in force until then."""
    at: Mapped[dt.datetime] = mapped_column(Instant)
    by: Mapped[str]
    """Who wanted it."""
    reason: Mapped[str | None]
    findings: Mapped[list[Any]] = mapped_column(JSON, server_default="[]")
    """What guardrails said against it: a list of Finding."""


class Revision(NamedTuple):
    """A revision as it stands."""

    revision: int
    state: State
    limits: Tables
    provenance: Provenance
    proposed_at: dt.datetime


class Happened(msgspec.Struct, frozen=True):
    """One change of a revision's history; QuotaChange explains each field."""

    change: Change
    from_state: State | None
    to_state: State
    replaced: int | None
    at: dt.datetime
    by: str | None  # null for who may not know, as the next two
    reason: str | None
    findings: list[Finding] | None


class Activation(NamedTuple):
    """What became of an attempt to put a revision in force."""

    activated: bool
    replaced: int  # what is, or was until now, in force
    findings: tuple[Finding, ...]  # what guardrails said, overruled or not


LOCK = text("SELECT pg_advisory_xact_lock(hashtext('plimsoll.quotas'))")
CLOCK = text("SELECT clock_timestamp()")

MOST_AUTHOR_CHARACTERS, MOST_REASON_CHARACTERS = 200, 2000
"""Longest name and reason in the history: it is read as lines, and nothing is ever removed from it."""


async def propose(connection: AsyncConnection, file: RevisionFile, by: str) -> int:
    """Store a revision and return its number; it has no effect yet."""
    now = await lock(connection)
    last = (await connection.execute(text("SELECT max(revision) FROM quota_revisions"))).scalar_one()
    revision = int(last) + 1
    await connection.execute(
        insert(QuotaRevision).values(
            revision=revision,
            limits=msgspec.to_builtins(file.limits),
            provenance=msgspec.to_builtins(file.provenance),
            state=State.PROPOSED,
            proposed_at=now,
        )
    )
    await _note(connection, revision, Change.PROPOSE, None, State.PROPOSED, now, by, file.provenance.note)
    return revision


async def shadow(connection: AsyncConnection, revision: int, by: str, reason: str | None = None) -> None:
    """Have a proposed revision asked beside the active one; raises NotFound and IllegalState."""
    now = await lock(connection)
    found = await find(connection, revision)
    if found.state is not State.PROPOSED:
        raise IllegalState(f"revision {revision} is {found.state}: only a proposed one can become the shadow")
    other = await _in_state(connection, State.SHADOW)
    if other is not None:
        await _move(connection, other, Change.UNSHADOW, State.SHADOW, State.PROPOSED, now, by, reason)
    await _move(connection, revision, Change.SHADOW, State.PROPOSED, State.SHADOW, now, by, reason)


async def activate(
    connection: AsyncConnection,
    revision: int,
    by: str,
    reason: str | None = None,
    *,
    force: bool = False,
    guardrails: Sequence[Guardrail] = GUARDRAILS,
) -> Activation:
    """Put a proposed or shadow revision in force, unless a guardrail refuses; a refusal is kept in the history.

    `force` overrules the guardrails that may be overruled, and needs a reason. Raises NotFound, IllegalState, Invalid.
    """
    if force and not (reason or "").strip():
        raise Invalid("reason", "say why the guardrails are overruled")
    now = await lock(connection)
    found = await find(connection, revision)
    if found.state not in (State.PROPOSED, State.SHADOW):
        raise IllegalState(
            f"revision {revision} is {found.state}: only a proposed one or the shadow can be activated;"
            " `rollback` goes back, and the same table can be proposed again"
        )
    current = await active(connection)
    findings = ask(guardrails, current.limits, found.limits, found.provenance, now, force=force)
    if not all(finding.forced for finding in findings):
        await _note(connection, revision, Change.REFUSE, found.state, found.state, now, by, reason, findings=findings)
        return Activation(False, current.revision, findings)
    await _replace(connection, current.revision, found, Change.ACTIVATE, now, by, reason, findings)
    return Activation(True, current.revision, findings)


async def rollback(connection: AsyncConnection, by: str, reason: str | None = None) -> Activation:
    """Put back the revision that the active one replaced, whatever guardrails would say; raises IllegalState."""
    now = await lock(connection)
    current = await active(connection)
    replaced = (
        await connection.execute(
            select(QuotaChange.replaced)
            .where(QuotaChange.revision == current.revision, QuotaChange.kind == Change.ACTIVATE)
            .order_by(QuotaChange.change_id.desc())
            .limit(1)
        )
    ).scalar()
    if replaced is None:
        raise IllegalState(f"revision {current.revision} is the first: there is nothing to go back to")
    former = await find(connection, replaced)
    await _replace(connection, current.revision, former, Change.ROLLBACK, now, by, reason, ())
    return Activation(True, current.revision, ())


async def reject(connection: AsyncConnection, revision: int, by: str, reason: str | None = None) -> None:
    """Decide against a revision that is not in force yet; raises NotFound and IllegalState."""
    now = await lock(connection)
    found = await find(connection, revision)
    if found.state not in (State.PROPOSED, State.SHADOW):
        raise IllegalState(f"revision {revision} is {found.state}: only a proposed one or the shadow can be rejected")
    await _move(connection, revision, Change.REJECT, found.state, State.REJECTED, now, by, reason)


_COLUMNS = (
    QuotaRevision.revision,
    QuotaRevision.state,
    QuotaRevision.limits,
    QuotaRevision.provenance,
    QuotaRevision.proposed_at,
)


async def find(connection: AsyncConnection, revision: int) -> Revision:
    """Return a revision; raises NotFound."""
    found = (await connection.execute(select(*_COLUMNS).where(QuotaRevision.revision == revision))).first()
    if found is None:
        raise NotFound(f"there is no quota revision {revision}")
    return _revision(found)


async def active(connection: AsyncConnection) -> Revision:
    """Return the revision in force."""
    return _revision((await connection.execute(select(*_COLUMNS).where(QuotaRevision.state == State.ACTIVE))).one())


async def newest(connection: AsyncConnection, most: int, before: int | None = None) -> list[Revision]:
    """Return revisions, newest first, those below `before`."""
    asked = select(*_COLUMNS).order_by(QuotaRevision.revision.desc()).limit(most)
    if before is not None:
        asked = asked.where(QuotaRevision.revision < before)
    return [_revision(row) for row in await connection.execute(asked)]


async def changes(connection: AsyncConnection, revisions: Sequence[int]) -> dict[int, list[Happened]]:
    """Return what happened to each of these revisions, oldest first."""
    told: dict[int, list[Happened]] = {revision: [] for revision in revisions}
    found = await connection.execute(
        select(QuotaChange.__table__).where(QuotaChange.revision.in_(list(revisions))).order_by(QuotaChange.change_id)
    )
    for row in found:
        told[row.revision].append(
            Happened(
                Change(row.kind),
                None if row.from_state is None else State(row.from_state),
                State(row.to_state),
                row.replaced,
                row.at,
                row.by,
                row.reason,
                msgspec.convert(row.findings, list[Finding]),
            )
        )
    return told


def require_name(by: str) -> str:
    """Return who acts; raises Invalid for a name that says nothing."""
    name = by.strip()
    if not name or len(name) > MOST_AUTHOR_CHARACTERS or not name.isprintable():
        raise Invalid("by", f"give 1 to {MOST_AUTHOR_CHARACTERS} printable characters")
    return name


async def ask_about(
    connection: AsyncConnection, revision: Revision, guardrails: Sequence[Guardrail], now: dt.datetime
) -> tuple[Finding, ...]:
    """Return what guardrails would say against a revision in the place of the one in force; nothing is changed."""
    return ask(guardrails, (await active(connection)).limits, revision.limits, revision.provenance, now, force=False)


async def note_recalibration(
    connection: AsyncConnection, revision: int, now: dt.datetime, by: str, reason: str, findings: Sequence[Finding]
) -> None:
    """Write into a revision's history what the recalibration that proposed it did."""
    state = (await find(connection, revision)).state
    await _note(connection, revision, Change.RECALIBRATE, state, state, now, by, reason, findings=findings)


async def lock(connection: AsyncConnection) -> dt.datetime:
    """Wait for everybody who changes a state; what is read from here on is what the last one of them left."""
    await connection.execute(LOCK)
    now: dt.datetime = (await connection.execute(CLOCK)).scalar_one()
    return now


async def _in_state(connection: AsyncConnection, state: State) -> int | None:
    found = (await connection.execute(select(QuotaRevision.revision).where(QuotaRevision.state == state))).scalar()
    return None if found is None else int(found)


async def _replace(
    connection: AsyncConnection,
    old: int,
    new: Revision,
    kind: Change,
    now: dt.datetime,
    by: str,
    reason: str | None,
    findings: Sequence[Finding],
) -> None:
    """Put one revision in the place of the active one: the old one leaves first, as two are never allowed."""
    await _move(connection, old, Change.SUPERSEDE, State.ACTIVE, State.SUPERSEDED, now, by, reason)
    await _move(
        connection, new.revision, kind, new.state, State.ACTIVE, now, by, reason, replaced=old, findings=findings
    )


async def _move(
    connection: AsyncConnection,
    revision: int,
    kind: Change,
    from_state: State,
    to_state: State,
    now: dt.datetime,
    by: str,
    reason: str | None,
    *,
    replaced: int | None = None,
    findings: Sequence[Finding] = (),
) -> None:
    await connection.execute(
        update(QuotaRevision).where(QuotaRevision.revision == revision).values(state=to_state.value)
    )
    await _note(connection, revision, kind, from_state, to_state, now, by, reason, replaced=replaced, findings=findings)


async def _note(
    connection: AsyncConnection,
    revision: int,
    kind: Change,
    from_state: State | None,
    to_state: State,
    now: dt.datetime,
    by: str,
    reason: str | None,
    *,
    replaced: int | None = None,
    findings: Sequence[Finding] = (),
) -> None:
    """Add a line to the history."""
    if reason is not None and (len(reason) > MOST_REASON_CHARACTERS or "\x00" in reason):
        raise Invalid("reason", f"give at most {MOST_REASON_CHARACTERS} characters, without U+0000")
    await connection.execute(
        insert(QuotaChange).values(
            revision=revision,
            kind=kind.value,
            from_state=None if from_state is None else from_state.value,
            to_state=to_state.value,
            replaced=replaced,
            at=now,
            by=require_name(by),
            reason=reason,
            findings=msgspec.to_builtins(list(findings)),
        )
    )


def _revision(row: Any) -> Revision:
    return Revision(
        row.revision,
        State(row.state),
        msgspec.convert(row.limits, Tables),
        msgspec.convert(row.provenance, Provenance),
        row.proposed_at,
    )
