"""The limits by name, and the values that an installation starts with.

A rate is how many requests a second a workspace may make in the long run, with a burst capacity for how many may come
at once after a rest. A cap is how many of something a workspace may hold at one time. The values in force are those of
the active revision (`revisions`); how they are written in a file: `tables`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from fractions import Fraction


class Limit(enum.StrEnum):
    """What is limited. The values are the names that callers see."""

    RUN_CREATION = "run_creation"  # rate of POST /api/runs/
    SUBRUN_SPAWN = "subrun_spawn"  # rate of POST .../spawn_subrun/
    SNAPSHOT_POLL = "snapshot_poll"  # rate of GET .../snapshot/
    TICK = "tick"  # rate of worker turns that take a step; who is over it is delayed, not refused (`backstop`)
    LIVE_PARENT_RUNS = "live_parent_runs"  # cap on runs without a parent that are not final
    LIVE_RUNS = "live_runs"  # cap on runs that are not final, subruns included
    PENDING_SUBRUNS = "pending_subruns"  # cap on a run's subruns that are not final
    WEBSOCKETS = "websockets"  # cap on a workspace's open sockets
    WEBSOCKETS_PER_USER = "websockets_per_user"  # cap on the open sockets of one token
    PENDING_TOOL_CALLS = "pending_tool_calls"  # cap on tool calls that wait for approval
    PENDING_TOOL_CALLS_PER_RUN = "pending_tool_calls_per_run"  # the same for one run


RATES = (Limit.RUN_CREATION, Limit.SUBRUN_SPAWN, Limit.SNAPSHOT_POLL, Limit.TICK)
"""The limits that are rates."""

CAPS = tuple(limit for limit in Limit if limit not in RATES)
"""The limits that are caps."""

MOST = 1_000_000
"""Largest rate and burst: up to there gcra.lua, whose numbers are doubles, counts in whole numbers."""


@dataclass(frozen=True)
class Rate:
    """A sustained rate and what may come at once."""

    per_s: Fraction  # tokens a second; a multiple of 1/1000, so that the limiter counts in whole numbers
    burst: int  # tokens that a rested workspace may spend at once

    def __post_init__(self) -> None:
        if (self.per_s * 1000).denominator != 1 or not 0 < self.per_s <= MOST or not 1 <= self.burst <= MOST:
            raise ValueError(f"a rate is a positive multiple of 1/1000 with a burst from 1, and {MOST:,} at most")

    @property
    def thousandths(self) -> int:
        """The rate as the limiter counts it, in thousandths of a token a second."""
        return int(self.per_s * 1000)

    @property
    def code(self) -> str:
        """The rate as a run's row names the one that it was delayed under: thousandths and burst, as in "41000:41"."""
        return f"{self.thousandths}:{self.burst}"


@dataclass(frozen=True)
class Quota:
    """All limits of one workspace. Null means lifted, and so does a rate that is not there."""

    rates: dict[Limit, Rate]
    live_parent_runs: int | None
    live_runs: int | None
    pending_subruns: int | None
    websockets: int | None
    websockets_per_user: int | None
    pending_tool_calls: int | None
    pending_tool_calls_per_run: int | None
    revision: int | None = field(default=None, compare=False)  # whose values these are; null outside of a database
    shadow: Quota | None = None  # what the shadow revision would say; it refuses nothing

    @property
    def has_caps(self) -> bool:
        """Whether what the workspace holds has to be counted, were it only for the shadow revision."""
        counted = (self.live_parent_runs, self.live_runs, self.pending_subruns) != (None, None, None)
        return counted or (self.shadow is not None and self.shadow.has_caps)

    def cap(self, limit: Limit) -> int | None:
        """Return a cap's value by its name."""
        most: int | None = getattr(self, limit)
        return most


DEFAULT = Quota(
    # The user's table: 25 % of the stable throughput measured on the reference. A burst is about a second's worth;
    # for spawns it is as many as the parents that may live at once, each of which may ask for a child on the spot.
    rates={
        Limit.RUN_CREATION: Rate(Fraction("10.29"), burst=11),
        Limit.SUBRUN_SPAWN: Rate(Fraction("2.14"), burst=5),
        Limit.SNAPSHOT_POLL: Rate(Fraction("18.49"), burst=19),
        Limit.TICK: Rate(Fraction(41), burst=41),
    },
    live_parent_runs=5,
    live_runs=12,
    pending_subruns=4,
    websockets=20,
    websockets_per_user=5,
    pending_tool_calls=6,
    pending_tool_calls_per_run=1,
)
"""What a workspace of the class `default` is under in revision 1, with which every installation starts."""

LIFTED = Quota(
    rates={},
    live_parent_runs=None,
    live_runs=None,
    pending_subruns=None,
    websockets=None,
    websockets_per_user=None,
    pending_tool_calls=None,
    pending_tool_calls_per_run=None,
)
"""What a calibration workspace is under in revision 1: nothing, so that the system itself can be measured."""
