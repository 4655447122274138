"""Ticks: runs that are due in bulk, and one real worker process that drains them.

The runs are accepted beforehand by a serve process, which is gone when the worker starts. The rate is read off the
database's own clock: each step carries its transaction's instant, so the steps written before the last instant, over
the time from the first instant to the last, are the rate, whatever starting and stopping a process takes.
"""

from __future__ import annotations

import time

from harness.bench.load import Load, LoadFailed, run_load
from harness.bench.results import Repeat
from harness.bench.service_paths import SCRIPT, SERVE, WORKER, make_workspace
from harness.bench.stage import Process, Stage

DRAIN_S = 120.0  # for a worker to drain what is due
LOOK_EVERY_S = 0.2  # a look costs a short-lived psql
ACCEPTING_CONNECTIONS = 64

LOOK = """
    SELECT (SELECT count(*) FROM runs WHERE ended_at IS NULL),
           (SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'plimsoll')
"""
RATE = """
    WITH written AS (SELECT created_at FROM steps WHERE created_at >= '{since}'),
         ends AS (SELECT min(created_at) AS first, max(created_at) AS last FROM written)
    SELECT count(*), count(*) FILTER (WHERE created_at < last), extract(epoch FROM last - first)
    FROM written, ends GROUP BY first, last
"""


class Ticks:
    """A database of its own in which runs fall due."""

    def __init__(self, stage: Stage, runs: int) -> None:
        """`runs` fall due at once in each repeat."""
        self._stage = stage
        self._runs = runs
        self._environment = stage.service_environment("bench_ticks", redis_number=2)
        self._database_url = self._environment["DATABASE_URL"]
        self.connections = 0  # most that the worker was seen to hold

    def drain(self, runs: int | None = None) -> Repeat:
        """Let runs fall due and measure how a worker drains them."""
        count = runs or self._runs
        self._accept(count)
        self._stage.settle(self._database_url)
        ((since,),) = self._stage.sql(self._database_url, "SELECT clock_timestamp()")
        with Process(WORKER, self._environment, listens=False) as worker:
            self._wait(worker)
        ((written, timed, elapsed),) = self._stage.sql(self._database_url, RATE.format(since=since))
        self._stage.settle(self._database_url)
        if int(written) != count * len(SCRIPT):
            raise LoadFailed("ticks", f"{written} steps were written, not {count * len(SCRIPT)}")
        seconds = float(elapsed)
        if seconds <= 0:
            raise LoadFailed("ticks", f"{count} runs are too few to time")
        return Repeat(rate_per_s=int(timed) / seconds, count=int(written), seconds=seconds)

    def _accept(self, count: int) -> None:
        with Process(SERVE, self._environment, listens=True) as process:
            workspace = make_workspace(process.url, self._environment)
            host, port = process.address
            load = Load(
                host=host,
                port=port,
                connections=ACCEPTING_CONNECTIONS,
                seconds=DRAIN_S,
                requests=[workspace.create_wire(0)],
                most=count,
            )
            run_load("runs that fall due", load)

    def _wait(self, worker: Process) -> None:
        """Return when no run is left."""
        give_up_at = time.monotonic() + DRAIN_S
        while True:
            ((left, connections),) = self._stage.sql(self._database_url, LOOK)
            self.connections = max(self.connections, int(connections))
            if not int(left):
                return
            worker.require_alive()
            if time.monotonic() > give_up_at:
                raise LoadFailed("ticks", f"{left} runs were left after {DRAIN_S:.0f} s")
            time.sleep(LOOK_EVERY_S)
