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
    """One bucket, and the rate under which it was last asked."""

    spent: Fraction = Fraction(0)
    at_us: int | None = None
    per_s: Fraction = Fraction(0)


class ExactLimiter:
    """Several buckets of which a request takes one token each, or none."""

    def __init__(self) -> None:
        self._buckets: dict[str, ExactBucket] = {}

    def take(self, now_us: int, wanted: Sequence[tuple[str, Fraction, int]]) -> list[Fraction]:
        """Return for each (bucket, rate, burst) how many seconds it refuses; all zero: one token of each was taken."""
        waits = []
        for name, per_s, burst in wanted:
            bucket = self._buckets.setdefault(name, ExactBucket())
            if bucket.at_us is not None:
                rest_s = max(0, now_us - bucket.at_us) * US
                bucket.spent = max(Fraction(0), bucket.spent - rest_s * max(per_s, bucket.per_s))
            bucket.spent = min(bucket.spent, Fraction(burst))
            bucket.at_us, bucket.per_s = now_us, per_s
            waits.append(max(Fraction(0), bucket.spent + 1 - burst) / per_s)
        if not any(waits):
            for name, _, _ in wanted:
                self._buckets[name].spent += 1
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
