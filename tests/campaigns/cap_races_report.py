"""What came of the races for places: judged, and as the page docs/evidence/cap-races.md."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from harness.machine import commit, machine
from service.quota.limits import Limit
from tests.campaigns.cap_audit import History
from tests.campaigns.cap_racers import Told
from tests.campaigns.cap_slots import Slots

COLUMNS = (
    *("cap", "places", "attempts", "admitted", "refused", "peak", "full", "between", "left"),
    *("samples (most seen)", "full in", "held back in", "rounds (refilled)", "s"),
)
PACKAGES = ("sqlalchemy", "asyncpg", "redis", "uvicorn", "starlette")


@dataclass
class Result:
    """What came of the races for one cap."""

    limit: Limit
    most: int
    told: Told = field(default_factory=Told)
    history: History = field(default_factory=History)
    rounds: int = 0
    samples: int = 0
    sampled_peak: int = 0  # by the observer
    sampled_full: int = 0  # samples in which some pool was full
    sampled_waiting: int = 0  # samples in which a transaction waited for another one's lock
    refilled: int = 0  # pools that took exactly their cap again after a round
    took_s: float = 0.0
    faults: list[str] = field(default_factory=list)

    def all_faults(self) -> list[str]:
        """Return everything that may not be."""
        found = self.history.faults + self.faults
        found += [f"{count} attempts failed with {name}" for name, count in self.told.failed.items()]
        if self.history.left:
            found.append(f"{self.history.left} places were left")
        if self.sampled_peak > self.most:
            found.append(f"the observer counted {self.sampled_peak}")
        if not self.told.admitted or not self.told.attempts > self.told.admitted:
            found.append("nobody raced: all attempts were admitted, or none")
        return [f"{self.limit}: {each}" for each in found]


def sentence(result: Result) -> str:
    """Return what was shown for one cap."""
    told, history = result.told, result.history
    return (
        f"{result.limit}: {told.attempts:,} attempts for {result.most} places, {told.admitted:,} admitted; at most"
        f" {history.peak} held at any instant, full {history.filled:,} times, {history.left} left,"
        f" {len(result.all_faults())} faults, {result.took_s:,.0f} s"
    )


def row(result: Result) -> str:
    """Return a row of the table."""
    told, history = result.told, result.history
    cells = [
        result.limit.value,
        str(result.most),
        f"{told.attempts:,}",
        f"{told.admitted:,}",
        f"{told.attempts - told.admitted:,}",
        str(history.peak),
        f"{history.filled:,}",
        f"{history.between:,}" if history.between else "-",
        str(history.left),
        f"{result.samples:,} ({result.sampled_peak})",
        f"{result.sampled_full / result.samples:.0%}" if result.sampled_full else "-",
        f"{result.sampled_waiting / result.samples:.0%}" if result.sampled_waiting else "-",
        f"{result.rounds} ({result.refilled})",
        f"{result.took_s:,.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def page(results: Sequence[Result], slots: Slots) -> str:
    """Return the whole page."""
    where = machine()
    cores = f"{where['cpu']}, {where['cpu_count']} cores shared by PostgreSQL, Redis and all racing processes"
    versions = ", ".join(f"{each} {importlib.metadata.version(each)}" for each in PACKAGES)
    faults = [fault for result in results for fault in result.all_faults()] + slots.faults()
    rows = "\n".join(map(row, results))
    return f"""# Evidence: caps

Written by `make cap-races` (`tests/campaigns/cap_races.py`), which ends with an error when a cap was exceeded, a place
was lost, or one could be used again too late. The auditor is tested with histories that are wrong and with a service
whose locks were taken out.

- on {dt.datetime.now(dt.UTC):%Y-%m-%d}, commit {commit() or "unknown"}
- {cores}; {where["system"]} {where["release"]}; load average at the end {os.getloadavg()[0]:.1f}
- {versions}

## What was shown

{lines([*map(sentence, results), *slots.verdicts()])}

Faults:

{lines(faults or ["none"])}

## Races

Processes ask as fast as they are answered, through group commit, a worker's turns, and the leases' script; places
change hands all the time, given back by cancels, turns, decisions, ends of sockets, and leases that lapse. *Peak* is
the most that was held at an instant: the commits of all events in order, or all commands of Redis. *Full* says how
often somebody took the last place, *between* how often a place was taken after one that another process had taken. The
observer counts rows in statements of its own; *held back* is the share of its samples in which a transaction waited for
another one's lock. For sockets it reads every command, so each is a sample. After each round all counters are compared
with the rows, and pools are filled again: the number in brackets took exactly their cap.

| {" | ".join(COLUMNS)} |
|{"---|" * len(COLUMNS)}
{rows}

A run's own cap on tool calls is raced for by workers whose leases have ended: several hold the same runs and settle
them at once, and each of them asks.

{slots.page()}"""


def lines(sentences: Sequence[str]) -> str:
    """Return sentences as a list."""
    return "\n".join(f"- {sentence}" for sentence in sentences)
