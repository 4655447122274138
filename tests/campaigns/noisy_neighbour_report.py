"""What a noisy neighbour cost: judged, and as the page docs/evidence/noisy-neighbour.md."""

from __future__ import annotations

import datetime as dt
import enum
import importlib.metadata
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from harness.machine import commit, machine
from service.quota.limits import Rate

PACKAGES = ("uvicorn", "starlette", "redis", "sqlalchemy", "asyncpg", "huey")

MOST_TIMES = 2.0
"""By how much the quiet workspace's tick wait at p95 may grow beside its neighbour."""

MOST_CLAIMS = 2.5
"""Claims for one turn of a workspace that is over its rate: one that delays it, one that takes it, and some more."""

WRITTEN_WITHIN_S = 1.0
"""A turn is paid when it is claimed, and its step says when it was written: this much later, at most. So what was paid
in a longer window may have been written in a shorter one."""


class Kind(enum.StrEnum):
    """What the neighbour does in a window."""

    ALONE = "alone"  # nothing: its runs are paused
    WITH = "beside the neighbour"
    WITHOUT = "beside it, its tick rate lifted"


class Window(NamedTuple):
    """How the two fared for a while."""

    kind: Kind
    duration_s: float
    waits_ms: list[float]  # of the quiet one's turns: from due to the transaction that wrote it
    turns_s: list[float]  # when the neighbour's turns were written, in order
    claims: int  # of the neighbour's runs
    ticks: int  # of the neighbour's runs

    def told(self) -> str:
        """Return it in one line."""
        p50, p95 = (quantile(self.waits_ms, share) for share in (0.5, 0.95))
        return (
            f"{self.kind}: {self.duration_s:.1f} s, {len(self.waits_ms)} waits p50 {p50:.1f} ms p95 {p95:.1f} ms,"
            f" the neighbour {len(self.turns_s) / self.duration_s:.1f} turns/s in {self.claims} claims"
        )


@dataclass
class Measured:
    """All that was found."""

    windows: list[Window]
    rate: Rate  # of the neighbour's ticks
    offered_per_s: float  # turns that the neighbour's runs would take
    accepted: tuple[int, int]  # runs of the quiet one and of the neighbour
    statuses: tuple[dict[str, int], dict[str, int]]  # of those runs, at the end
    refused: int  # creates of the quiet one

    def of(self, kind: Kind) -> list[Window]:
        """Return the windows of a kind."""
        return [each for each in self.windows if each.kind is kind]

    def waits_ms(self, kind: Kind) -> list[float]:
        """Return all waits of the quiet one in the windows of a kind."""
        return [wait for window in self.of(kind) for wait in window.waits_ms]

    def times(self, kind: Kind, share: float) -> float:
        """Return the ratio of a quantile of the waits to that alone."""
        return quantile(self.waits_ms(kind), share) / quantile(self.waits_ms(Kind.ALONE), share)

    def per_repeat(self, kind: Kind, share: float) -> list[float]:
        """Return the same ratio for each repeat."""
        return [
            quantile(beside.waits_ms, share) / quantile(alone.waits_ms, share)
            for beside, alone in zip(self.of(kind), self.of(Kind.ALONE), strict=True)
        ]

    def most(self, window: Window) -> float:
        """Return how many turns of the neighbour may have been written in a window."""
        return self.rate.burst + float(self.rate.per_s) * (window.duration_s + WRITTEN_WITHIN_S)

    def faults(self) -> list[str]:
        """Return every promise that was not kept."""
        faults = []
        for who, accepted, statuses in zip(("quiet", "neighbour"), self.accepted, self.statuses, strict=True):
            if statuses != {"COMPLETED": accepted}:
                faults.append(f"of {accepted} accepted runs of the {who}: {statuses}")
        for window in self.of(Kind.WITH):
            if len(window.turns_s) > self.most(window):
                faults.append(
                    f"the neighbour had {len(window.turns_s)} turns, {self.most(window):.0f} at most were due"
                )
            if window.claims > MOST_CLAIMS * max(window.ticks, 1) + self.rate.burst:
                faults.append(f"{window.claims} claims for {window.ticks} turns of the neighbour")
        return faults

    def misses(self) -> list[str]:
        """Return the aims that were missed: those that depend on the machine."""
        times = self.times(Kind.WITH, 0.95)
        return [f"p95 beside the neighbour is {times:.2f} times that alone"] if times > MOST_TIMES else []

    def verdicts(self) -> list[str]:
        """Return what was shown, one sentence each."""
        beside = self.of(Kind.WITH)
        turns, claims = sum(len(each.turns_s) for each in beside), sum(each.claims for each in beside)
        seconds, ticks = sum(each.duration_s for each in beside), sum(each.ticks for each in beside)
        without = self.of(Kind.WITHOUT)
        lifted = sum(len(each.turns_s) for each in without) / sum(each.duration_s for each in without)
        lost = sum(self.accepted) - sum(each.get("COMPLETED", 0) for each in self.statuses)
        median = statistics.median(self.per_repeat(Kind.WITH, 0.95))
        times = {(kind, share): f"{self.times(kind, share):.2f}" for kind in Kind for share in (0.5, 0.95)}
        per_turn = claims / max(ticks, 1)
        waits = (
            f"the quiet workspace's tick wait beside the neighbour is {times[Kind.WITH, 0.95]} times that alone at p95"
            f" (at most {MOST_TIMES:g}; median of the repeats {median:.2f}) and {times[Kind.WITH, 0.5]} at p50;"
            f" with the neighbour's tick rate lifted {times[Kind.WITHOUT, 0.95]} and {times[Kind.WITHOUT, 0.5]}"
        )
        rates = (
            f"the neighbour, whose runs would take {self.offered_per_s:,.0f} turns a second,"
            f" had {turns / seconds:.2f}/s with a rate of {float(self.rate.per_s):g}/s, in {per_turn:.2f} claims"
            f" for each turn; with its rate lifted {lifted:,.0f}/s"
        )
        runs = (
            f"{self.accepted[0]:,} runs of the quiet one and {self.accepted[1]:,} of the neighbour accepted, {lost} not"
            f" completed with all their steps; {self.refused} creates of the quiet one refused"
        )
        return [waits, rates, runs]


def quantile(values: Sequence[float], share: float) -> float:
    """Return an empirical quantile, by the nearest rank; NaN of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def row(number: int, window: Window) -> str:
    """Return a row of the table."""
    cells = [
        str(number),
        window.kind,
        f"{window.duration_s:.1f}",
        f"{len(window.waits_ms)}",
        *(f"{quantile(window.waits_ms, share):.1f}" for share in (0.5, 0.95, 1.0)),
        f"{len(window.turns_s):,} ({len(window.turns_s) / window.duration_s:,.1f}/s)",
        f"{window.claims:,}",
    ]
    return "| " + " | ".join(cells) + " |"


def page(measured: Measured) -> str:
    """Return the whole page."""
    where = machine()
    cores = f"{where['cpu']}, {where['cpu_count']} cores shared by service, PostgreSQL, Redis and all clients"
    versions = ", ".join(f"{each} {importlib.metadata.version(each)}" for each in PACKAGES)
    rows = "\n".join(row(number, window) for number, window in enumerate(measured.windows, 1))
    return f"""# Evidence: a noisy neighbour

Written by `make noisy-neighbour` (three minutes; `tests/campaigns/noisy_neighbour.py`), which ends with an error when a
run was lost, the neighbour had more turns than its tick rate and burst allow ([rates.md](../rates.md)), or the quiet
workspace's tick wait at p95 was more than {MOST_TIMES:g} times that alone.

- on {dt.datetime.now(dt.UTC):%Y-%m-%d}, commit {commit() or "unknown"}
- {cores}; {where["system"]} {where["release"]}; load average at the end {os.getloadavg()[0]:.1f}
- {versions}

## What was shown

{lines(measured.verdicts())}

Faults and missed aims:

{lines([*measured.faults(), *measured.misses()] or ["none"])}

## Set-up

An HTTP process and two workers. The quiet workspace creates runs of two turns at a steady rate; the neighbour holds as
many runs, each with a turn every tenth of a second, as would take a hundred times its tick rate. Both are of the class
`default`; the neighbour's other limits are lifted. While the quiet one is alone the neighbour's runs are paused. In the
end its tick rate is lifted and every run goes on to its end. A wait is from the moment at which a turn was due to the
transaction that wrote it.

## All windows

In the order in which they came; waits in milliseconds.

| | the quiet one is | seconds | waits | p50 | p95 | most | turns of the neighbour | claims of the neighbour |
|---|---|---|---|---|---|---|---|---|
{rows}
"""


def lines(sentences: Sequence[str]) -> str:
    """Return sentences as a list."""
    return "\n".join(f"- {sentence}" for sentence in sentences)
