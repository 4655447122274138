"""Joining subruns: when a group of children is joined, when it has failed, and what its parent does then.

Pure: counters, policies and an instant come in, a state goes out. A run's children belong to groups; the options of a
group are fixed by its first spawn, and each group is judged by itself. The counters stand on the group's own row, which
changes only under its parent's row lock, so a judgement never has to read the children. The rules as a table, and what
becomes of children that nobody waits for any more: docs/joins.md. Who asks: `pen` and `advance`.
"""

from __future__ import annotations

import datetime as dt
import enum
import uuid
from collections.abc import Iterable

import msgspec
from sqlalchemy import CheckConstraint, ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from service.db import Base
from service.runs import Instant


class JoinPolicy(enum.StrEnum):
    """How many children of a group must have ended well before their parent goes on."""

    WAIT_ALL = "WAIT_ALL"  # every one that was spawned
    WAIT_ANY = "WAIT_ANY"  # one
    QUORUM = "QUORUM"  # as many as `quorum` says
    TIMEOUT = "TIMEOUT"  # every one, or as many as have ended when `timeout_seconds` have passed


class FailurePolicy(enum.StrEnum):
    """What a child that ended FAILED or CANCELED means for its group, and what becomes of the siblings left over."""

    FAIL_FAST = "FAIL_FAST"  # the group fails with the first one
    CANCEL_SIBLINGS = "CANCEL_SIBLINGS"  # the group fails when its goal is out of reach; once decided, others are ended
    IGNORE_FAILURE = "IGNORE_FAILURE"  # it counts like a child that completed


class GroupState(enum.StrEnum):
    """Where a group stands."""

    WAITING = "WAITING"  # its goal is ahead
    JOINED = "JOINED"  # its parent need not wait for it
    FAILED = "FAILED"  # its goal is out of reach: its parent fails


class Decision(enum.StrEnum):
    """What a run does about all its children."""

    WAIT = "WAIT"  # a group's goal is ahead, or an announced child is still to be spawned
    RESUME = "RESUME"  # nothing to wait for
    FAIL = "FAIL"  # a group failed, or the wait took too long


class SubrunGroup(Base, kw_only=True):
    """One group of a run's children. Changed only while the parent's row is locked."""

    __tablename__ = "subrun_groups"
    __table_args__ = (
        CheckConstraint("pending >= 0 AND failed >= 0 AND pending + failed <= spawned", name="counts"),
        CheckConstraint("(state = 'WAITING') = (decided_at IS NULL)", name="decided"),
        CheckConstraint("(join_policy = 'QUORUM') = (quorum IS NOT NULL)", name="quorum"),
        {"postgresql_with": {"fillfactor": 80}},
    )

    run_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("runs.run_id"), primary_key=True)
    """The parent."""
    group_id: Mapped[str] = mapped_column(primary_key=True)
    join_policy: Mapped[str]
    """A JoinPolicy."""
    failure_policy: Mapped[str]
    """A FailurePolicy."""
    quorum: Mapped[int | None] = mapped_column(default=None)
    """How many children the join policy QUORUM waits for; null for the others."""
    timeout_seconds: Mapped[float | None] = mapped_column(default=None)
    """Longest wait, counted from the group's first spawn; null without a bound."""
    deadline_at: Mapped[dt.datetime | None] = mapped_column(Instant, default=None)
    """When `timeout_seconds` have passed; moved by as long as the parent is paused."""
    spawned: Mapped[int] = mapped_column(default=0)
    pending: Mapped[int] = mapped_column(default=0)
    """Children of the group that are not final."""
    failed: Mapped[int] = mapped_column(default=0)
    """Children of the group that ended FAILED or CANCELED."""
    state: Mapped[str] = mapped_column(default=GroupState.WAITING)
    """A GroupState."""
    decided_at: Mapped[dt.datetime | None] = mapped_column(Instant, default=None)
    """When the state left WAITING."""


class Group(msgspec.Struct, frozen=True):
    """The columns of a group that the engine reads and writes, named and explained in SubrunGroup."""

    run_id: uuid.UUID
    group_id: str
    join_policy: str
    failure_policy: str
    quorum: int | None
    timeout_seconds: float | None
    deadline_at: dt.datetime | None
    spawned: int
    pending: int
    failed: int
    state: str
    decided_at: dt.datetime | None

    @property
    def completed(self) -> int:
        """How many children ended COMPLETED."""
        return self.spawned - self.pending - self.failed

    @property
    def need(self) -> int | None:
        """How many children must end well; null when all of them must."""
        return 1 if self.join_policy == JoinPolicy.WAIT_ANY else self.quorum

    @property
    def leaves_siblings(self) -> bool:
        """Whether children are still running although the group was joined, and its policy ends them."""
        return (
            self.state == GroupState.JOINED
            and self.pending > 0
            and self.failure_policy == FailurePolicy.CANCEL_SIBLINGS
        )


def judge(group: Group, more: float, now: dt.datetime) -> GroupState:
    """Say where a group stands at `now`, when at most `more` children are still to be spawned into it.

    A state other than WAITING stands: children that end later change nothing about it.
    """
    if group.state != GroupState.WAITING:
        return GroupState(group.state)
    policy, need = FailurePolicy(group.failure_policy), group.need
    if group.failed and policy is FailurePolicy.FAIL_FAST:
        return GroupState.FAILED
    if need is None:
        if group.failed and policy is FailurePolicy.CANCEL_SIBLINGS:
            return GroupState.FAILED
        if group.pending == 0:
            return GroupState.JOINED
    else:
        ended_well = group.completed + (group.failed if policy is FailurePolicy.IGNORE_FAILURE else 0)
        if ended_well >= need:
            return GroupState.JOINED
        if ended_well + group.pending + more < need:
            return GroupState.FAILED
    if group.deadline_at is not None and now >= group.deadline_at:
        return GroupState.JOINED if group.join_policy == JoinPolicy.TIMEOUT else GroupState.FAILED
    return GroupState.WAITING


def reopens(group: Group) -> bool:
    """Tell whether one more child makes a group wait again: it was joined only because nobody was left in it."""
    return group.state == GroupState.JOINED and group.need is None


def decide(states: Iterable[str], missing: int, wait_until: dt.datetime | None, now: dt.datetime) -> Decision:
    """Decide at `now` for a run with groups in these states and `missing` announced children not yet spawned.

    A failed group outweighs a complete join, and a complete join outweighs the end of the run's own wait.
    """
    seen = set(states)
    if GroupState.FAILED in seen:
        return Decision.FAIL
    if missing == 0 and GroupState.WAITING not in seen:
        return Decision.RESUME
    if wait_until is not None and now >= wait_until:
        return Decision.FAIL
    return Decision.WAIT


def why_failed(group: Group) -> str:
    """Say in one line why a group failed."""
    name, counts = f"group {group.group_id}", f"{group.completed} completed, {group.pending} pending"
    if group.failed and (group.failure_policy == FailurePolicy.FAIL_FAST or group.need is None):
        policies = f"{group.join_policy}, {group.failure_policy}"
        return f"{name}: {group.failed} of {group.spawned} subruns ended FAILED or CANCELED ({policies})"
    if group.deadline_at is not None and group.decided_at is not None and group.decided_at >= group.deadline_at:
        return (
            f"{name}: waited {group.timeout_seconds:g} s for {group.join_policy} of {group.spawned} subruns: {counts}"
        )
    return f"{name}: {group.join_policy} of {group.need} was out of reach of {group.spawned} subruns: {counts}"


def why_waited_in_vain(expected: int, spawned: int, pending: int, max_wait_seconds: float) -> str:
    """Say in one line for what a run waited when its own wait ended."""
    missing = max(0, expected - spawned)
    return (
        f"waited {max_wait_seconds:g} s for {missing + pending} of {expected} expected subruns: "
        f"{missing} never spawned, {pending} unfinished"
    )
