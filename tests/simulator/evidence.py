"""What a simulation came to, in lines for a terminal and as the page docs/evidence/simulator.md."""

from __future__ import annotations

import datetime as dt
import os
import platform
from collections import Counter
from typing import NamedTuple

from harness.machine import machine
from tests.simulator.breach import Broken
from tests.simulator.mutants import MOST_STEPS, MUTANTS, Mutant, mutated
from tests.simulator.world import simulate

FAULTS = {
    "kill": "processes killed, workers and callers, each between two of their points",
    "interrupt": "workers told to stop that waited no longer for tools and models",
    "full_lane": "batches handed back by workers that waited for as many tools and models as they may",
    "outage": "transactions that the database was away for, or whose commit's answer was lost",
    "lose_ring": "rings lost",
    "late_ring": "rings that came late",
    "double_ring": "rings that came twice",
    "poison": "runs whose steps the database refused",
}


class Found(NamedTuple):
    """A seeded bug, and in which episode the simulator met it; null when it did not."""

    bug: str
    episode: int | None


class Simulated(NamedTuple):
    """A whole simulation."""

    seed: int
    steps: int
    episodes: int
    duration_s: float
    seen: Counter[str]
    mutants: list[Found]
    commit: str | None  # when it began

    def lines(self) -> list[str]:
        """Return the figures, one a line."""
        return [
            f"{self.steps:,} steps in {self.episodes:,} episodes from seed {self.seed}, no promise broken",
            f"{self.duration_s:,.0f} s, {self.steps / self.duration_s:,.0f} steps a second",
            *(f"{self.seen[fault]:,} {told}" for fault, told in FAULTS.items()),
            *(self._ends(what) for what in ("runs", "tool calls")),
            f"{self.seen['tools started']:,} tools started, none twice",
            f"{self.seen['approved']:,} tool calls approved, {self.seen['rejected']:,} rejected",
            f"{self.seen['decided while paused']:,} of them decided while their run was paused",
        ]

    def _ends(self, what: str) -> str:
        ends = {key.partition(f"{what} ")[2]: count for key, count in self.seen.items() if key.startswith(f"{what} ")}
        told = ", ".join(f"{count:,} {status}" for status, count in sorted(ends.items()))
        return f"{sum(ends.values()):,} {what}: {told}"


def find_mutants() -> list[Found]:
    """Put each seeded bug back in turn, and see in which episode the simulator finds it; as the tests do."""
    return [Found(mutant.bug, _episode_that_breaks(mutant)) for mutant in MUTANTS]


def _episode_that_breaks(mutant: Mutant) -> int | None:
    with mutated(mutant):
        try:
            simulate(0, MOST_STEPS)
        except Broken as broken:
            return broken.episode
    return None


def page(simulated: Simulated, command: str) -> str:
    """Return the whole page."""
    where, version = machine(), platform.python_version()
    figures = "\n".join(f"- {line}" for line in simulated.lines())
    mutants = "\n".join(f"| {each.bug} | {each.episode or 'not found'} |" for each in simulated.mutants)
    found = sum(each.episode is not None for each in simulated.mutants)
    return f"""# Evidence: the simulator

Written by

    {command}

Run it to repeat this: the same commit and seed live through the same steps, to the microsecond of simulated time; only
the duration is the machine's. What the simulator does, and what it cannot see, is in [simulator.md](../simulator.md).

- on {dt.datetime.now(dt.UTC):%Y-%m-%d}, commit {simulated.commit or "unknown"}
- {where["cpu"]}, one of {where["cpu_count"]} cores; {where["system"]} {where["release"]}; Python {version}
- load average at the end {os.getloadavg()[0]:.1f}

## What was lived through

{figures}

A step is what happens between two points at which somebody else may go on: a transaction, a commit, an announcement, a
wait. After every transaction the whole of what it changed is checked.

## Seeded bugs

{found} of {len(simulated.mutants)} were found, each within {MOST_STEPS:,} steps from seed 0. `make test` does the same.

| put back into the engine | found in episode |
|---|---|
{mutants}
"""
