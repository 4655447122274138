"""Whether a trace keeps what docs/rates.md promises. Pure: traces and counts in, sentences out; none: all was kept.

The arithmetic is in exact fractions and shares nothing with the service.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from fractions import Fraction

from tests.campaigns.quota_trace import Trace
from tests.service.quota.exact import US, excess

STEADINESS = Fraction("0.99")
"""At which part of their rate steady clients send."""


class Behaviour(enum.StrEnum):
    """How the clients of a cell behave, and so what they must see."""

    GREEDY = "greedy"  # ask at three times the rate, whatever they are told: get ⌊B + R·T⌋, one more or less
    STEADY = "at 0.99 R"  # send on schedule at 0.99 of the rate, all together: are never refused
    OBEDIENT = "obedient"  # one client asks for more than a burst, and waits Retry-After: its first retry succeeds


@dataclass
class Told:
    """What the clients of a cell were told, all together."""

    admitted: int = 0  # answers other than a refusal by the rate: a cap may still have refused
    refused: int = 0  # by the rate
    refused_by_cap: int = 0  # of those admitted
    failed: int = 0  # no answer, or one of 500 and above
    first_retries: int = 0
    first_retries_refused: int = 0

    def add(self, other: Told) -> None:
        """Take in what another client was told."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Cell:
    """One measurement: some clients of one behaviour on one rate, in a workspace of their own."""

    limit: str
    behaviour: Behaviour
    clients: int
    per_s: Fraction
    burst: int
    trace: Trace
    told: Told

    @property
    def span_us(self) -> int:
        """How long was asked, by the server's clock."""
        return self.trace.asked_us[-1] - self.trace.asked_us[0] if self.trace.asked_us else 0

    def saturated(self) -> tuple[int, int]:
        """Return from when to when every token was asked for, microseconds of the server's clock.

        From the last request that met a rested bucket (the first one, when clients never paused for so long): until
        then tokens were lost to nobody asking. To the last refusal: at a refusal less than one token is left, so that
        everything until then must have been admitted.
        """
        trace = self.trace
        if not trace.refused_us:
            return 0, 0
        moments = sorted([(at_us, 0) for at_us in trace.asked_us] + [(at_us, 1) for at_us in trace.admitted_us])
        spent, before_us, start_us = Fraction(0), trace.asked_us[0], trace.asked_us[0]
        for at_us, taken in moments:
            spent = max(Fraction(0), spent - (at_us - before_us) * US * self.per_s)
            before_us = at_us
            if taken:
                spent += 1
            elif not spent:
                start_us = at_us
        return start_us, max(start_us, trace.refused_us[-1])

    def entitled(self) -> tuple[int, int]:
        """Return ⌊B + R·T⌋ and what was admitted, T being the time for which every token was asked for."""
        start_us, end_us = self.saturated()
        admitted = sum(start_us <= at_us <= end_us for at_us in self.trace.admitted_us)
        return int(self.burst + self.per_s * (end_us - start_us) * US), admitted

    def worst_window(self) -> Fraction:
        """Return by how many tokens the worst window exceeds B + R·w; at most 0 is right."""
        return excess(self.trace.admitted_us, self.per_s, self.burst)

    def late_s(self) -> float:
        """Return by how much a steady cell's requests reached Redis later than one another's schedule has it."""
        interval_us = 1 / (self.per_s * STEADINESS * US)
        offsets = [at_us - float(number * interval_us) for number, at_us in enumerate(self.trace.asked_us)]
        return (max(offsets) - min(offsets)) / 1e6 if offsets else 0.0


def faults_of(cell: Cell, least_s: float) -> list[str]:
    """Return what a cell did not keep, or why it shows nothing."""
    faults = []
    if cell.span_us < least_s * 1e6:
        faults.append(f"asked for {cell.span_us / 1e6:.1f} s only, not {least_s:g}")
    if cell.told.failed:
        faults.append(f"{cell.told.failed} requests failed")
    if cell.told.admitted != len(cell.trace.admitted_us):
        faults.append(f"Redis admitted {len(cell.trace.admitted_us)}, but clients were told of {cell.told.admitted}")
    if cell.told.refused != len(cell.trace.refused_us):
        faults.append(f"Redis refused {len(cell.trace.refused_us)}, but clients were told of {cell.told.refused}")
    if (over := cell.worst_window()) > 0:
        faults.append(f"a window admits {float(over):.3f} more than B + R·w")
    if cell.behaviour is Behaviour.GREEDY:
        entitled, admitted = cell.entitled()
        start_us, end_us = cell.saturated()
        if end_us - start_us < least_s * 1e6:
            faults.append(f"every token was asked for during {(end_us - start_us) / 1e6:.1f} s only, not {least_s:g}")
        elif abs(admitted - entitled) > 1:
            faults.append(f"{admitted} admitted, {entitled} due")
    if cell.behaviour is Behaviour.STEADY and cell.told.refused:
        makes_up_s = float((cell.burst - 1) / cell.per_s)
        why = f" (they reached Redis up to {cell.late_s():.2f} s late, and the burst makes up for {makes_up_s:.2f} s)"
        faults.append(f"{cell.told.refused} of a client at 0.99 R refused{why}")
    if cell.behaviour is Behaviour.OBEDIENT:
        if cell.told.first_retries_refused:
            faults.append(f"{cell.told.first_retries_refused} of {cell.told.first_retries} first retries refused")
        if not cell.told.first_retries:
            faults.append("nobody had to retry: shows nothing about Retry-After")
    return faults
