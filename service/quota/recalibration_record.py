"""The recalibration that is under way: begun, handed in, looked after. docs/recalibration.md has the states.

One row, of which the database allows only one that has not ended. Each function is one transaction under the lock of
all revisions (`revisions.LOCK`), so a state and what it does to the revisions are written together or not at all, and
whoever looks next, in whichever process, goes on from there. Every decision is a line in the revision's history and in
the log. What is decided is pure: `recalibration`, `recalibration_cycle`.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from typing import Any, NamedTuple

import msgspec
import structlog
from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Identity, Index, insert, select, text, update
from sqlalchemy.dialects.postgresql import JSON
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import Mapped, mapped_column

from service.db import Base, Database
from service.errors import IllegalState
from service.quota import revisions
from service.quota.guardrails import Finding
from service.quota.limits import Limit
from service.quota.recalibration import Decision, Move, Usage, decide, leaning, unattended
from service.quota.recalibration_counts import BEFORE, FORGET, failures, observed_use, requests_under
from service.quota.recalibration_cycle import FINAL, Count, Figures, Phase, Plan, Standing, Turn, turn
from service.quota.recalibration_evidence import Known
from service.quota.shadow import shadow_counts
from service.quota.tables import RevisionFile
from service.runs import Instant

log = structlog.get_logger()

BY = "recalibration"
"""Who acts, in the history, when no person does."""

LEASE_S = 120.0
"""How long a measurement may go without a sign of life before another one may begin."""


class QuotaRecalibration(Base, kw_only=True):
    """One recalibration."""

    __tablename__ = "quota_recalibrations"
    __table_args__ = (
        CheckConstraint(f"phase IN ({','.join(repr(each.value) for each in Phase)})", name="phase"),
        CheckConstraint(
            f"(ended_at IS NULL) = (phase IN ({','.join(repr(each.value) for each in Phase if each not in FINAL)}))",
            name="ended",
        ),
        CheckConstraint("(lease_until IS NOT NULL) = (phase = 'measuring')", name="lease"),
        Index(
            "quota_recalibrations_open_idx",
            text("(ended_at IS NULL)"),
            unique=True,
            postgresql_where=text("ended_at IS NULL"),
        ),
    )

    recalibration_id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    phase: Mapped[str]
    """A Phase."""
    begun_at: Mapped[dt.datetime] = mapped_column(Instant)
    entered_at: Mapped[dt.datetime] = mapped_column(Instant)
    """When it came into its phase."""
    ended_at: Mapped[dt.datetime | None] = mapped_column(Instant)
    lease_until: Mapped[dt.datetime | None] = mapped_column(Instant)
    """While measuring: from when on whoever measures is taken for dead."""
    by: Mapped[str]
    revision: Mapped[int | None] = mapped_column(ForeignKey("quota_revisions.revision"))
    """What it proposes; null while measuring."""
    against: Mapped[int | None] = mapped_column(ForeignKey("quota_revisions.revision"))
    """What was in force when that was decided."""
    plan: Mapped[dict[str, Any]] = mapped_column(JSON)
    """`recalibration_cycle.Plan`; what a later version has written into it is ignored."""
    moves: Mapped[list[Any]] = mapped_column(JSON, server_default="[]")
    """A list of `recalibration.Move`."""


class HandedIn(NamedTuple):
    """What became of a measurement."""

    recalibration_id: int
    revision: int
    phase: Phase
    decision: Decision


class Stand(msgspec.Struct, frozen=True):
    """How a recalibration stands, for whoever waits for it."""

    recalibration: int | None = None  # null: there was none
    phase: Phase | None = None
    since: dt.datetime | None = None
    ended_at: dt.datetime | None = None  # null: it goes on
    by: str | None = None
    revision: int | None = None  # what it proposes; null while measuring


OPEN = select(QuotaRecalibration.__table__).where(QuotaRecalibration.ended_at.is_(None))
NEWEST = select(QuotaRecalibration.__table__).order_by(QuotaRecalibration.recalibration_id.desc()).limit(1)
LAST = text("""
    SELECT phase FROM quota_recalibrations WHERE ended_at IS NOT NULL AND phase <> 'abandoned'
    ORDER BY recalibration_id DESC LIMIT 1
""")
LAST_MOVES = text("""
    SELECT moves, revision FROM quota_recalibrations WHERE ended_at IS NOT NULL AND moves::text <> '[]'
    ORDER BY recalibration_id DESC LIMIT 1
""")
"""Of the last measurement that was believed: one that was not says nothing, not even that the one before was wrong."""

DUE = text("""
    SELECT coalesce(max(begun_at) <= clock_timestamp() - make_interval(secs => :every_s), true)
    FROM quota_recalibrations WHERE phase <> 'abandoned' OR begun_at > clock_timestamp() - interval '1 hour'
""")
"""One that was abandoned is made up for, an hour later; however many schedules were missed, one makes up for all."""


async def is_due(connection: AsyncConnection, every_s: float) -> bool:
    """Tell whether the last recalibration began at least so long ago."""
    return bool((await connection.execute(DUE, {"every_s": every_s})).scalar_one())


async def begin(connection: AsyncConnection, plan: Plan, by: str, lease_s: float = LEASE_S) -> int:
    """Begin to measure; raises IllegalState when another recalibration is under way. One that died is cleaned up."""
    now = await revisions.lock(connection)
    await _clear_the_way(connection, now)
    return await _open(connection, plan, by, now, Phase.MEASURING, now + dt.timedelta(seconds=lease_s))


async def renew(connection: AsyncConnection, recalibration_id: int, lease_s: float = LEASE_S) -> None:
    """Give a sign of life while measuring; raises IllegalState when it came too late."""
    renewed = await connection.execute(
        text(
            "UPDATE quota_recalibrations SET lease_until = clock_timestamp() + make_interval(secs => :lease_s)"
            " WHERE recalibration_id = :recalibration_id AND phase = 'measuring' RETURNING 1"
        ),
        {"lease_s": lease_s, "recalibration_id": recalibration_id},
    )
    if renewed.first() is None:
        raise IllegalState(f"recalibration {recalibration_id} is not measuring any more: its lease was over")


async def abandon(connection: AsyncConnection, recalibration_id: int) -> None:
    """Give up a measurement, so that the next one need not wait for the end of its lease; others are left alone."""
    now = await revisions.lock(connection)
    row = (await connection.execute(OPEN)).first()
    if row is None or row.recalibration_id != recalibration_id or row.phase != Phase.MEASURING:
        return
    await _write(connection, row, Phase.ABANDONED, now)
    log.warning("recalibration", id=recalibration_id, phase="abandoned", reason="whoever measured gave up")


async def newest(connection: AsyncConnection) -> Stand:
    """Return how the newest recalibration stands."""
    row = (await connection.execute(NEWEST)).first()
    if row is None:
        return Stand()
    return Stand(row.recalibration_id, Phase(row.phase), row.entered_at, row.ended_at, row.by, row.revision)


async def hand_in(
    connection: AsyncConnection,
    file: RevisionFile,
    plan: Plan,
    by: str,
    *,
    usage: Usage,
    recalibration_id: int | None = None,
    machine_worth: float | None = None,
) -> HandedIn:
    """Decide on a measurement and begin to carry the decision out; without an id, a recalibration is begun for it.

    The measurement is kept as a revision whatever becomes of it. Raises IllegalState when another one is under way.
    """
    now = await revisions.lock(connection)
    if recalibration_id is None:
        await _clear_the_way(connection, now)
        lease_until = now + dt.timedelta(seconds=LEASE_S)
        recalibration_id = await _open(connection, plan, by, now, Phase.MEASURING, lease_until)
    else:
        await renew(connection, recalibration_id)
    if (
        await connection.execute(LAST)
    ).scalar() == Phase.ROLLED_BACK:  # what was taken back is not put in force again by itself
        plan = dataclasses.replace(plan, needs_approval=True)
    lean = await _leaning_before(connection, file)
    current = await revisions.active(connection)
    known = Known(current.provenance, now, lean, machine_worth)
    decision = decide(current.limits, file, usage, known)
    revision = await revisions.propose(connection, decision.proposal or file, by)
    await connection.execute(
        update(QuotaRecalibration)
        .where(QuotaRecalibration.recalibration_id == recalibration_id)
        .values(
            revision=revision,
            against=current.revision,
            plan=dataclasses.asdict(plan),
            moves=msgspec.to_builtins(decision.moves),
        )
    )
    row = (await connection.execute(OPEN)).one()
    if decision.doubts:
        taken = Turn(Phase.REFUSED, "the measurement is not believed")
    elif decision.proposal is None:
        taken = Turn(Phase.UNCHANGED, "; ".join(f"{move.limit} {move.outcome}" for move in decision.moves))
    else:
        taken = Turn(Phase.SHADOW, "; ".join(f"{move.limit} {move.outcome}: {move.reason}" for move in decision.moves))
    await _enter(connection, row, taken, now, usage, decision.doubts)
    return HandedIn(recalibration_id, revision, taken.phase, decision)


async def look(database: Database) -> Turn | None:
    """Take the turn that is due, if there is one; to be called once a minute or so, by anybody."""
    async with database.read() as connection:
        now = (await connection.execute(revisions.CLOCK)).scalar_one()
        found = await _next(connection, now)
        if found is None:
            return None
        enters_force = found.phase in (Phase.CANARY, Phase.WATCHED)
        usage = await observed_use(connection, now) if enters_force else {}
    async with database.begin() as connection:
        now = await revisions.lock(connection)
        again = await _next(connection, now)
        if again is None or again.phase is not found.phase:
            return None  # somebody else took it meanwhile, or it is not due any more
        row = (await connection.execute(OPEN)).one()
        return await _enter(connection, row, again, now, usage, ())


async def forget_counts(database: Database) -> None:
    """Delete counts that nothing looks at any more."""
    async with database.begin() as connection:
        await connection.execute(FORGET)


async def _leaning_before(connection: AsyncConnection, file: RevisionFile) -> dict[Limit, float]:
    """Return what the last measurement leans to, of the rates that were measured anew: none can agree with itself."""
    last = (await connection.execute(LAST_MOVES)).first()
    if last is None:
        return {}
    before = (await revisions.find(connection, last.revision)).provenance.measured
    new = {
        limit
        for limit, each in file.provenance.measured.items()
        if limit not in before or each.measured_at > before[limit].measured_at
    }
    lean = leaning(msgspec.convert(last.moves, list[Move]))
    return {limit: goal for limit, goal in lean.items() if limit in new}


async def _clear_the_way(connection: AsyncConnection, now: dt.datetime) -> None:
    """End a measurement whose lease is over; raises IllegalState when a recalibration is under way."""
    row = (await connection.execute(OPEN)).first()
    if row is None:
        return
    if row.lease_until is None or row.lease_until > now:
        since = f"since {row.entered_at:%Y-%m-%d %H:%M:%SZ}, begun by {row.by}"
        raise IllegalState(f"recalibration {row.recalibration_id} is under way: {row.phase} {since}")
    await _write(connection, row, Phase.ABANDONED, now)
    log.warning("recalibration", id=row.recalibration_id, phase="abandoned", reason="whoever measured died")


async def _open(
    connection: AsyncConnection, plan: Plan, by: str, now: dt.datetime, phase: Phase, lease_until: dt.datetime
) -> int:
    values = {
        "phase": phase.value,
        "begun_at": now,
        "entered_at": now,
        "lease_until": lease_until,
        "by": revisions.require_name(by),
        "plan": dataclasses.asdict(plan),
    }
    added = insert(QuotaRecalibration).values(values).returning(QuotaRecalibration.recalibration_id)
    return int((await connection.execute(added)).scalar_one())


async def _next(connection: AsyncConnection, now: dt.datetime) -> Turn | None:
    """Return the turn that is due."""
    row = (await connection.execute(OPEN)).first()
    if row is None or row.revision is None:
        return None
    proposal = await revisions.find(connection, row.revision)
    standing = Standing(proposal.state, (await revisions.active(connection)).revision, row.against)
    moves = msgspec.convert(row.moves, list[Move])
    lowered = _lowered(moves)
    in_phase_s = (now - row.entered_at).total_seconds()
    figures = await _figures(connection, row, now)
    return turn(Phase(row.phase), in_phase_s, row.revision, lowered, standing, msgspec.convert(row.plan, Plan), figures)


async def _figures(connection: AsyncConnection, row: Any, now: dt.datetime) -> Figures:
    """Return what was counted for the phase."""
    phase, since = Phase(row.phase), row.begun_at - BEFORE
    if phase is Phase.SHADOW:
        counted = (await shadow_counts(connection, [row.revision]))[row.revision]
        return Figures(shadow={each.limit: Count(each.asked, each.newly_refused) for each in counted})
    if phase not in (Phase.CANARY, Phase.WATCHED):
        return Figures()
    before = await requests_under(connection, row.against, since)
    during = await requests_under(connection, row.revision, row.entered_at)
    if phase is Phase.WATCHED:
        before["runs"] = await failures(connection, since, row.entered_at)
        during["runs"] = await failures(connection, row.entered_at, now)
    return Figures(before=before, during=during)


async def _enter(
    connection: AsyncConnection, row: Any, taken: Turn, now: dt.datetime, usage: Usage, doubts: tuple[Finding, ...]
) -> Turn:
    """Write the next phase and do to the revisions what it means; what a guardrail refuses ends it."""
    proposal = await revisions.find(connection, row.revision)
    is_pending = proposal.state in (revisions.State.PROPOSED, revisions.State.SHADOW)
    findings = doubts
    if taken.phase is Phase.CANARY:
        findings = await revisions.ask_about(connection, proposal, unattended(usage), now)
    elif taken.phase is Phase.WATCHED and is_pending:
        outcome = await revisions.activate(connection, row.revision, BY, taken.reason, guardrails=unattended(usage))
        findings = outcome.findings
        is_pending = not outcome.activated
    if findings and not doubts:
        taken = Turn(Phase.REFUSED, f"guardrails refuse it: {', '.join(each.guardrail for each in findings)}")
    reason = f"{row.phase} -> {taken.phase}: {taken.reason}"[: revisions.MOST_REASON_CHARACTERS]
    if taken.phase is Phase.SHADOW:
        await revisions.shadow(connection, row.revision, BY, reason)
    elif taken.phase is Phase.ROLLED_BACK:
        await revisions.rollback(connection, BY, reason)
    elif taken.phase in FINAL and is_pending:
        await revisions.reject(connection, row.revision, BY, reason)
    await revisions.note_recalibration(connection, row.revision, now, BY, reason, findings)
    await _write(connection, row, taken.phase, now)
    log.info("recalibration", id=row.recalibration_id, revision=row.revision, phase=taken.phase, reason=taken.reason)
    return taken


async def _write(connection: AsyncConnection, row: Any, phase: Phase, now: dt.datetime) -> None:
    await connection.execute(
        update(QuotaRecalibration)
        .where(QuotaRecalibration.recalibration_id == row.recalibration_id)
        .values(phase=phase.value, entered_at=now, ended_at=now if phase in FINAL else None, lease_until=None)
    )


def _lowered(moves: list[Move]) -> list[Limit]:
    """Return the rates that a decision lowers."""
    return [each.limit for each in moves if (each.new_per_s or 0.0) < (each.old_per_s or 0.0)]
