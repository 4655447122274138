"""The limiter's reference: buckets by their definition, in exact fractions, sharing nothing with the service.

A bucket holds what was spent; it drains at its rate and never below nothing, and a token is taken when it fits under
the burst. Times are whole microseconds, everything else is a fraction of tokens and seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

US = Fraction(1, 1_000_000)


@dataclass
class ExactBucket:
    """One bucket as it stood when a token was taken last, or its rate, its burst or the clock changed."""

    spent: Fraction
    at_us: int
    per_s: Fraction


class ExactLimiter:
    """Several buckets of which a request takes one token each, or none."""

    def __init__(self) -> None:
        self._buckets: dict[str, ExactBucket] = {}

    def take(self, now_us: int, wanted: Sequence[tuple[str, Fraction, int]]) -> list[Fraction]:
        """Return for each (bucket, rate, burst) how many seconds it refuses; all zero: one token of each was taken."""
        waits, changed = [], {}
        for name, per_s, burst in wanted:
            old = self._buckets.get(name, ExactBucket(Fraction(0), now_us, per_s))
            rest_s = max(0, now_us - old.at_us) * US
            left = max(Fraction(0), old.spent - rest_s * max(per_s, old.per_s))
            spent = min(left, Fraction(burst))
            waits.append(max(Fraction(0), spent + 1 - burst) / per_s)
            changed[name] = ExactBucket(spent, now_us, per_s)
            if per_s != old.per_s or now_us < old.at_us or spent < left:
                self._buckets[name] = changed[name]
        if not any(waits):
            for name, bucket in changed.items():
                bucket.spent += 1
                self._buckets[name] = bucket
        return waits


def excess(admitted_us: Sequence[int], per_s: Fraction, burst: int) -> Fraction:
    """Return by how much the worst window of any length holds more than burst + rate * length; at most 0 is right.

    A window is closed at both ends, so the worst one begins and ends with an admission. Looked at in one pass: of the
    windows that end with the n-th admission the worst begins where number - rate * instant was lowest.
    """
    worst, lowest = Fraction(-burst), None
    for number, at_us in enumerate(admitted_us):
        height = number - per_s * at_us * US
        lowest = height if lowest is None else min(lowest, height)
        worst = max(worst, height - lowest + 1 - burst)
    return worst


class ExactLine:
    """One bucket whose requests are delayed instead of refused, and the line of those that were."""

    def __init__(self) -> None:
        self._spent = Fraction(0)
        self._line = Fraction(0)  # spent and promised
        self._at_us = 0
        self._per_s = Fraction(1)

    def take(
        self, now_us: int, per_s: Fraction, burst: int, returned: int, fresh: int
    ) -> tuple[int, int, list[Fraction]]:
        """Return how many of either kind are admitted, and how many seconds each of the others has to wait."""
        drained = max(0, now_us - self._at_us) * US * max(per_s, self._per_s)
        self._spent = min(Fraction(burst), max(Fraction(0), self._spent - drained))
        self._line = max(self._spent, self._line - drained) if per_s == self._per_s else self._spent
        self._at_us, self._per_s = now_us, per_s
        admitted, waits_s = [0, 0], []
        for _ in range(returned):
            if self._spent + 1 <= burst:
                admitted[0] += 1
                self._spent += 1
                self._line = max(self._line, self._spent)
        queued = returned - admitted[0]
        short = self._spent + 1 - burst
        if queued and short < Fraction(1, 2):
            waits_s.append(short / per_s)
            queued -= 1
        for _ in range(fresh):
            if self._line + 1 <= burst:
                admitted[1] += 1
                self._spent += 1
                self._line += 1
        for _ in range(queued + fresh - admitted[1]):
            waits_s.append(max(Fraction(0), self._line + 1 - burst) / per_s)
            self._line += 1
        return admitted[0], admitted[1], waits_s
