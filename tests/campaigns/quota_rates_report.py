"""What the rates' campaign found, as the page docs/evidence/quota-rates.md."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
from collections.abc import Sequence
from dataclasses import dataclass

from harness.machine import commit, machine
from tests.campaigns.quota_audit import Behaviour, Cell, faults_of

PACKAGES = ("uvicorn", "starlette", "redis", "sqlalchemy", "asyncpg")


@dataclass
class Measured:
    """All cells, and how long each had to last."""

    cells: list[Cell]
    least_s: float
    without_redis: int = 0  # requests that the service decided without Redis

    def faults(self) -> list[str]:
        """Return every promise that was not kept, and where."""
        faults = [f"{name(cell)}: {fault}" for cell in self.cells for fault in faults_of(cell, self.least_s)]
        if self.without_redis:
            faults.append(f"{self.without_redis} requests decided without Redis, which did not answer in time")
        return faults

    @property
    def passed(self) -> bool:
        """Whether every promise was kept everywhere."""
        return not self.faults()

    def of(self, behaviour: Behaviour) -> list[Cell]:
        """Return the cells of a behaviour."""
        return [cell for cell in self.cells if cell.behaviour is behaviour]

    def verdicts(self) -> list[str]:
        """Return what was shown, one sentence each."""
        greedy, steady, obedient = (self.of(behaviour) for behaviour in Behaviour)
        off = [abs(admitted - entitled) for entitled, admitted in (cell.entitled() for cell in greedy)]
        retries = sum(cell.told.first_retries for cell in obedient)
        asked = sum(len(cell.trace.asked_us) for cell in steady)
        wrongly = sum(cell.told.refused for cell in steady)
        worst = float(max((cell.worst_window() for cell in self.cells), default=0))
        refused = sum(cell.told.first_retries_refused for cell in obedient)
        return [
            f"{len(greedy)} cells of greedy clients: |admitted - ⌊B + R·T⌋| is {max(off, default=0)} at most",
            f"{len(steady)} cells at 0.99 R: {wrongly} refusals of {asked:,} requests",
            f"{retries} first retries after Retry-After: {refused} refused",
            f"the worst window of any length in {len(self.cells)} cells differs from B + R·w by {worst:+.3f} tokens",
            f"{len(self.faults())} faults in all",
        ]


def name(cell: Cell) -> str:
    """Return what a cell is, in a few words."""
    return f"{cell.limit}, {cell.behaviour}, {cell.clients} clients"


def row(cell: Cell) -> str:
    """Return a cell's row of the table."""
    entitled, admitted = cell.entitled() if cell.behaviour is Behaviour.GREEDY else (None, len(cell.trace.admitted_us))
    start_us, end_us = cell.saturated() if cell.behaviour is Behaviour.GREEDY else (0, cell.span_us)
    seconds = (end_us - start_us) / 1e6
    retries = f"{cell.told.first_retries} ({cell.told.first_retries_refused})" if cell.told.first_retries else ""
    cells = [
        cell.limit,
        cell.behaviour,
        f"{cell.clients}",
        f"{seconds:.1f}",
        f"{len(cell.trace.asked_us):,}",
        f"{admitted:,}",
        "" if entitled is None else f"{entitled:,}",
        f"{cell.told.refused:,}",
        f"{float(cell.worst_window()):+.3f}",
        retries,
        f"{cell.told.refused_by_cap}",
        f"{cell.late_s():.2f}" if cell.behaviour is Behaviour.STEADY else "",
    ]
    return "| " + " | ".join(cells) + " |"


def page(measured: Measured) -> str:
    """Return the whole page."""
    where = machine()
    cores = f"{where['cpu']}, {where['cpu_count']} cores shared by service, PostgreSQL, Redis and all clients"
    versions = ", ".join(f"{each} {importlib.metadata.version(each)}" for each in PACKAGES)
    faults: Sequence[str] = measured.faults() or ["none"]
    rows = "\n".join(map(row, measured.cells))
    return f"""# Evidence: rates

Written by `make bench-quota` (about four minutes; `tests/campaigns/quota_rates.py`), which ends with an error when a
promise of [rates.md](../rates.md) is not kept. The auditor itself is tested with broken traces.

- on {dt.datetime.now(dt.UTC):%Y-%m-%d}, commit {commit() or "unknown"}
- {cores}; {where["system"]} {where["release"]}; load average at the end {os.getloadavg()[0]:.1f}
- {versions}

## What was shown

{lines(measured.verdicts())}

Faults:

{lines(faults)}

## Set-up

Two HTTP processes, a worker and four processes of clients. Each row is a cell in a workspace of its own, under the
default quota. Cells run side by side in three rounds of {measured.least_s:g} s and a little more, each client with
connections of its own, the clients of a cell spread over the processes.

- *greedy*: together the clients send more than a burst at once and then ask three times as often as they may. T runs
  from the last request that met a rested bucket (the first one, unless the machine stood still for a second) to the
  last refusal, since at a refusal nothing is left that could have been given.
- *at 0.99 R*: together the clients send on schedule at 0.99 of the rate, whatever becomes of the requests before.
- *obedient*: one client asks for one more than a burst; it waits exactly the `Retry-After` that it was told, and its
  next request is the first retry. Then it asks for a burst again.

Stamps are those of the Redis server, told by MONITOR: of a request, when the script was called for it; of an admission,
the instant that the script read from the clock and wrote into the bucket. What clients were told must agree with that,
request by request. A spawn or create that a cap refused had been admitted by its rate and counts as such.

## All cells

Worst window: by how many tokens the worst one of any length differs from B + R·w (at most 0 is right). Late: how far
the steady clients' requests moved against each other until they reached Redis; the bursts make up for 0.97 s (create),
1.87 s (spawn) and 0.97 s (snapshot). Cap: admitted by the rate, then refused by a cap.

| rate | clients | n | T s | requests | admitted | due | refused | worst window | retries (refused) | cap | late s |
|---|---|---|---|---|---|---|---|---|---|---|---|
{rows}
"""


def lines(sentences: Sequence[str]) -> str:
    """Return sentences as a list."""
    return "\n".join(f"- {sentence}" for sentence in sentences)
