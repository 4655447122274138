"""One recalibration from its measurement to its end: what comes next, and when. Pure; the map: docs/recalibration.md.

Nothing here waits: whoever looks (a worker, once a minute) passes what is known now and carries out the turn that is
returned. So it does not matter who looks, how often, or who died in between: the phase stands in the database, and the
figures that a turn is decided on are counted there too.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from service.quota.guardrails import MOST_AGE
from service.quota.limits import Limit


class Phase(enum.StrEnum):
    """Where a recalibration stands."""

    MEASURING = "measuring"  # somebody measures, under a lease
    SHADOW = "shadow"  # its table is asked beside the active one, and refuses nobody
    WAITING = "waiting"  # a person has to activate or reject it
    CANARY = "canary"  # in force for a few workspaces
    WATCHED = "watched"  # in force for all, and taken back by itself when refusals or errors rise
    UNCHANGED = "unchanged"  # end: what was measured does not contradict the table in force
    KEPT = "kept"  # end: in force, and nothing rose
    ROLLED_BACK = "rolled_back"  # end: something rose, the table before is in force again
    REFUSED = "refused"  # end: a doubt, a guardrail or a person was against it
    OVERTAKEN = "overtaken"  # end: a person put another table in force meanwhile
    ABANDONED = "abandoned"  # end: whoever measured died


FINAL = frozenset({Phase.UNCHANGED, Phase.KEPT, Phase.ROLLED_BACK, Phase.REFUSED, Phase.OVERTAKEN, Phase.ABANDONED})
"""Phases that are the end."""

MOST_NEW_REFUSALS = 0.01
"""Share of requests that a shadow may newly refuse: one in a hundred is a client that bursts now and then."""

MOST_RISE = 0.01
"""By how much the share of refused requests, or of failed runs, may rise once the table is in force."""

FEWEST_ASKED = 100
"""Requests below which a share says nothing: with 100, a share of 1 % is one request."""

SURE_Z = 3.0
"""Standard errors by which a rise must exceed the bound; how often looking every minute for a day then takes a steady
table back is in docs/evidence/recalibration-calibration.md."""


@dataclass(frozen=True)
class Plan:
    """How a recalibration is carried out."""

    needs_approval: bool = True  # a person activates; the default, as in production
    shadow_s: float = 86_400.0  # as long as a day, so that its busy hour is in it
    canary_s: float = 3_600.0
    watch_s: float = 86_400.0
    canary_percent: int = 5  # of workspaces, chosen by their ids


class Count(NamedTuple):
    """Requests, or runs, of which some went wrong."""

    asked: int
    wrong: int

    @property
    def share(self) -> float:
        """Return the share that went wrong; 0 of none."""
        return self.wrong / self.asked if self.asked else 0.0


Counts = Mapping[str, Count]
"""Refused requests by limit, and failed runs as `runs`."""


@dataclass(frozen=True)
class Figures:
    """What was counted. Limits that nobody asked for are not there."""

    shadow: Counts = field(default_factory=dict)  # requests that only the shadow would have refused
    before: Counts = field(default_factory=dict)  # under the table in force, before the phase
    during: Counts = field(default_factory=dict)  # under the new one, in the phase


class Standing(NamedTuple):
    """How the revisions stand."""

    state: str  # of the proposal: `revisions.State`
    active: int  # the revision in force
    against: int  # the one that was in force when it was decided


class Turn(NamedTuple):
    """What happens now."""

    phase: Phase  # from now on
    reason: str


def turn(
    phase: Phase,
    in_phase_s: float,
    revision: int,
    lowered: Collection[Limit],
    standing: Standing,
    plan: Plan,
    figures: Figures,
) -> Turn | None:
    """Return what a recalibration does next; None: it stays where it is."""
    if phase in FINAL or phase is Phase.MEASURING:
        return None
    return _decided_by_a_person(phase, revision, standing) or _PHASES[phase](in_phase_s, lowered, plan, figures)


def _decided_by_a_person(phase: Phase, revision: int, standing: Standing) -> Turn | None:
    """Follow what somebody did by command."""
    if phase is Phase.WATCHED:
        if standing.active == revision:
            return None
        return Turn(Phase.OVERTAKEN, f"revision {standing.active} was put in force by hand")
    if standing.active == revision:
        return Turn(Phase.WATCHED, "activated by hand")
    if standing.active != standing.against:
        return Turn(Phase.OVERTAKEN, f"revision {standing.active} was put in force by hand")
    if standing.state == "rejected":
        return Turn(Phase.REFUSED, "rejected by hand")
    if phase in (Phase.SHADOW, Phase.CANARY) and standing.state != "shadow":
        return Turn(Phase.OVERTAKEN, "another shadow was put in its place by hand")
    return None


def _shadow(in_phase_s: float, lowered: Collection[Limit], plan: Plan, figures: Figures) -> Turn | None:
    """Give up as soon as too much would be refused; wait for a person where nobody asked."""
    for name, count in sorted(figures.shadow.items()):
        if count.asked >= FEWEST_ASKED and count.share > MOST_NEW_REFUSALS:
            return Turn(
                Phase.REFUSED,
                f"as shadow, {name} would newly refuse {count.wrong:,} of {count.asked:,} requests"
                f" ({count.share:.1%}; at most {MOST_NEW_REFUSALS:.0%})",
            )
    if in_phase_s < plan.shadow_s:
        return None
    unasked = [each for each in sorted(lowered) if figures.shadow.get(each, Count(0, 0)).asked < FEWEST_ASKED]
    if unasked:
        return Turn(
            Phase.WAITING,
            f"{', '.join(unasked)} would be lowered, and fewer than {FEWEST_ASKED} requests were asked about it",
        )
    if plan.needs_approval:
        return Turn(Phase.WAITING, "a person activates or rejects it")
    return Turn(Phase.CANARY, "the shadow refused no more than it may")


def _waiting(in_phase_s: float, lowered: Collection[Limit], plan: Plan, figures: Figures) -> Turn | None:
    """Wait for a person, as long as a measurement is fresh."""
    if in_phase_s > MOST_AGE.total_seconds():
        return Turn(Phase.REFUSED, f"nobody decided within {MOST_AGE.days} days, and the measurement is stale")
    return None


def _canary(in_phase_s: float, lowered: Collection[Limit], plan: Plan, figures: Figures) -> Turn | None:
    """Give up when something rises for the few."""
    if (risen := rise(figures)) is not None:
        return Turn(Phase.REFUSED, f"for the canary workspaces, {risen}")
    return Turn(Phase.WATCHED, "nothing rose for the canary workspaces") if in_phase_s >= plan.canary_s else None


def _watched(in_phase_s: float, lowered: Collection[Limit], plan: Plan, figures: Figures) -> Turn | None:
    """Go back when something rises for all."""
    if (risen := rise(figures)) is not None:
        return Turn(Phase.ROLLED_BACK, risen)
    return Turn(Phase.KEPT, "nothing rose") if in_phase_s >= plan.watch_s else None


_PHASES = {Phase.SHADOW: _shadow, Phase.WAITING: _waiting, Phase.CANARY: _canary, Phase.WATCHED: _watched}


def rise(figures: Figures) -> str | None:
    """Say what went wrong more often than before, by more than the bound and more than chance; None: nothing did.

    Two shares are compared by their difference's standard error, each share moved towards a half by one request that
    went wrong and one that did not, so that none has no error at all (Agresti and Caffo, 2000).
    """
    for name, during in sorted(figures.during.items()):
        before = figures.before.get(name, Count(0, 0))
        if during.asked < FEWEST_ASKED:
            continue
        if before.asked < FEWEST_ASKED:  # nobody can say that it was like this before
            before = Count(0, 0)
        now = Count(during.asked + 2, during.wrong + 1)
        then = Count(before.asked + 2, before.wrong + 1) if before.asked else Count(1, 0)
        error = math.sqrt(sum(each.share * (1 - each.share) / each.asked for each in (now, then)))
        if now.share - then.share - MOST_RISE > SURE_Z * error:
            what = "runs failed" if name == "runs" else f"requests were refused by {name}"
            return (
                f"{during.wrong:,} of {during.asked:,} {what} ({during.share:.1%}; before"
                f" {before.wrong:,} of {before.asked:,})"
            )
    return None
