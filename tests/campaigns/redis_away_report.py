"""What was found while Redis was away: judged, and as the page docs/evidence/redis-away.md."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from harness.machine import commit, machine
from service.breaker import LONGEST_PAUSE_S
from service.quota.limits import Limit, Rate

PACKAGES = ("uvicorn", "starlette", "redis", "sqlalchemy", "asyncpg", "huey")

EDGE_S = 3.0
"""How long after Redis went or came a socket may still meet the state before, seconds: the longest pause is 2 s."""

MADE_UP_FOR_MS = 970.0
"""What the bursts of creates and polls make up for: (B - 1)/R."""

WRONGLY_REFUSED = 0.01
"""Share of requests within their quota that may be refused by a rate."""


class Request(NamedTuple):
    """One request and what became of it."""

    kind: str
    sent_s: float  # monotonic
    status: int  # below 0: no answer
    policy: str | None  # which limit refused
    latency_ms: float
    late_ms: float = 0.0  # by how much it was sent after its time


@dataclass
class Phase:
    """One stretch of time in which Redis is there, or is away."""

    name: str
    away: bool
    started_s: float
    ended_s: float
    alarm: int  # processes that said at its end that Redis is away

    @property
    def duration_s(self) -> float:
        """How long it was."""
        return self.ended_s - self.started_s

    def holds(self, at_s: float, edge_s: float = 0.0) -> bool:
        """Tell whether an instant lies in it, not too close to its beginning."""
        return self.started_s + edge_s <= at_s < self.ended_s


@dataclass
class Measured:
    """All that was found."""

    phases: list[Phase]
    requests: list[Request]
    sockets: list[tuple[float, int | None]]  # when, and the close code; None: it was let in
    statuses: dict[str, int]  # of the runs that were accepted, at the end
    accepted: int  # runs
    rate: Rate  # of the greedy tenant
    processes: int

    def of(self, phase: Phase, kind: str) -> list[Request]:
        """Return the requests of a kind that were sent in a phase."""
        return [each for each in self.requests if each.kind == kind and phase.holds(each.sent_s)]

    def sockets_of(self, phase: Phase) -> Counter[str]:
        """Return how sockets fared in a phase, its beginning left out."""
        codes = [code for at_s, code in self.sockets if phase.holds(at_s, EDGE_S)]
        return Counter("let in" if code is None else str(code) for code in codes)

    def faults(self) -> list[str]:
        """Return every promise that was not kept."""
        faults = []
        if self.statuses != {"COMPLETED": self.accepted}:
            faults.append(f"of {self.accepted} accepted runs: {self.statuses}")
        broken = Counter(each.status for each in self.requests if each.status < 0 or each.status >= 500)
        faults += [f"{count} answers {status}" for status, count in broken.items()]
        for phase in self.phases:
            faults += self._faults_of(phase)
        return faults

    def _faults_of(self, phase: Phase) -> list[str]:
        faults = []
        for kind in ("create", "poll"):
            sent = self.of(phase, kind)
            wrongly = sum(each.policy in (Limit.RUN_CREATION, Limit.SNAPSHOT_POLL) for each in sent)
            if not sent or (wrongly > WRONGLY_REFUSED * len(sent) and not self.held_up(phase)):
                faults.append(f"{phase.name}: {wrongly} of {len(sent)} {kind}s within the quota refused by the rate")
        admitted, most = self.greedy(phase), self.most(phase)
        if admitted > most:
            faults.append(f"{phase.name}: {admitted} greedy polls admitted, {most:.0f} at most were due")
        if phase.alarm != (self.processes if phase.away else 0):
            faults.append(f"{phase.name}: {phase.alarm} processes say that Redis is away")
        wrong = self.sockets_of(phase) - Counter({"4503" if phase.away else "let in": len(self.sockets)})
        if wrong:
            faults.append(f"{phase.name}: sockets {dict(wrong)}")
        return faults

    def held_up(self, phase: Phase) -> bool:
        """Tell whether the machine held requests up for longer than the bursts make up for, around a phase.

        Then those within their quota came in heaps, and a rate that refuses some of them is right.
        """
        around = Phase("", phase.away, phase.started_s - 5.0, phase.ended_s, 0)
        delays_ms = [each.late_ms + each.latency_ms for each in self.requests if around.holds(each.sent_s)]
        return max(delays_ms, default=0.0) > MADE_UP_FOR_MS

    def greedy(self, phase: Phase) -> int:
        """Return how many requests of the greedy tenant were admitted in a phase."""
        return sum(each.status in (200, 304) for each in self.of(phase, "greedy poll"))

    def most(self, phase: Phase) -> float:
        """Return how many may be: what each process gives while Redis is away, and a burst of whoever gave before.

        When Redis is back each process goes on by itself until it looks again.
        """
        givers = self.processes if phase.away else 1
        before = self.phases[self.phases.index(phase) - 1] if phase is not self.phases[0] else phase
        unaware_s = min(LONGEST_PAUSE_S, phase.duration_s) if before.away and not phase.away else 0.0
        due = givers * (self.rate.burst + float(self.rate.per_s) * phase.duration_s)
        return due + self.processes * (self.rate.burst + float(self.rate.per_s) * unaware_s)

    def verdicts(self) -> list[str]:
        """Return what was shown, one sentence each."""
        away = [phase for phase in self.phases if phase.away]
        creates = [each for phase in away for each in self.of(phase, "create")]
        accepted = sum(each.status == 200 for each in creates)
        by_rate = sum(each.policy == Limit.RUN_CREATION for each in creates)
        greedy = sum(map(self.greedy, away)) / (float(self.rate.per_s) * sum(phase.duration_s for phase in away))
        refused = sum((self.sockets_of(phase) for phase in away), Counter[str]())
        codes = ", ".join(f"{count} {how}" for how, count in sorted(refused.items()))
        slowest = max((each.latency_ms for phase in away for each in self.of(phase, "poll")), default=0.0)
        lost = self.accepted - self.statuses.get("COMPLETED", 0)
        by_cap = len(creates) - accepted - by_rate
        broken = sum(each.status >= 500 for each in self.requests)
        within = f"while Redis was away {accepted:,} of {len(creates):,} creates within the quota were accepted"
        return [
            f"{self.accepted:,} runs accepted, {lost} not completed",
            f"{within}, {by_rate} refused by the rate, {by_cap} by a cap",
            f"the greedy tenant got {greedy:.2f} times its rate meanwhile, from {self.processes} processes",
            f"sockets meanwhile: {codes}",
            f"the slowest poll meanwhile took {slowest:,.0f} ms",
            f"{sum(map(self.held_up, self.phases))} of {len(self.phases)} phases in which the machine held requests up",
            f"{broken} answers of 500 and above to {len(self.requests):,} requests",
        ]


def row(measured: Measured, phase: Phase, kind: str) -> str:
    """Return a row of the table."""
    sent = measured.of(phase, kind)
    ordered = sorted(each.latency_ms for each in sent) or [0.0]
    good = sum(each.status in (200, 304) for each in sent)
    by_rate = sum(each.policy in (Limit.RUN_CREATION, Limit.SNAPSHOT_POLL) for each in sent)
    others = sum(each.status < 0 or each.status >= 500 for each in sent)
    cells = [
        phase.name,
        kind,
        f"{len(sent):,}",
        f"{good:,} ({good / phase.duration_s:.1f}/s)",
        f"{by_rate:,}",
        f"{len(sent) - good - by_rate - others:,}",
        f"{others:,}",
        *(f"{ordered[min(len(ordered) - 1, int(share * len(ordered)))]:,.0f}" for share in (0.5, 0.95, 1.0)),
    ]
    return "| " + " | ".join(cells) + " |"


def page(measured: Measured) -> str:
    """Return the whole page."""
    where = machine()
    cores = f"{where['cpu']}, {where['cpu_count']} cores shared by service, PostgreSQL, Redis and all clients"
    versions = ", ".join(f"{each} {importlib.metadata.version(each)}" for each in PACKAGES)
    kinds = ("create", "poll", "greedy poll")
    rows = "\n".join(row(measured, phase, kind) for phase in measured.phases for kind in kinds)
    phases = "\n".join(
        f"| {phase.name} | {phase.duration_s:.0f} | {phase.alarm} |"
        f" {', '.join(f'{count} {how}' for how, count in sorted(measured.sockets_of(phase).items()))} |"
        for phase in measured.phases
    )
    return f"""# Evidence: Redis away

Written by `make redis-away` (about three minutes; `tests/campaigns/redis_away.py`), which ends with an error when a
promise of [decision 5](../decisions/0005-redis-away.md) is not kept.

- on {dt.datetime.now(dt.UTC):%Y-%m-%d}, commit {commit() or "unknown"}
- {cores}; {where["system"]} {where["release"]}; load average at the end {os.getloadavg()[0]:.1f}
- {versions}

## What was shown

{lines(measured.verdicts())}

Faults:

{lines(measured.faults() or ["none"])}

## Set-up

Two HTTP processes and a worker. Under the default quota three tenants create and three poll, at 0.9 of their rates and
each on four connections; a greedy one polls at three times its rate on eight; every second a socket is opened. Redis is
stopped by a signal and later continued, then killed and later started again at its address, empty.

| Redis | seconds | processes that say it is away, at the end | sockets (the first 3 s left out) |
|---|---|---|---|
{phases}

## All requests

By when they were sent; *other* are answers of 500 and above, and none at all.

| Redis | request | sent | admitted | refused by rate | refused by cap | other | p50 ms | p95 ms | most ms |
|---|---|---|---|---|---|---|---|---|---|
{rows}
"""


def lines(sentences: Sequence[str]) -> str:
    """Return sentences as a list."""
    return "\n".join(f"- {sentence}" for sentence in sentences)
