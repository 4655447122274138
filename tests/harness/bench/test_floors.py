"""What other tools print is read, or refused when the figure is not in it."""

from __future__ import annotations

import pytest

from harness.bench.floors import read_pgbench, read_redis_benchmark
from harness.bench.results import Repeat
from harness.bench.stage import ProgramFailed

PGBENCH = """pgbench (18.4)
transaction type: <builtin: simple update>
number of transactions actually processed: 5000
number of failed transactions: 0 (0.000%)
latency average = 1.600 ms
initial connection time = 5.000 ms
tps = 2500.000000 (without initial connection time)
"""
REDIS_BENCHMARK = """"test","rps","avg_latency_ms","min_latency_ms"
"PING_MBULK","500000.00","0.5","0.1"
"""


def test_pgbench_tells_its_rate() -> None:
    assert read_pgbench(PGBENCH) == Repeat(rate_per_s=2500.0, count=5000, seconds=2.0)


def test_redis_benchmark_tells_its_rate() -> None:
    assert read_redis_benchmark(REDIS_BENCHMARK, 100_000) == Repeat(rate_per_s=500_000.0, count=100_000, seconds=0.2)


def test_pgbench_without_a_rate_is_refused() -> None:
    with pytest.raises(ProgramFailed, match="pgbench failed: it printed no tps"):
        read_pgbench("pgbench: connection to server failed")


@pytest.mark.parametrize("told", ["", '"test","rps"\n', '"PING_MBULK","0"\n'], ids=["nothing", "a head only", "zero"])
def test_redis_benchmark_without_a_rate_is_refused(told: str) -> None:
    with pytest.raises(ProgramFailed, match="redis-benchmark failed: it printed no rate"):
        read_redis_benchmark(told, 1)
