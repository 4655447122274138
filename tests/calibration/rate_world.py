"""A service whose capacity is known, as two queues in a row, simulated request by request.

Requests come at Poisson instants to `servers` identical servers of `service_ms` each, in order: an M/D/c queue, which
is the same as dealing the requests to the servers in turn (Crommelin 1932), so that each server is a Lindley recursion.
Answered creates become runs, which wait for `workers` of `run_ms` each: the queue that a service tells as its depth. A
whole trial is slower or faster by exp(spread * Z); a share `failing` of the requests is refused at once.

The capacity of each stage is arithmetic: servers / service_ms and workers / run_ms. The largest rate that meets the
requirement lies near the smaller one: above it every window falls behind by 1 - capacity / rate. What exactly a rate
comes to in the long run is counted over thousands of windows.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from harness.analysis.bursts import Requirement
from harness.analysis.capacity import GROWTH, Check, RateRequirement, Seen, Span, Window, observe
from harness.analysis.dependence import Floats
from harness.analysis.slo import Op
from harness.arrivals import poisson
from harness.sample import Endpoint

REQUIREMENT = RateRequirement(Requirement(Endpoint.CREATE, Op.LT, 300.0, 0.05))
SPAN = Span(lead_s=1.0, window_s=4.0)
LOOKS = 5

TRUTH_WINDOWS = 300
"""Enough for the rates of a ladder, which are far from each other."""

NEVER_NS = -1


@dataclasses.dataclass(frozen=True)
class RateWorld:
    """One service."""

    servers: int
    service_ms: float
    workers: int
    run_ms: float
    spread: float  # standard deviation of the logarithm of both times, between trials
    failing: float = 0.0  # share of requests refused at once

    @property
    def capacity_per_s(self) -> float:
        """Return the rate at which the tighter of both stages is busy all the time."""
        return 1e3 * min(self.servers / self.service_ms, self.workers / self.run_ms)

    def window(self, random: np.random.Generator, rate_per_s: float) -> Window:
        """Return one trial from rest, as the search sees it."""
        due = np.concatenate([[0.0], poisson(rate_per_s, SPAN.whole_s, int(random.integers(2**32)))])
        pace = math.exp(self.spread * float(random.standard_normal()))
        refused = random.random(len(due)) < self.failing
        done = due.copy()
        done[~refused] = served(due[~refused], self.servers, pace * self.service_ms / 1e3)
        runs = np.sort(done[~refused])
        taken = served(runs, self.workers, pace * self.run_ms / 1e3) - pace * self.run_ms / 1e3
        looks_s = SPAN.lead_s + SPAN.window_s * np.arange(LOOKS) / (LOOKS - 1)
        depth = np.searchsorted(runs, looks_s, side="right") - np.searchsorted(taken, looks_s, side="right")
        # Runs are taken in order, so the oldest that waits is the first that was not taken; none may be there at all.
        oldest_s = np.append(runs, 0.0)[np.searchsorted(taken, looks_s, side="right")]
        age = np.where(depth > 0, looks_s - oldest_s, 0.0)
        seen = Seen((looks_s * 1e9).astype(np.int64), depth.astype(np.float64), age)
        instants = [(each * 1e9).astype(np.int64) for each in (due, done)]
        return observe(instants[0], instants[0], instants[1], ~refused, seen, SPAN, rate_per_s)

    @functools.cache  # noqa: B019 - a few worlds, for as long as the study
    def truth(self, rate_per_s: float, count: int = TRUTH_WINDOWS) -> dict[Check, float]:
        """Return what a rate comes to over many windows: the share of each check."""
        random = np.random.default_rng(round(rate_per_s * 1e3))
        windows = [self.window(random, rate_per_s) for _ in range(count)]
        latency = np.concatenate([window.latency for window in windows])
        shares = {
            Check.LATENCY: float(REQUIREMENT.latency.is_slow(latency).mean()),
            Check.ERRORS: float(np.isinf(latency).mean()),
        }
        return shares | {check: float(np.mean([window.growth[check] for window in windows])) for check in GROWTH}

    def meets(self, rate_per_s: float, count: int = TRUTH_WINDOWS) -> bool:
        """Say whether a rate truly meets the requirement, by so many windows of it."""
        return all(share <= REQUIREMENT.limit(check) for check, share in self.truth(rate_per_s, count).items())


def served(due: Floats, servers: int, service_s: float) -> Floats:
    """Return when each request (n_requests,) in order is done by so many servers of one service time.

    For one server done_k = max over j <= k of due_j + (k - j + 1) * service (Lindley 1952), a running maximum.
    """
    done = np.empty(len(due))
    for server in range(servers):
        own = due[server::servers]
        place = np.arange(len(own))
        done[server::servers] = np.maximum.accumulate(own - place * service_s) + (place + 1) * service_s
    return done
