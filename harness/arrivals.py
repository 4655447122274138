"""When load is due: closed-loop start plans and open-loop send times. Pure: no clock, no I/O, no hidden randomness.

A closed loop waits for its own runs, so its plan says how many start together and what must have finished first. An
open loop sends on schedule whatever the replies, so its plan is simply an array of seconds. `generator` carries the
plans out; what really happened is in the samples, never here.
"""

from __future__ import annotations

import dataclasses
import enum

import numpy as np
import numpy.typing as npt

from harness.sample import Mode

RUNS_MAX = 100_000
"""Parent runs that one load may have."""

Seconds = npt.NDArray[np.float64]
Nanoseconds = npt.NDArray[np.int64]


class Arrivals(enum.StrEnum):
    """How the send times of an open loop are spread."""

    CONSTANT = "constant"  # evenly
    POISSON = "poisson"  # as independent users come: exponential gaps
    BURST = "burst"  # in groups, each due at one instant


class EmptyArrivals(ValueError):
    """The rate and the duration asked for give not even one arrival."""

    def __init__(self, rate_per_s: float, duration_s: float) -> None:
        super().__init__(f"{rate_per_s:g} arrivals per second for {duration_s:g} s is less than one arrival")
        self.rate_per_s = rate_per_s
        self.duration_s = duration_s


@dataclasses.dataclass(frozen=True, slots=True)
class ClosedLoop:
    """A start plan: groups of runs, each begun when the one before has finished."""

    group_sizes: tuple[int, ...]  # runs of each group, in order
    side_by_side: int  # at most so many runs of a group are live at once
    pause_s: float  # between the last finish of a group and the start of the next

    @property
    def runs(self) -> int:
        """Return how many runs the plan starts in all."""
        return sum(self.group_sizes)


def closed_loop(mode: Mode, runs: int, burst_size: int, soak_interval_s: float) -> ClosedLoop:
    """Return the start plan of smoke, burst or soak.

    Smoke is one group of which at most `burst_size` runs are live at once. Burst is groups of `burst_size` started at
    one instant (the last may be smaller). Soak is one run after another, `soak_interval_s` seconds apart.
    Raises ValueError for a mode that is no closed loop.
    """
    if mode is Mode.SMOKE:
        return ClosedLoop((runs,), min(burst_size, runs), 0.0)
    if mode is Mode.BURST:
        full, rest = divmod(runs, burst_size)
        sizes = (burst_size,) * full + ((rest,) if rest else ())
        return ClosedLoop(sizes, max(sizes), 0.0)
    if mode is Mode.SOAK:
        return ClosedLoop((1,) * runs, 1, soak_interval_s)
    raise ValueError(f"{mode} is not a closed loop")


def constant(rate_per_s: float, duration_s: float) -> Seconds:
    """Return evenly spaced send times, in seconds from the start, the first at 0.

    Shape (floor(rate_per_s * duration_s),), increasing, all below `duration_s`. Open loop: replies never delay it.
    Raises EmptyArrivals when rate_per_s * duration_s < 1.
    """
    count = _arrivals(rate_per_s, duration_s)
    # Each instant from its own index: adding up gaps would drift by the rounding of every gap.
    return np.arange(count, dtype=np.float64) / rate_per_s


def poisson(rate_per_s: float, duration_s: float, seed: int) -> Seconds:
    """Return the send times of a Poisson process, in seconds from the start.

    Shape (n_requests,) with n_requests itself Poisson around rate_per_s * duration_s; non-decreasing, within
    [0, duration_s). The same seed gives the same times. Given their number, the arrivals of a Poisson process are
    independent and uniform over the interval (Ross, Stochastic Processes, theorem 2.3.1), so no gap is truncated.
    Raises EmptyArrivals when rate_per_s * duration_s < 1.
    """
    _arrivals(rate_per_s, duration_s)
    random = np.random.default_rng(seed)
    count = int(random.poisson(rate_per_s * duration_s))
    return np.sort(random.uniform(0.0, duration_s, count))


def bursts(rate_per_s: float, duration_s: float, size: int) -> Seconds:
    """Return the send times of bursts of `size`, in seconds from the start, so spaced that their mean rate is kept.

    Shape (floor(rate_per_s * duration_s),), non-decreasing, all below `duration_s`; the last burst may be smaller.
    Raises EmptyArrivals when rate_per_s * duration_s < 1.
    """
    count = _arrivals(rate_per_s, duration_s)
    return (np.arange(count, dtype=np.int64) // size * size) / rate_per_s


def burst(size: int, at_s: float = 0.0) -> Seconds:
    """Return `size` send times at one instant, in seconds from the start. Shape (size,)."""
    return np.full(size, at_s, dtype=np.float64)


@dataclasses.dataclass(frozen=True, slots=True)
class Schedule:
    """The whole schedule of an open loop in five values: whoever is given them has the very same instants."""

    kind: Arrivals
    rate_per_s: float  # of arrivals, on average
    duration_s: float
    seed: int = 1  # of what is random
    burst_size: int = 1  # arrivals of one burst, where they come in bursts

    def offsets_ns(self) -> Nanoseconds:
        """Return when each arrival is due, in nanoseconds from the start, non-decreasing. Shape (n_arrivals,).

        Raises EmptyArrivals when there would not be even one.
        """
        if self.kind is Arrivals.POISSON:
            due_s = poisson(self.rate_per_s, self.duration_s, self.seed)
        elif self.kind is Arrivals.BURST:
            due_s = bursts(self.rate_per_s, self.duration_s, self.burst_size)
        else:
            due_s = constant(self.rate_per_s, self.duration_s)
        if not len(due_s):  # a Poisson process of one expected arrival has none in a third of all seeds
            raise EmptyArrivals(self.rate_per_s, self.duration_s)
        return np.rint(due_s * 1e9).astype(np.int64)


def _arrivals(rate_per_s: float, duration_s: float) -> int:
    """Return how many whole arrivals fit; raise EmptyArrivals when none does."""
    # 0.3/s for 10 s is 3 arrivals even where the product of the two binary fractions is a hair below 3.
    count = int(np.floor(np.nextafter(rate_per_s * duration_s, np.inf)))
    if count < 1:
        raise EmptyArrivals(rate_per_s, duration_s)
    return count
