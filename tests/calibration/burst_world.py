"""A server whose burst limit is known exactly, because its latencies are drawn from a law that can be integrated.

`servers` identical servers take the requests of a burst in turn, `service_ms` each, so request k waits
ceil(k / servers) services. A whole trial is slower or faster by exp(spread * Z), each request by exp(noise * W), with Z
and W standard normal; a share `failing` never gets an answer. Then the share of slow requests in a burst of N is

    failing + (1 - failing) * mean over k of Phi(ln(service_ms * ceil(k / servers) / limit) / sqrt(spread^2 + noise^2))

and the limit is the largest N for which it is at most the share allowed.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy.special import ndtr

from harness.analysis.bursts import Requirement
from harness.analysis.dependence import Floats
from harness.analysis.slo import Op
from harness.sample import Endpoint

REQUIREMENT = Requirement(Endpoint.CREATE, Op.LT, 300.0, 0.05)


@dataclasses.dataclass(frozen=True)
class World:
    """One server."""

    servers: int
    service_ms: float
    spread: float  # standard deviation of the logarithm, between trials
    noise: float  # the same between the requests of a trial
    failing: float = 0.0  # share of requests without an answer
    stalls: float = 0.0  # share of trials in which every request is slow; not part of `slow_share`

    def slow_share(self, burst: int) -> float:
        """Return the true share of slow requests in bursts of this size."""
        waits = np.log(self._turns(burst) * self.service_ms / REQUIREMENT.limit_ms)
        late = float(ndtr(waits / math.hypot(self.spread, self.noise)).mean())
        return self.failing + (1.0 - self.failing) * late

    @property
    def limit(self) -> int:
        """Return the largest burst that meets the requirement; 0 when none does."""
        low, high = 0, 1
        while self.slow_share(high) <= REQUIREMENT.slow_share:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.slow_share(middle) <= REQUIREMENT.slow_share else (low, middle)
        return low

    def trials(self, random: np.random.Generator, count: int, burst: int) -> Floats:
        """Return the latencies (count, burst) of so many trials, in ms, failures as infinity."""
        scale = self.spread * random.standard_normal((count, 1)) + self.noise * random.standard_normal((count, burst))
        latency: Floats = self._turns(burst) * self.service_ms * np.exp(scale)
        if self.failing:
            latency[random.random((count, burst)) < self.failing] = np.inf
        if self.stalls:
            latency[random.random(count) < self.stalls] = np.inf
        return latency

    def _turns(self, burst: int) -> Floats:
        return np.ceil(np.arange(1.0, burst + 1.0) / self.servers)


def world_with_limit(limit: int, servers: int, spread: float, noise: float, failing: float = 0.0) -> World:
    """Return a world whose limit is `limit` or the next that its number of servers allows."""
    low, high = 1e-3, REQUIREMENT.limit_ms
    for _ in range(50):
        middle = math.sqrt(low * high)
        world = World(servers, middle, spread, noise, failing)
        low, high = (middle, high) if world.slow_share(limit) <= REQUIREMENT.slow_share else (low, middle)
    return World(servers, low, spread, noise, failing)
