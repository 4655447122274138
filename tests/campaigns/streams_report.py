"""What the streams' campaign found, as the page docs/evidence/streams.md."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.machine import commit, machine

PACKAGES = ("uvicorn", "websockets", "starlette", "redis", "sqlalchemy", "asyncpg")


@dataclass
class Phase:
    """One stretch of the campaign, and how old each push was when its client had it."""

    name: str
    duration_s: float
    delays_ms: list[float]

    def quantile_ms(self, share: float) -> float:
        """Return a quantile of the delays."""
        ordered = sorted(self.delays_ms)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass
class Measured:
    """All that the campaign found."""

    phases: list[Phase]
    faults: list[str]  # what was missing, doubled or out of order; empty is what is promised
    ends: Counter[str]  # how the followers' connections ended during the reconnects
    codes: list[int | None]  # with which each stalled client was closed
    evicted_after_s: list[float]  # in each round with stalled clients: until the last was evicted
    last_seq: dict[str, int]  # of each run

    @property
    def passed(self) -> bool:
        """Whether the promises were kept."""
        return not self.faults and all(code == 1013 for code in self.codes) and all(self.evicted_after_s)

    def verdicts(self) -> list[str]:
        """Return the promises and whether they were kept, one sentence each."""
        after = ", ".join(f"{each:.1f}" for each in self.evicted_after_s)
        evicted = sum(code == 1013 for code in self.codes)
        calm, stalled = self.rounds("without"), self.rounds("with stalled clients")
        moved = statistics.median(b.quantile_ms(0.95) / a.quantile_ms(0.95) for a, b in zip(calm, stalled, strict=True))
        return [
            f"{sum(self.ends.values()):,} reconnects, {len(self.faults)} events missing, doubled or out of order",
            f"{evicted} of {len(self.codes)} stalled clients closed with 1013, each round's last after {after} s",
            f"the p95 of all others moved by {(moved - 1) * 100:+.0f} % (median of {len(calm)} pairs of rounds)",
        ]

    def rounds(self, name: str) -> list[Phase]:
        """Return the phases of a name, in order."""
        return [phase for phase in self.phases if phase.name == name]


def page(measured: Measured) -> str:
    """Return the whole page."""
    where = machine()
    cores = f"{where['cpu']}, {where['cpu_count']} cores shared by service, PostgreSQL, Redis and all clients"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return f"""# Evidence: streams

Written by `make streams` (about two minutes; `tests/campaigns/streams.py`). Run it to repeat this; the numbers
of a machine are its own, the counts of missing and doubled events must be 0 anywhere.

- on {dt.datetime.now(dt.UTC):%Y-%m-%d}, commit {commit() or "unknown"}
- {cores}; {where["system"]} {where["release"]}; load average at the end {os.getloadavg()[0]:.1f}
- {versions}

## What was shown

{bullets(measured.verdicts())}

## Set-up

One HTTP process, 20 workspaces under the default quota, 2 runs in each; each run has 4 followers, each workspace 2
watchers: 200 sockets. Events are appended as the engine does it (number under the row lock, commit, publish), 100 a
second over all runs, {sum(measured.last_seq.values()):,} in all. No worker runs, so that nothing else moves.

1. **Reconnects.** 1,000 times a follower picked at random loses its connection, half of them by a reset, and comes back
   with its last `seq`. At the end every follower must have seen 1, 2, 3 … without a gap or a repeat, and every watcher
   every event of each run since it was listed. How the connections ended: {endings(measured.ends)}.
2. **Stalled clients.** In turn, a round of five seconds with three clients that stop reading and one without. They
   follow a run that gets 100 more events a second of 8 kB each, as do 4 followers and 2 watchers that read. A stalled
   client fills the kernel's buffers, then its outbox; 1013 follows. Delay is how old an event is when a client that
   reads has it, counted from the instant that its transaction gave it.

## Delays of all clients that read

In the first phase they contain the time for which a client was away.

| phase | seconds | pushes | p50 ms | p95 ms | p99 ms |
|---|---|---|---|---|---|
{rows(measured.phases)}
"""


def bullets(sentences: Sequence[str]) -> str:
    """Return sentences as a list."""
    return "\n".join(f"- {sentence}" for sentence in sentences)


def endings(ends: Counter[str]) -> str:
    """Return how connections ended, in words."""
    return ", ".join(f"{count} {how}" for how, count in sorted(ends.items()))


def rows(phases: Sequence[Phase]) -> str:
    """Return the table's rows."""
    cells: list[list[Any]] = [
        [each.name, f"{each.duration_s:.0f}", f"{len(each.delays_ms):,}"]
        + [f"{each.quantile_ms(share):.1f}" for share in (0.5, 0.95, 0.99)]
        for each in phases
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)
