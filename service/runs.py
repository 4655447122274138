"""What a run is: its statuses, the legal ways between them, and its steps.

Pure: nothing here reads a clock or a database. `commits` creates runs, `advance` alone changes their status and asks
`require_legal` each time, `families` has it end several together. The table is also in docs/run-states.md,
and a test holds the two together.
"""

from __future__ import annotations

import datetime as dt
import enum
import uuid
from typing import Any

import uuid_utils.compat
from sqlalchemy import CheckConstraint, ForeignKey, Index, text
from sqlalchemy.dialects.postgresql import JSON, JSONB, TIMESTAMP
from sqlalchemy.orm import Mapped, mapped_column

from service.db import Base


class RunStatus(enum.StrEnum):
    """Where a run stands. The last three are final."""

    PENDING = "PENDING"  # accepted, no tick yet
    RUNNING = "RUNNING"  # at least one tick done, more to do
    PAUSED = "PAUSED"  # stopped by a caller until resumed
    WAITING_FOR_APPROVAL = "WAITING_FOR_APPROVAL"  # a tool call waits for a person
    WAITING_FOR_SUBRUN = "WAITING_FOR_SUBRUN"  # own steps done; subruns are pending or still to be spawned
    COMPLETED = "COMPLETED"  # every step done, every subrun joined
    FAILED = "FAILED"  # a step, a subrun or a wait failed; `error_summary` says which
    CANCELED = "CANCELED"  # ended by a caller, or by the run that spawned it


FINAL = frozenset({RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.CANCELED})
"""Statuses that never change again; they set `ended_at`."""

TRANSITIONS: dict[RunStatus, frozenset[RunStatus]] = {
    RunStatus.PENDING: frozenset({RunStatus.RUNNING, RunStatus.PAUSED, RunStatus.FAILED, RunStatus.CANCELED}),
    RunStatus.RUNNING: frozenset(
        {
            RunStatus.PAUSED,
            RunStatus.WAITING_FOR_APPROVAL,
            RunStatus.WAITING_FOR_SUBRUN,
            RunStatus.COMPLETED,
            RunStatus.FAILED,
            RunStatus.CANCELED,
        }
    ),
    RunStatus.PAUSED: frozenset(
        {
            RunStatus.PENDING,
            RunStatus.RUNNING,
            RunStatus.WAITING_FOR_APPROVAL,
            RunStatus.WAITING_FOR_SUBRUN,
            RunStatus.CANCELED,
        }
    ),
    RunStatus.WAITING_FOR_APPROVAL: frozenset(
        {RunStatus.RUNNING, RunStatus.PAUSED, RunStatus.FAILED, RunStatus.CANCELED}
    ),
    RunStatus.WAITING_FOR_SUBRUN: frozenset(
        {RunStatus.RUNNING, RunStatus.PAUSED, RunStatus.FAILED, RunStatus.CANCELED}
    ),
    RunStatus.COMPLETED: frozenset(),
    RunStatus.FAILED: frozenset(),
    RunStatus.CANCELED: frozenset(),
}
"""Every legal change of status. Of the ways out of PAUSED only one is open to a run: to what it was paused from."""

PAUSABLE = frozenset(old for old, ways in TRANSITIONS.items() if RunStatus.PAUSED in ways)
"""Statuses that a pause may interrupt, and to which a resume returns."""


class IllegalTransition(RuntimeError):
    """The engine tried a change of status that TRANSITIONS does not hold: a bug, never a caller's fault."""


def require_legal(old: RunStatus, new: RunStatus) -> None:
    """Raise IllegalTransition unless a run may go from `old` to `new`."""
    if new not in TRANSITIONS[old]:
        raise IllegalTransition(f"{old} -> {new}")


class StepKind(enum.StrEnum):
    """What a step did."""

    PLAN = "PLAN"  # the agent decided what to do next
    MODEL_CALL = "MODEL_CALL"  # a model was asked
    TOOL_CALL = "TOOL_CALL"  # a tool was asked for
    OBSERVATION = "OBSERVATION"  # a result was taken in
    SUBRUN_SPAWN = "SUBRUN_SPAWN"  # a subrun was spawned
    MESSAGE = "MESSAGE"  # something was said to the user


Instant = TIMESTAMP(timezone=True)


class Run(Base, kw_only=True):
    """One requested execution of an agent."""

    __tablename__ = "runs"
    __table_args__ = (
        CheckConstraint("(ended_at IS NULL) = (status NOT IN ('COMPLETED','FAILED','CANCELED'))", name="ended"),
        CheckConstraint("pending_subruns BETWEEN 0 AND spawned_subruns", name="pending"),
        CheckConstraint("ended_at IS NULL OR next_tick_at IS NULL", name="final_is_never_due"),
        CheckConstraint("(status = 'PAUSED') = (paused_from IS NOT NULL)", name="paused_from"),
        CheckConstraint("(status = 'PAUSED') = (paused_at IS NOT NULL)", name="paused_at"),
        CheckConstraint("status <> 'PAUSED' OR next_tick_at IS NULL", name="paused_is_never_due"),
        CheckConstraint("delayed_under IS NULL OR step_due_at IS NOT NULL", name="only_a_step_is_delayed"),
        Index("runs_due_idx", "next_tick_at", postgresql_where=text("next_tick_at IS NOT NULL")),
        Index("runs_live_idx", "workspace_id", postgresql_where=text("ended_at IS NULL")),
        Index("runs_newest_idx", "workspace_id", text("run_id DESC")),
        Index("runs_ended_idx", "ended_at", "run_id", postgresql_where=text("ended_at IS NOT NULL")),
        Index("runs_children_idx", "parent_run_id", postgresql_where=text("parent_run_id IS NOT NULL")),
        Index("runs_delayed_idx", "workspace_id", "delayed_under", postgresql_where=text("delayed_under IS NOT NULL")),
        {"postgresql_with": {"fillfactor": 80}},
    )

    run_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    workspace_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("workspaces.workspace_id"))
    agent_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("agents.agent_id"))
    parent_run_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("runs.run_id"), default=None)
    depth: Mapped[int] = mapped_column(default=0)
    """0 for a parent run, one more for each spawn below it; rows are locked in order of (depth, run_id)."""
    status: Mapped[str] = mapped_column(default=RunStatus.PENDING)
    """A RunStatus."""
    correlation_id: Mapped[uuid.UUID]
    """Shared by a run and all its descendants: the id of the run that none of them spawned."""
    input_text: Mapped[str] = mapped_column(default="")
    channel: Mapped[str] = mapped_column(default="")
    """Where the request came from, in the caller's words."""
    details: Mapped[dict[str, Any]] = mapped_column("metadata", JSON, default_factory=dict)
    """The caller's own `metadata`; the service never reads it. JSON keeps its text: JSONB would write 1e131071 out."""
    group_id: Mapped[str | None] = mapped_column(default=None)
    """Which group of subruns this one belongs to; null for a parent run."""
    expected_subruns: Mapped[int] = mapped_column(default=0)
    """How many subruns must have been spawned and joined before the run may complete."""
    max_wait_seconds: Mapped[float] = mapped_column(default=60.0)
    """Longest stay in WAITING_FOR_SUBRUN when `expected_subruns` is above 0."""
    spawned_subruns: Mapped[int] = mapped_column(default=0)
    pending_subruns: Mapped[int] = mapped_column(default=0)
    """Subruns spawned by this run that are not final."""
    failed_subruns: Mapped[int] = mapped_column(default=0)
    """Subruns that ended FAILED or CANCELED."""
    script_position: Mapped[int] = mapped_column(default=0)
    """How many steps of the agent's script were executed; independent of `step_count`."""
    tool_call_id: Mapped[uuid.UUID | None] = mapped_column(default=None)
    """The tool call that the run waits for, decided and executed or not; null without one."""
    tool_calls: Mapped[int] = mapped_column(default=0)
    """How many tool calls it has requested."""
    step_count: Mapped[int] = mapped_column(default=0)
    last_seq: Mapped[int] = mapped_column(default=0)
    """Number of the newest event; events are numbered from 1 without gaps."""
    archived_seq: Mapped[int] = mapped_column(default=0)
    """Number of the newest run_archived event; 0 before the first. Below `last_seq`, something happened since."""
    compacted_through_seq: Mapped[int] = mapped_column(default=0)
    """Events with this number and below may be missing here; a bundle holds them. Above it there is no gap."""
    ticks: Mapped[int] = mapped_column(default=0)
    """Worker turns that changed this run."""
    epoch: Mapped[int] = mapped_column(default=0)
    """Counts claims. A worker's write counts only while the epoch is the one that it claimed (fencing)."""
    next_tick_at: Mapped[dt.datetime | None] = mapped_column(Instant, default=None)
    """When the run is due: the earliest of its clocks or, while claimed, the end of the lease."""
    step_due_at: Mapped[dt.datetime | None] = mapped_column(Instant, default=None)
    """When its next step is due, claimed or not; null when no step is left or a wait stands before it."""
    delayed_under: Mapped[str | None] = mapped_column(default=None)
    """The tick rate (`Rate.code`) under which its step was delayed until `step_due_at`; null when it is not."""
    wait_until: Mapped[dt.datetime | None] = mapped_column(Instant, default=None)
    """When WAITING_FOR_SUBRUN turns into FAILED; null without a bound."""
    paused_from: Mapped[str | None] = mapped_column(default=None)
    """The RunStatus to which a resume returns; null unless PAUSED."""
    paused_at: Mapped[dt.datetime | None] = mapped_column(Instant, default=None)
    """When the run was paused; its clocks stand still from then on, and a resume moves them by the pause's length."""
    vain_attempts: Mapped[int] = mapped_column(default=0)
    """Claims in a row that could not be turned into a tick; past a bound the run FAILS."""
    error_summary: Mapped[str | None] = mapped_column(default=None)
    created_at: Mapped[dt.datetime] = mapped_column(Instant)
    started_at: Mapped[dt.datetime | None] = mapped_column(Instant, default=None)
    """First tick."""
    ended_at: Mapped[dt.datetime | None] = mapped_column(Instant, default=None)


class Step(Base, kw_only=True):
    """One thing a run did. Written once, in the transaction that advanced the run."""

    __tablename__ = "steps"

    run_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("runs.run_id"), primary_key=True)
    step_index: Mapped[int] = mapped_column(primary_key=True)
    """From 1, without gaps."""
    kind: Mapped[str]
    """A StepKind."""
    payload: Mapped[dict[str, Any]] = mapped_column(JSONB)
    correlation_id: Mapped[uuid.UUID]
    created_at: Mapped[dt.datetime] = mapped_column(Instant)


def new_id() -> uuid.UUID:
    """Return a UUID whose order is the order of creation (RFC 9562, version 7), so that indexes grow at one end."""
    return uuid_utils.compat.uuid7()
