"""Rates while Redis is away: each process keeps buckets of its own, by the same arithmetic as gcra.lua, in memory.

Why each process gives the whole rate, unless the installation says otherwise, and what that can cost:
docs/decisions/0005-redis-away.md. Buckets start full, since nobody here knows what was spent; a drained one is the same
as none, and when there are too many, the one that was used longest ago goes.
"""

from __future__ import annotations

import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from service.quota.limits import Limit, Rate

MOST_BUCKETS = 10_000
"""Buckets that a process keeps: some 3 MB."""

TOKEN = 100 * 10**9
"""One token, units: a rate of r thousandths, of which p percent are given, drains exactly r * p in a microsecond."""


class State(NamedTuple):
    """What one rate says to a request; the order is that of gcra.lua's answer."""

    left: int  # whole tokens
    wait_us: int  # until one more token fits
    refused: int  # 1 or 0


class _Bucket(NamedTuple):
    level: int  # spent and not drained yet, units
    at_us: int  # when that was so
    drain: int  # units a microsecond


class LocalBuckets:
    """One process's buckets."""

    def __init__(
        self,
        percent: int = 100,
        most: int = MOST_BUCKETS,
        monotonic_us: Callable[[], int] = lambda: time.monotonic_ns() // 1000,
    ) -> None:
        self._percent = percent
        self._most = most
        self._monotonic_us = monotonic_us
        self._buckets: OrderedDict[tuple[uuid.UUID, Limit], _Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, workspace_id: uuid.UUID, wanted: Sequence[tuple[Limit, Rate]]) -> list[State]:
        """Take one token of each rate, or none when one of them refuses."""
        now_us = self._monotonic_us()
        drained = [self._drained((workspace_id, limit), rate, now_us) for limit, rate in wanted]
        over = [bucket.level + TOKEN > rate.burst * TOKEN for bucket, (_, rate) in zip(drained, wanted, strict=True)]
        states = []
        for bucket, (limit, rate), refuses in zip(drained, wanted, over, strict=True):
            level = bucket.level
            if not any(over):
                level += TOKEN
                self._keep((workspace_id, limit), bucket._replace(level=level))
            room = rate.burst * TOKEN - level
            states.append(State(max(0, room // TOKEN), -(min(0, room - TOKEN) // bucket.drain), int(refuses)))
        return states

    def _drained(self, key: tuple[uuid.UUID, Limit], rate: Rate, now_us: int) -> _Bucket:
        """Return a bucket as it stands now; another rate or a smaller burst is settled at once, as in gcra.lua."""
        drain = rate.thousandths * self._percent
        kept = self._buckets.get(key)
        if kept is None:
            return _Bucket(0, now_us, drain)
        left = max(0, kept.level - (now_us - kept.at_us) * max(drain, kept.drain))
        bucket = _Bucket(min(left, rate.burst * TOKEN), now_us, drain)
        self._keep(key, bucket if drain != kept.drain or bucket.level < left else kept)
        return bucket

    def _keep(self, key: tuple[uuid.UUID, Limit], bucket: _Bucket) -> None:
        self._buckets[key] = bucket
        self._buckets.move_to_end(key)
        if len(self._buckets) > self._most:
            self._buckets.popitem(last=False)
