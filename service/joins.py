"""Joining subruns: whether a run goes on waiting for its children, resumes or fails.

Pure: the children's counters, the policy and the clock come in, a decision goes out. The counters stand on the parent's
own row and change under its lock, so a decision never has to read the children. Who asks: `advance`.
"""

from __future__ import annotations

import datetime as dt
import enum
from typing import NamedTuple


class JoinPolicy(enum.StrEnum):
    """How many children must have ended before their parent goes on."""

    WAIT_ALL = "WAIT_ALL"  # every child that was spawned, and as many as were expected


class FailurePolicy(enum.StrEnum):
    """What a child that ended FAILED or CANCELED means for its parent."""

    FAIL_FAST = "FAIL_FAST"  # the parent fails at its next tick, and cancels the children that are left


class Policy(NamedTuple):
    """Both halves of the rule by which one run joins its children."""

    join: JoinPolicy = JoinPolicy.WAIT_ALL
    failure: FailurePolicy = FailurePolicy.FAIL_FAST


DEFAULT_POLICY = Policy()
"""What a run without other wishes follows."""


class Children(NamedTuple):
    """A run's subruns, counted."""

    expected: int  # how many the creator announced
    spawned: int  # how many were accepted
    pending: int  # how many of them are not final
    failed: int  # how many ended FAILED or CANCELED

    @property
    def missing(self) -> int:
        """How many expected children were never spawned."""
        return max(0, self.expected - self.spawned)


class Decision(enum.StrEnum):
    """What a run does about its children."""

    WAIT = "WAIT"  # some are pending or still to be spawned
    RESUME = "RESUME"  # nothing to wait for
    FAIL = "FAIL"  # a child failed, or the wait took too long


def decide(children: Children, policy: Policy, wait_until: dt.datetime | None, now: dt.datetime) -> Decision:
    """Decide at `now`. A failure outweighs a complete join, and a complete join outweighs the end of the wait."""
    if children.failed and policy.failure is FailurePolicy.FAIL_FAST:
        return Decision.FAIL
    if children.pending == 0 and children.missing == 0:
        return Decision.RESUME
    if wait_until is not None and now >= wait_until:
        return Decision.FAIL
    return Decision.WAIT


def why_failed(children: Children, policy: Policy, max_wait_seconds: float) -> str:
    """Say in one line why `decide` answered FAIL."""
    if children.failed and policy.failure is FailurePolicy.FAIL_FAST:
        return f"{children.failed} of {children.spawned} subruns ended FAILED or CANCELED ({policy.failure})"
    return (
        f"waited {max_wait_seconds:g} s for {children.missing + children.pending} of {children.expected} expected "
        f"subruns: {children.missing} never spawned, {children.pending} unfinished"
    )
