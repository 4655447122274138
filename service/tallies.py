"""What the workers count, kept where any process can read it: one Redis hash that all workers add to.

Workers serve no HTTP, and may run on other machines than the API; so their figures ride along with their announcements
and /metrics of every API process shows the sum. A FLUSHALL sets them back to zero, which Prometheus takes as the
counter reset that it is. While Redis is away they are kept in the worker and added later. An increment whose answer was
lost on the way is added twice: these are figures to watch, not to account with.
"""

from __future__ import annotations

from bisect import bisect_left

import redis.asyncio
from redis.exceptions import RedisError

from service.telemetry import LATENCY_BUCKETS_S

KEY = "plimsoll:tallies"
"""Name of the Redis hash."""

_DELAYED = "ticks_delayed:"

_BOUNDS = [*map(str, LATENCY_BUCKETS_S), "+Inf"]


class Tallies:
    """The figures of one worker that are not in Redis yet."""

    def __init__(self) -> None:
        self._amounts: dict[str, float] = {}

    def count_ticks(self, ticks: int, fenced: int, write_s: float) -> None:
        """Count one written batch: its ticks, the turns thrown away, and how long writing took."""
        self._add("ticks", ticks)
        self._add("ticks_fenced", fenced)
        self._add("tick_write_count", 1)
        self._add("tick_write_sum_s", write_s)

    def observe_wait(self, wait_s: float) -> None:
        """Count one claimed run by how long it had been due."""
        self._add("tick_wait_le:" + _BOUNDS[bisect_left(LATENCY_BUCKETS_S, wait_s)], 1)
        self._add("tick_wait_sum_s", wait_s)

    def count_delayed(self, workspace: str, turns: int) -> None:
        """Count turns that a tick rate delayed, by the workspace as `quota.refusals` names it."""
        self._add(_DELAYED + workspace, turns)

    def count_local_turns(self, admitted: int, delayed: int) -> None:
        """Count turns whose rate was checked in their own process."""
        self._add("ticks_local_admitted", admitted)
        self._add("ticks_local_delayed", delayed)

    def take(self) -> dict[str, float]:
        """Return what is not in Redis yet, by field, and forget it."""
        taken, self._amounts = self._amounts, {}
        return taken

    def put_back(self, taken: dict[str, float]) -> None:
        """Remember amounts that did not reach Redis."""
        for field, amount in taken.items():
            self._add(field, amount)

    def _add(self, field: str, amount: float) -> None:
        if amount:
            self._amounts[field] = self._amounts.get(field, 0) + amount


async def worker_figures(client: redis.asyncio.Redis) -> bytes:
    """Return the sum of all workers' figures in Prometheus' text format; nothing while Redis is away."""
    try:
        kept = await client.hgetall(KEY)
    except (RedisError, OSError):
        return b""
    return exposition({_text(field): float(value) for field, value in kept.items()})


def _text(field: bytes | str) -> str:
    return field if isinstance(field, str) else field.decode()


def exposition(amounts: dict[str, float]) -> bytes:
    """Write the hash's fields in Prometheus' text format (version 0.0.4)."""
    lines = [
        "# HELP plimsoll_ticks_total Worker turns that advanced a run.",
        "# TYPE plimsoll_ticks_total counter",
        f"plimsoll_ticks_total {amounts.get('ticks', 0):.0f}",
        "# HELP plimsoll_ticks_fenced_total Worker turns thrown away because another worker had the run.",
        "# TYPE plimsoll_ticks_fenced_total counter",
        f"plimsoll_ticks_fenced_total {amounts.get('ticks_fenced', 0):.0f}",
        "# HELP plimsoll_tick_write_seconds Duration of the transaction that writes a batch of ticks.",
        "# TYPE plimsoll_tick_write_seconds summary",
        f"plimsoll_tick_write_seconds_sum {amounts.get('tick_write_sum_s', 0):.6f}",
        f"plimsoll_tick_write_seconds_count {amounts.get('tick_write_count', 0):.0f}",
        "# HELP plimsoll_tick_wait_seconds From the moment a run was due to the moment a worker claimed it.",
        "# TYPE plimsoll_tick_wait_seconds histogram",
    ]
    claimed = 0.0
    for bound in _BOUNDS:
        claimed += amounts.get(f"tick_wait_le:{bound}", 0)
        lines.append(f'plimsoll_tick_wait_seconds_bucket{{le="{bound}"}} {claimed:.0f}')
    lines.append(f"plimsoll_tick_wait_seconds_sum {amounts.get('tick_wait_sum_s', 0):.6f}")
    lines.append(f"plimsoll_tick_wait_seconds_count {claimed:.0f}")
    lines += [
        "# HELP plimsoll_ticks_delayed_total Worker turns put off because their workspace was over its tick rate.",
        "# TYPE plimsoll_ticks_delayed_total counter",
        *(
            f'plimsoll_ticks_delayed_total{{workspace="{field.removeprefix(_DELAYED)}"}} {amount:.0f}'
            for field, amount in sorted(amounts.items())
            if field.startswith(_DELAYED)
        ),
        "# HELP plimsoll_ticks_local_total Worker turns whose rate was checked in their worker, without Redis.",
        "# TYPE plimsoll_ticks_local_total counter",
        *(
            f'plimsoll_ticks_local_total{{outcome="{outcome}"}} {amounts.get(f"ticks_local_{outcome}", 0):.0f}'
            for outcome in ("admitted", "delayed")
        ),
    ]
    return "\n".join([*lines, ""]).encode()
