"""What a process that makes load knows of itself: how late its loop wakes, its pauses, the cores it did not get.

A measurement is only as good as its generator was on time. Every figure here is taken by the process that sends, so it
is true also when that process was stopped, starved or busy with itself. `resources` keeps it once a second, and
`analysis/validity` refuses a measurement whose generator could not keep up.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

HEARTBEAT_S = 0.01  # a twentieth of the tightest latency target (200 ms): a stall that matters cannot hide between two
_SCHEDSTAT = Path("/proc/thread-self/schedstat")  # ns on a core, ns ready without one, turns (Linux)


@dataclasses.dataclass(frozen=True, slots=True)
class Strain:
    """What the sending side suffered since the last look. Null where the system does not tell."""

    lag_ms: float | None  # latest wake-up of the loop, or of a request that was due; null when it did not beat
    gc_ms: float | None  # longest pause for garbage
    wait_percent: float | None  # of the time in which the sending thread was ready and had no core
    cpu_s: float  # of all processes of the harness, ever


def together(strains: Sequence[Strain], cpu_s: float) -> Strain:
    """Join what several processes suffered: the worst of each, for one late process is enough to spoil a measurement.

    `cpu_s` is what the processes that do not send have used.
    """
    return Strain(
        lag_ms=max((each.lag_ms for each in strains if each.lag_ms is not None), default=None),
        gc_ms=max((each.gc_ms for each in strains if each.gc_ms is not None), default=None),
        wait_percent=max((each.wait_percent for each in strains if each.wait_percent is not None), default=None),
        cpu_s=cpu_s + sum(each.cpu_s for each in strains),
    )


class SelfWatch:
    """Watches the process and the event loop it is in."""

    def __init__(self) -> None:
        self._lag_s: float | None = None
        self._pause_s: float | None = None
        self._pause_began_s = 0.0
        self._waited_ns, self._at_ns = _waited_ns(), time.monotonic_ns()

    async def watch(self) -> None:
        """Beat on a fixed grid until cancelled, and time the garbage collector."""
        due_s = time.monotonic()  # not the loop's own clock, which some loops read once a turn
        gc.callbacks.append(self._on_gc)
        try:
            while True:
                due_s = max(due_s + HEARTBEAT_S, time.monotonic())
                await asyncio.sleep(due_s - time.monotonic())
                self.note_lag(max(0.0, time.monotonic() - due_s))
        finally:
            gc.callbacks.remove(self._on_gc)

    def note_lag(self, late_s: float) -> None:
        """Note how late something was that was due."""
        if self._lag_s is None or late_s > self._lag_s:
            self._lag_s = late_s

    def _on_gc(self, phase: str, info: dict[str, int]) -> None:
        now_s = time.perf_counter()
        if phase == "start":
            self._pause_began_s = now_s
        else:
            self._pause_s = max(self._pause_s or 0.0, now_s - self._pause_began_s)

    def take(self) -> Strain:
        """Return what was suffered since the last call."""
        lag_s, self._lag_s = self._lag_s, None
        pause_s, self._pause_s = self._pause_s, None
        before_ns, before_at_ns = self._waited_ns, self._at_ns
        self._waited_ns, self._at_ns = _waited_ns(), time.monotonic_ns()
        waited: float | None = None
        if before_ns is not None and self._waited_ns is not None and self._at_ns > before_at_ns:
            waited = (self._waited_ns - before_ns) / (self._at_ns - before_at_ns) * 100
        return Strain(
            lag_ms=None if lag_s is None else lag_s * 1e3,
            gc_ms=None if pause_s is None else pause_s * 1e3,
            wait_percent=waited,
            cpu_s=time.process_time(),
        )


def _waited_ns() -> int | None:
    """Return how long this thread was ready to run and had no core, ever; None where the kernel does not tell."""
    try:
        return int(_SCHEDSTAT.read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None


@contextlib.contextmanager
def quiet_collector() -> Iterator[None]:
    """Keep the garbage collector from walking what was there before, and from walking often."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
