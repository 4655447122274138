"""Latencies in the order of sending whose true quantiles are known, correlated in time in ways that services show.

Three kinds of tail: *light*, a lognormal whose logarithm fades from neighbour to neighbour; *heavy*, the same with
Student's t of three degrees of freedom in its shocks, so that rare requests take a hundred times the usual; *bimodal*,
a service that is in one of two states, fast nine tenths of the time and ten times slower else, and stays in a state for
as long as the correlation says. And *waves*: requests that come ten at a time, each wave with a fate of its own.
"""

from __future__ import annotations

import dataclasses
import enum
import functools

import numpy as np
from scipy import stats
from scipy.signal import lfilter

from harness.analysis.dependence import Floats
from harness.analysis.quantiles import quantile

SLOW_STATE = 0.1
"""Share of the time that the bimodal service is slow."""

TRUTH_ROWS = 8_000_000
"""Rows from which the true quantiles of the heavy tail are read, for no formula gives them."""

TRUTH_SEED = 99


class Tail(enum.StrEnum):
    """The shape of the latencies."""

    LIGHT = "light"  # lognormal
    HEAVY = "heavy"  # shocks of Student's t, three degrees of freedom
    BIMODAL = "bimodal"  # two states
    WAVES = "waves"  # lognormal; waves of WAVE requests share a part of their logarithm


WAVE = 10
"""Requests of one wave."""


@dataclasses.dataclass(frozen=True)
class Series:
    """One world."""

    tail: Tail
    rho: float  # correlation of neighbours; of two requests of one wave for WAVES

    def draw(self, random: np.random.Generator, n: int) -> Floats:
        """Return latencies (n,) in ms."""
        if self.tail is Tail.BIMODAL:
            return _two_states(random, n, self.rho)
        if self.tail is Tail.WAVES:
            shared = np.repeat(random.standard_normal(-(-n // WAVE)), WAVE)[:n]
            logs = np.sqrt(self.rho) * shared + np.sqrt(1.0 - self.rho) * random.standard_normal(n)
        elif self.tail is Tail.LIGHT:
            shocks = random.standard_normal(n) * np.sqrt(1.0 - self.rho**2)
            shocks[0] = random.standard_normal()
            logs = lfilter([1.0], [1.0, -self.rho], shocks)
        else:
            # A hundred further values in front, so that the start is as any other moment.
            logs = lfilter([1.0], [1.0, -self.rho], random.standard_t(3.0, n + 100))[100:]
        return np.exp(2.0 + 0.5 * np.asarray(logs, dtype=np.float64))

    def true_quantile(self, q: float) -> float:
        """Return the quantile that an endless series has."""
        if self.tail in {Tail.LIGHT, Tail.WAVES}:
            return float(np.exp(2.0 + 0.5 * stats.norm.ppf(q)))
        if self.tail is Tail.BIMODAL:
            return _two_state_quantile(q)
        return _read_quantiles(self)[q]


QUANTILES = (0.5, 0.95, 0.99)


@functools.cache
def _read_quantiles(world: Series) -> dict[float, float]:
    """Return the quantiles of a very long draw."""
    values = world.draw(np.random.default_rng(TRUTH_SEED), TRUTH_ROWS)
    return {q: quantile(values, q) for q in QUANTILES}


def _two_states(random: np.random.Generator, n: int, rho: float) -> Floats:
    """Return latencies of a service whose state is drawn anew with probability 1 - rho at each request."""
    anew = random.uniform(size=n) >= rho
    anew[0] = True
    drawn = random.uniform(size=n) < SLOW_STATE
    slow = drawn[np.maximum.accumulate(np.where(anew, np.arange(n), 0))]
    return np.exp(2.0 + 2.3 * slow + 0.25 * random.standard_normal(n))


def _two_state_quantile(q: float) -> float:
    """Return the quantile of the mixture, by bisection."""
    low, high = 0.0, 10.0
    for _ in range(80):
        middle = (low + high) / 2.0
        below = (1.0 - SLOW_STATE) * stats.norm.cdf((middle - 2.0) / 0.25)
        below += SLOW_STATE * stats.norm.cdf((middle - 4.3) / 0.25)
        low, high = (middle, high) if below < q else (low, middle)
    return float(np.exp(low))
