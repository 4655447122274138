"""Did senders on several machines begin at one instant, as their rows say? Called by `validity`.

A sender's stamps are moved to the clock of the recording machine by an offset that was measured before the load
(`clocks`) and again after it. What they may be wrong by is the uncertainty of the first measurement and whatever the
clock ran away since. It moves arrivals of different machines against each other and lengthens no latency, whose two
stamps are one machine's.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.analysis.lateness import LATE_MS
from harness.analysis.slo import number
from harness.sampleset import Manifest, SenderClock

MISPLACED_MS = LATE_MS[False]
"""An arrival that is so far from its instant by the clock's fault is as wrong as one that left so late (50 ms)."""


def misalignments(manifest: Manifest) -> Iterator[str]:
    """Return each sender whose arrivals may be misplaced by more than that, in a sentence."""
    for sender in manifest.senders:
        worst_ms = misplaced_ms(sender)
        if worst_ms > MISPLACED_MS:
            yield (
                f"The clock of sender {sender.worker} was known to ±{number(sender.uncertainty_us / 1e3)} ms and moved"
                f" by {number(moved_us(sender) / 1e3)} ms or more during the load: its arrivals may be"
                f" {number(worst_ms)} ms off, more than {number(MISPLACED_MS)} ms."
            )


def misplaced_ms(sender: SenderClock) -> float:
    """Return how far from their instants its arrivals may be by its clock's fault, ms."""
    return (sender.uncertainty_us + moved_us(sender)) / 1e3


def moved_us(sender: SenderClock) -> float:
    """Return by how much its clock moved during the load at least, beyond what both measurements leave open, µs."""
    if sender.end_offset_us is None or sender.end_uncertainty_us is None:
        return 0.0
    apparent = sender.end_offset_us - sender.offset_us
    return max(0.0, abs(apparent) - sender.uncertainty_us - sender.end_uncertainty_us)
