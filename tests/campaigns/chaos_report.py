"""What the chaos campaign found, as the page docs/evidence/chaos.md."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from harness.machine import commit, machine

PACKAGES = ("starlette", "uvicorn", "huey", "redis", "sqlalchemy", "asyncpg")
MOST_SHOWN = 20

FOUND = """\
- A connection to PostgreSQL that the network had swallowed held a request or a tick for 30 s, and each other one of its
  pool another 30 s: recovery took 27 to 31 s. PostgreSQL now ends statements after 5 s, a connection that is silent a
  second longer is dead, and all that rest go with it, without being asked to agree (`tests/service/test_db.py`).
- A transaction whose client was gone without a word kept its row locks until the server's keepalives; now 5 s
  (`tests/service/test_db.py`).
- So it did, up to the keepalives, where the connection was lost in the middle of a question: the server then counts it
  neither as idle nor as busy. A transaction as a whole is bounded now (`tests/service/test_db.py`).
- A statement on a connection that a killed PostgreSQL had just taken leave of could count as a bug, against the run
  (`tests/service/test_db.py`).
- A connection to Redis that ended in the moment before it was written to raised the event loop's own error: requests
  that can do without Redis were answered with 503 (`tests/service/test_rediswire.py`).
- The polls' own connections waited without end for a dead one to agree to its end (`tests/service/test_direct.py`).
- Every process spent most of its start on building a grammar that nothing asks for, so that the death of a supervisor
  cost twice as long as it must (`tests/service/test_schemas.py`).
- Log lines of several processes ran into each other (`tests/service/test_telemetry.py`)."""
"""Defects of the service that this campaign has found since it exists; each is mended, and its test says how."""


@dataclass(frozen=True)
class Struck:
    """One fault, and how long everything took to go on after it."""

    kind: str
    is_kill: bool
    at_s: float  # since the first fault
    lasted_s: float  # until it was over: the server answers again, the proxy passes everything on
    requests_s: float | None  # from then until requests were accepted; None: not within the campaign's patience
    work_s: float | None  # from then until every run that was due had been advanced; None likewise
    due: int  # how many runs were due at that moment

    @property
    def recovery_s(self) -> float:
        """The later of the two; infinite when one of them never came."""
        if self.requests_s is None or self.work_s is None:
            return math.inf
        return max(self.requests_s, self.work_s)


@dataclass
class Measured:
    """All that the campaign found."""

    runs: int
    kills: int
    seed: int
    patience_s: float
    struck: list[Struck] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # broken promises; empty is what is promised
    took_s: float = 0.0  # from the first create to the last run's end
    rows: Counter[str] = field(default_factory=Counter)  # what the database holds in the end
    answers: Counter[str] = field(default_factory=Counter)  # how requests ended
    statuses: Counter[str] = field(default_factory=Counter)  # of all runs
    errors_logged: list[str] = field(default_factory=list)
    restarts: int = 0

    @property
    def passed(self) -> bool:
        """Whether every promise was kept."""
        return not self.faults

    def verdicts(self) -> list[str]:
        """Return what was shown, one sentence each."""
        kills = [each for each in self.struck if each.is_kill]
        probes = self.rows["parents"] - self.runs
        accepted = self.rows["parents"] + self.rows["subruns"]
        times = [seconds(quantile([each.recovery_s for each in self.struck], share)) for share in (0.5, 0.95, 1.0)]
        pace = [f"{count / max(self.took_s, 1):.1f}" for count in (accepted, self.rows["ticks"])]
        struck = f"{len(kills)} SIGKILLs and {len(self.struck) - len(kills)} other faults"
        return [
            f"{self.runs:,} runs of users with {self.rows['subruns']:,} subruns and {probes:,} probes; {struck}",
            f"**{len(self.faults)} broken promises**",
            f"recovery p50 {times[0]}, p95 {times[1]}, max {times[2]}",
            f"{accepted:,} runs in {self.took_s:.0f} s under fire: {pace[0]} runs and {pace[1]} ticks per second",
        ]


def quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile: the smallest value that at least this share of all does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def seconds(value: float) -> str:
    """Return a duration for a reader."""
    return "not within patience" if math.isinf(value) else f"{value:.1f} s"


def page(measured: Measured) -> str:
    """Return the whole page."""
    where = machine()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return f"""# Evidence: chaos

Written by `make chaos RUNS={measured.runs} KILLS={measured.kills} SEED={measured.seed}`
(`tests/campaigns/chaos.py`). Run it to repeat this: the same seed gives the same plans and the same order of faults.
The times of a machine are its own; the number of broken promises must be 0 anywhere, and the exit code is 1 when it is
not.

- on {dt.datetime.now(dt.UTC):%Y-%m-%d}, commit {commit() or "unknown"}
- {where["cpu"]}, {where["cpu_count"]} cores shared by service, PostgreSQL, Redis, proxies and all clients;
  {where["system"]} {where["release"]}; load average at the end {os.getloadavg()[0]:.1f}
- {versions}

## What was shown

{bullets(measured.verdicts())}

The audit asked of every run: final; its script executed step by step and no step twice; `seq` without gaps from 1; its
statuses legal; each child told to its parent exactly once and as what it was; each group decided as its policy says,
judged again from the order of events; its end what its user asked for. Of every create: one run for one key, however
often it was sent. Of every tool: started at most once, counted where it had its effect. Of every client: each event
seen once and in order, over long-polls and sockets. At the end: no slot held, by count and by filling every workspace
to its caps once more; no socket's place held in Redis; the service stops with 0.

## Broken promises

{bullets(measured.faults[:MOST_SHOWN]) or "None."}

## Faults and recovery

A fault is over when a killed server answers again, or when the proxy passes everything on; for a killed process of the
service, at once: its supervisor's work counts as recovery. From that moment on, *requests* is the time until four
creates, sent side by side over new connections, were all accepted, and *work* the time until every run whose step was
due at that moment had been advanced (or had ended or been paused). Recovery is the later of the two.

{table(measured.struck)}

`outage` is how long the fault itself lasted, on average. Longest recoveries: {longest(measured.struck)}.

## What it has found

Defects of the service, found by earlier campaigns and mended since:

{FOUND}

## Set-up

Two HTTP and two worker processes under their supervisors, a private PostgreSQL with fsync on and a private Redis; both
are reached through proxies of ours alone (`tests/campaigns/faultproxy.py`). Users under the default quota create, spawn
with every join and failure policy, approve and reject, pause, resume, cancel, and follow by long-polls and sockets;
runs are let in as the faults go on, so that each fault meets runs on their way. A connection that lost a byte to a
fault stays dead when the fault is over, as on a real network.

How requests ended: {counts(measured.answers)}. How runs ended: {counts(measured.statuses)}. Supervisors and servers
started again by the campaign: {measured.restarts}. Lines in the service's logs that tell of an unexpected error:
{len(measured.errors_logged)}.
"""


def bullets(sentences: Sequence[str]) -> str:
    """Return sentences as a list."""
    return "\n".join(f"- {sentence}" for sentence in sentences)


def counts(counter: Counter[str]) -> str:
    """Return counts in words."""
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counter.items()))


def longest(struck: Sequence[Struck]) -> str:
    """Return the three longest recoveries in words."""
    found = sorted(struck, key=lambda each: -each.recovery_s)[:3]
    return "; ".join(f"{each.kind}, {seconds(each.recovery_s)} ({each.due} runs were due)" for each in found)


def table(struck: Sequence[Struck]) -> str:
    """Return the table of faults by kind."""
    by_kind: dict[str, list[Struck]] = {}
    for each in sorted(struck, key=lambda each: (not each.is_kill, each.kind)):
        by_kind.setdefault(each.kind, []).append(each)
    by_kind |= {
        "**all SIGKILLs**": [each for each in struck if each.is_kill],
        "**all other faults**": [each for each in struck if not each.is_kill],
    }
    rows = [
        "| fault | times | outage | requests p50 | work p50 | recovery p50 | p95 | max |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, all_of_it in by_kind.items():
        if all_of_it:
            recoveries = [each.recovery_s for each in all_of_it]
            parts = [
                sum(each.lasted_s for each in all_of_it) / len(all_of_it),
                quantile([math.inf if each.requests_s is None else each.requests_s for each in all_of_it], 0.5),
                quantile([math.inf if each.work_s is None else each.work_s for each in all_of_it], 0.5),
                quantile(recoveries, 0.5), quantile(recoveries, 0.95), max(recoveries),
            ]  # fmt: skip
            rows.append(f"| {kind} | {len(all_of_it)} | " + " | ".join(map(seconds, parts)) + " |")
    return "\n".join(rows)
