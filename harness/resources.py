"""Looks at the machine and the service once a second, so that a slow answer can be traced to what was short.

What a source does not tell is null, never zero: a remote service has no process here, an older one lacks a metric.
Rates are differences between two looks, so the first look has none.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable

import psutil
from prometheus_client.parser import text_string_to_metric_families

from harness.api import Api
from harness.sample import ResourceSample
from harness.selfwatch import Strain

QUEUE_DEPTH = "plimsoll_queue_depth"
OLDEST_DUE_TICK = "plimsoll_oldest_due_tick_seconds"
TICKS = "plimsoll_ticks_total"
PUBLISH_LAG = "plimsoll_publish_lag_seconds"
DB_WRITE = "plimsoll_db_write_seconds"  # of the HTTP processes
TICK_WRITE = "plimsoll_tick_write_seconds"  # of the workers
_WANTED = (QUEUE_DEPTH, OLDEST_DUE_TICK, TICKS, PUBLISH_LAG, DB_WRITE, TICK_WRITE)

Metrics = dict[str, list[float]]


def read_metrics(text: str) -> Metrics:
    """Read the few metrics that are recorded, by sample name, a value for each label set; unreadable text is none.

    Buckets are left out before parsing: they are most of the text and none of it is recorded.
    """
    lines = [line for line in text.splitlines() if line.startswith(_WANTED) and "_bucket{" not in line]
    found: Metrics = {}
    try:
        for family in text_string_to_metric_families("\n".join([*lines, ""])):
            for sample in family.samples:
                found.setdefault(sample.name, []).append(sample.value)
    except ValueError:
        return {}
    return found


def gauge(metrics: Metrics, name: str, join: Callable[[Iterable[float]], float] = sum) -> float | None:
    """Return a gauge's value, `join`ed over its label sets; None when it is not told."""
    return float(join(metrics[name])) if name in metrics else None


def increase(before: Metrics, now: Metrics, name: str) -> float | None:
    """Return by how much a counter rose between two looks that both saw metrics; None where that cannot be said.

    A counter with labels shows only once it has counted, so one that is new rose from zero. One that fell belongs to a
    process that began anew.
    """
    if not before or name not in now:
        return None
    rise = sum(now[name]) - sum(before.get(name, []))
    return rise if rise >= 0 else None


def mean_ms(before: Metrics, now: Metrics, *names: str) -> float | None:
    """Return the mean of several metrics' new observations in milliseconds; None when there were none."""
    rises = [(increase(before, now, f"{name}_sum"), increase(before, now, f"{name}_count")) for name in names]
    told = [(total_s, count) for total_s, count in rises if total_s is not None and count is not None]
    count = sum(count for _, count in told)
    return sum(total_s for total_s, _ in told) / count * 1e3 if count else None


class Resources:
    """Takes one look after another; each `look` is a row."""

    def __init__(self, api: Api, pids: Callable[[], set[int]]) -> None:
        """`pids` names the service's processes on this machine, asked at each look; empty when they are elsewhere."""
        self._api = api
        self._pids = pids
        self._metrics: Metrics = {}
        self._metrics_at = time.monotonic()
        self._cpu = psutil.cpu_times()
        self._own_cpu_s, self._at = time.process_time(), time.monotonic()
        self._service_cpu_s: dict[int, float] = {}

    async def look(self, strain: Strain) -> ResourceSample:
        """Take one look. Files are read in a thread, so that the load does not wait for them."""
        text = await self._api.metrics_text()
        return await asyncio.to_thread(self._row, text, strain)

    def _row(self, text: str | None, strain: Strain) -> ResourceSample:
        at_ns, now = time.monotonic_ns(), time.monotonic()
        elapsed_s, self._at = now - self._at, now
        own_s = strain.cpu_s
        own_percent, self._own_cpu_s = _percent(own_s - self._own_cpu_s, elapsed_s), own_s
        cpu_percent, iowait_percent, steal_percent = self._machine()
        rss_bytes, service_percent = self._service(elapsed_s)
        before, metrics = self._metrics, read_metrics(text) if text is not None else {}
        ticks = increase(before, metrics, TICKS)
        row = ResourceSample(
            at_ns=at_ns,
            cpu_percent=cpu_percent,
            load1=os.getloadavg()[0],
            service_rss_bytes=rss_bytes,
            service_cpu_percent=service_percent,
            harness_cpu_percent=own_percent,
            queue_depth=gauge(metrics, QUEUE_DEPTH),
            oldest_due_tick_s=gauge(metrics, OLDEST_DUE_TICK, max),
            ticks_per_s=None if ticks is None else ticks / (now - self._metrics_at),
            redis_publish_lag_ms=mean_ms(before, metrics, PUBLISH_LAG),
            db_write_ms=mean_ms(before, metrics, DB_WRITE, TICK_WRITE),
            iowait_percent=iowait_percent,
            generator_lag_ms=strain.lag_ms,
            generator_gc_ms=strain.gc_ms,
            generator_wait_percent=strain.wait_percent,
            steal_percent=steal_percent,
        )
        if metrics:
            self._metrics, self._metrics_at = metrics, now
        return row

    def _machine(self) -> tuple[float | None, float | None, float | None]:
        """Return the share of time in which the cores were busy, waited for a disk, and were taken away, in percent."""
        before, self._cpu = self._cpu, psutil.cpu_times()
        spent = {name: getattr(self._cpu, name) - getattr(before, name) for name in self._cpu._fields}
        # guest time is counted within user time as well
        total = sum(spent.values()) - spent.get("guest", 0.0) - spent.get("guest_nice", 0.0)
        if total <= 0:
            return None, None, None
        busy = total - spent["idle"] - (spent.get("iowait") or 0.0)
        told = [None if (share := spent.get(name)) is None else share / total * 100 for name in ("iowait", "steal")]
        return busy / total * 100, told[0], told[1]

    def _service(self, elapsed_s: float) -> tuple[int | None, float | None]:
        """Return memory and processor use of the service's processes together; None when there are none here."""
        rss_bytes, before, seen = 0, self._service_cpu_s, dict[int, float]()
        for pid in self._pids():
            try:
                process = psutil.Process(pid)
                spent = process.cpu_times()
                rss_bytes += process.memory_info().rss
            except psutil.Error:
                continue  # it ended meanwhile
            seen[pid] = spent.user + spent.system
        self._service_cpu_s = seen
        if not seen:
            return None, None
        rises = [seen[pid] - before[pid] for pid in seen if pid in before]
        return rss_bytes, _percent(max(0.0, sum(rises)), elapsed_s) if rises else None


def _percent(spent_s: float, elapsed_s: float) -> float | None:
    return spent_s / elapsed_s * 100 if elapsed_s > 0 else None
