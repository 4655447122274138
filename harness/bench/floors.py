"""The floors: the least that this machine needs for the same kind of work, measured beside the paths.

bare framework   `bare_app` under the same server, event loop and parser, asked by the same generator
null server      `null_server`: the generator's own ceiling
pgbench -N       PostgreSQL's own "simple update" (an update, a select and an insert in one transaction, prepared)
                 on the same server, durability on
Redis            the service's own quota script, and PING, in pipelines of `PIPELINE`, by the client library the
                 service uses; redis-benchmark too, where it is on PATH
"""

from __future__ import annotations

import csv
import re
import shutil
import time
from importlib import resources
from pathlib import Path

import redis

from harness.bench.bare_app import LARGE_PATH, SMALL_PATH
from harness.bench.load import Load, run_load
from harness.bench.results import Repeat, repeat_of
from harness.bench.stage import Process, ProgramFailed, Stage, run_program
from harness.client import Client

PIPELINE = 64  # commands in one round trip; what a busy turn of the service's loop gathers
PGBENCH_THREADS = 2
RATE_THOUSANDTHS, BURST = 1_000_000_000, 1_000_000  # a rate that never refuses, as the quota script reads it


class HttpFloor:
    """A small server asked by the generator."""

    def __init__(self, process: Process) -> None:
        self._host, self._port = process.address
        self._client = Client(process.url)  # for the bytes of requests only; it opens nothing

    def post(self, wire: bytes, connections: int, seconds: float) -> Repeat:
        """Send the same bytes as the service gets."""
        return self._ask("the bare POST", wire, connections, seconds)

    def get_large(self, connections: int, seconds: float) -> Repeat:
        """Read a document of a snapshot's size."""
        return self._ask("the bare GET", self._client.wire("GET", LARGE_PATH, "none"), connections, seconds)

    def get_small(self, connections: int, seconds: float) -> Repeat:
        """Read a small document."""
        return self._ask("the bare small GET", self._client.wire("GET", SMALL_PATH, "none"), connections, seconds)

    def _ask(self, what: str, wire: bytes, connections: int, seconds: float) -> Repeat:
        load = Load(host=self._host, port=self._port, connections=connections, seconds=seconds, requests=[wire])
        measured = run_load(what, load)
        return repeat_of(measured.latencies_ns, measured.seconds)


class Pgbench:
    """PostgreSQL's own benchmark on a database of its own."""

    def __init__(self, stage: Stage, scale: int) -> None:
        """Make the tables: 100,000 rows for each unit of `scale`."""
        self._stage = stage
        self._program = str(stage.postgres.binary("pgbench"))
        self._url = stage.fresh_database("bench_pgbench")
        run_program([self._program, "-i", "-q", "-s", str(scale), self._url])
        stage.settle(self._url)

    def simple_update(self, connections: int, seconds: float) -> Repeat:
        """Run the built-in "simple update" script."""
        whole_s = max(1, round(seconds))  # pgbench counts in whole seconds
        options = ["-n", "-N", "-M", "prepared", "-c", str(connections), "-j", str(PGBENCH_THREADS), "-T", str(whole_s)]
        found = read_pgbench(run_program([self._program, *options, self._url]))
        self._stage.settle(self._url)
        return found


def read_pgbench(told: str) -> Repeat:
    """Read what pgbench prints; raises ProgramFailed when the figures are not there."""
    rate = re.search(r"^tps = ([\d.]+)", told, re.MULTILINE)
    count = re.search(r"^number of transactions actually processed: (\d+)", told, re.MULTILINE)
    if rate is None or count is None:
        raise ProgramFailed("pgbench", "it printed no tps")
    tps = float(rate.group(1))
    return Repeat(rate_per_s=tps, count=int(count.group(1)), seconds=int(count.group(1)) / tps if tps else 0.0)


def redis_script(url: str, seconds: float) -> Repeat:
    """Run the service's quota script in pipelines, each command on a bucket of its own."""
    source = resources.files("service").joinpath("quota/gcra.lua").read_text()
    with redis.Redis.from_url(url) as client:
        digest = client.script_load(source)

        def fill(pipe: redis.client.Pipeline) -> None:
            for number in range(PIPELINE):
                pipe.evalsha(digest, 1, f"bench:{number}", RATE_THOUSANDTHS, BURST)

        return _pipelines(client, fill, seconds)


def redis_ping(url: str, seconds: float) -> Repeat:
    """Send PING in pipelines."""
    with redis.Redis.from_url(url) as client:

        def fill(pipe: redis.client.Pipeline) -> None:
            for _ in range(PIPELINE):
                pipe.ping()

        return _pipelines(client, fill, seconds)


def _pipelines(client, fill, seconds: float) -> Repeat:  # type: ignore[no-untyped-def]
    started = time.perf_counter()
    count = 0
    while (elapsed := time.perf_counter() - started) < seconds or not count:
        with client.pipeline(transaction=False) as pipe:
            fill(pipe)
            pipe.execute()
        count += PIPELINE
    return Repeat(rate_per_s=count / elapsed, count=count, seconds=elapsed)


def redis_benchmark() -> Path | None:
    """Return the path of Redis' own benchmark, where it is installed."""
    found = shutil.which("redis-benchmark")
    return Path(found) if found else None


def redis_benchmark_ping(program: Path, socket: Path, seconds: float) -> Repeat:
    """Run Redis' own benchmark: PING from 32 connections in pipelines."""
    count = max(10_000, int(200_000 * seconds))
    options = ["-s", str(socket), "-c", "32", "-P", str(PIPELINE), "-n", str(count), "-t", "ping_mbulk", "--csv"]
    return read_redis_benchmark(run_program([str(program), *options]), count)


def read_redis_benchmark(told: str, count: int) -> Repeat:
    """Read the CSV of redis-benchmark: the last row's second field is the rate."""
    rows = [row for row in csv.reader(told.splitlines()) if len(row) > 1]
    try:
        rate = float(rows[-1][1])
        return Repeat(rate_per_s=rate, count=count, seconds=count / rate)
    except (IndexError, ValueError, ZeroDivisionError):
        raise ProgramFailed("redis-benchmark", "it printed no rate") from None
