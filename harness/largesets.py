"""Latencies of sample sets that are larger than memory, on this disk or in storage that fsspec reaches.

Counts, means and quantiles per load and endpoint, the same numbers as `analysis/tables.latency_frame` gives, by DuckDB
over the Parquet files: one scan counts requests in buckets of 1 % of their latency, a second one counts the distinct
values of the few buckets in which a quantile lies. So memory is bounded by the number of buckets and not of rows, and
the quantile is exact: the smallest observed value that at least a share q do not exceed, failures infinitely slow.

Files are checked against their manifest (listed, hash, measurement, schema version, planned rows) and the deeper checks
of `analysis/validity` are not made, nor are intervals: verdicts are for `report`. Next: `placed`, where files lie.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb

from harness.analysis.slo import rounded
from harness.errors import BadUsage
from harness.folders import data_folder_of_checkout
from harness.placed import PlacedSet, placed_sets
from harness.sample import Mode, Outcome

QUANTILES = (0.5, 0.95, 0.99, 0.999)

MEMORY_MB_MIN = 128
MEMORY_MB_MAX = 1_000_000

BUCKET = 1.01
"""Each bucket ends so many times where it begins: some 2,000 from a microsecond to ten minutes."""

LEAST_MS = 1e-6
"""Latencies below are counted in the bucket of this: a clock that ticks in nanoseconds tells no shorter ones."""

ROWS = f"""
SELECT
    mode,
    endpoint,
    CASE WHEN outcome = '{Outcome.OK.value}' THEN coalesce(latency_ms, service_ms) END AS ms
FROM read_parquet($files, union_by_name = true)
"""  # noqa: S608 - of constants

# `greatest` passes over nulls, which are the failures here: they have no bucket.
BUCKET_OF = f"CASE WHEN ms IS NOT NULL THEN CAST(floor(ln(greatest(ms, {LEAST_MS})) / ln({BUCKET})) AS INTEGER) END"

COUNT = f"""
SELECT
    mode,
    endpoint,
    {BUCKET_OF} AS bucket,
    count(*) AS requests,
    fsum(ms) AS total_ms
FROM ({ROWS})
GROUP BY mode, endpoint, bucket
"""  # noqa: S608 - of constants

LOOK = f"""
SELECT mode, endpoint, bucket, ms, count(*) AS requests
FROM (SELECT *, {BUCKET_OF} AS bucket FROM ({ROWS}))
SEMI JOIN wanted USING (mode, endpoint, bucket)
GROUP BY mode, endpoint, bucket, ms
ORDER BY ms
"""  # noqa: S608 - of constants


@dataclasses.dataclass(frozen=True, slots=True)
class Latencies:
    """The requests of one endpoint under one load."""

    mode: str
    endpoint: str
    requests: int
    failed: int
    mean_ms: float | None  # of those that succeeded; null when none did
    quantiles_ms: dict[str, float | None]  # by name, as in "p99.9"; null among the failures


def read_latencies(places: Sequence[str], memory_mb: int = 512) -> tuple[Latencies, ...]:
    """Return the latencies of all sample sets in these places together, by load and endpoint.

    Raises BadUsage for a place that cannot be reached, SampleSetError for files that are not those recorded.
    """
    if not MEMORY_MB_MIN <= memory_mb <= MEMORY_MB_MAX:
        raise BadUsage(f"--memory-mb is from {MEMORY_MB_MIN} to {MEMORY_MB_MAX:,}, not {memory_mb}")
    sets = [one for place in places for one in placed_sets(place)]
    with duckdb.connect() as engine:
        _set_up(engine, sets, memory_mb)
        files = {"files": [file for one in sets for file in one.sample_files]}
        counted: dict[tuple[str, str], _Counted] = {}
        for mode, endpoint, bucket, requests, total_ms in engine.execute(COUNT, files).fetchall():
            counted.setdefault((mode, endpoint), _Counted({}, {})).add(bucket, requests, total_ms)
        wanted = [(*key, bucket) for key, one in counted.items() for bucket in one.wanted()]
        engine.execute("CREATE TABLE wanted (mode VARCHAR, endpoint VARCHAR, bucket INTEGER)")
        if wanted:
            engine.executemany("INSERT INTO wanted VALUES (?, ?, ?)", wanted)
        values: dict[tuple[str, str, int], list[tuple[float, int]]] = {}
        for mode, endpoint, bucket, ms, requests in engine.execute(LOOK, files).fetchall():
            values.setdefault((mode, endpoint, bucket), []).append((ms, requests))
    order = [mode.value for mode in Mode]
    keys = sorted(counted, key=lambda key: (order.index(key[0]), key[1]))
    return tuple(counted[key].told(key, values) for key in keys)


@dataclasses.dataclass(frozen=True, slots=True)
class _Counted:
    """What the first scan saw of one endpoint under one load."""

    requests: dict[int | None, int]  # by bucket; null: failures, which are slower than anything
    total_ms: dict[int | None, float]

    def add(self, bucket: int | None, requests: int, total_ms: float | None) -> None:
        """Note one bucket."""
        self.requests[bucket] = requests
        self.total_ms[bucket] = total_ms or 0.0

    @property
    def all(self) -> int:
        """Return how many requests there are."""
        return sum(self.requests.values())

    def _place(self, q: float) -> tuple[int | None, int]:
        """Return the bucket in which a quantile lies, null among the failures, and its rank within, from 1."""
        rank = max(math.ceil(round(q * self.all, 9)), 1)
        for bucket in sorted(key for key in self.requests if key is not None):
            if rank <= self.requests[bucket]:
                return bucket, rank
            rank -= self.requests[bucket]
        return None, rank

    def wanted(self) -> set[int]:
        """Return the buckets that have to be looked at."""
        return {bucket for bucket, _ in map(self._place, QUANTILES) if bucket is not None}

    def told(self, key: tuple[str, str], values: dict[tuple[str, str, int], list[tuple[float, int]]]) -> Latencies:
        """Return the numbers; `values` are those of the buckets looked at, rising, with how often each is there."""
        failed = self.requests.get(None, 0)
        good = self.all - failed
        total = math.fsum(self.total_ms.values())
        quantiles: dict[str, float | None] = {}
        for q in QUANTILES:
            bucket, rank = self._place(q)
            quantiles[f"p{q * 100:g}"] = None if bucket is None else rounded(_at(values[(*key, bucket)], rank))
        return Latencies(*key, self.all, failed, rounded(total / good) if good else None, quantiles)


def _at(values: list[tuple[float, int]], rank: int) -> float:
    """Return the value of a rank, from 1, among rising values with their counts."""
    for value, count in values:
        rank -= count
        if rank <= 0:
            return value
    raise AssertionError("the second scan saw fewer requests than the first")  # files are hashed: they do not change


def _set_up(engine: duckdb.DuckDBPyConnection, sets: Sequence[PlacedSet], memory_mb: int) -> None:
    """Bound the engine's memory, and let it reach what is not on this disk."""
    spill = data_folder_of_checkout() / "cache" / "duckdb"
    options: dict[str, Any] = {
        "memory_limit": f"{memory_mb}MB",
        "temp_directory": str(Path(spill)),
        "preserve_insertion_order": False,
        "autoinstall_known_extensions": False,  # a reader of files has no business on the network
        "autoload_known_extensions": False,
    }
    for name, value in options.items():
        engine.execute(f"SET {name} = {value!r}" if isinstance(value, str) else f"SET {name} = {str(value).lower()}")
    for files in {one.protocol: one.files for one in sets if one.protocol != "file"}.values():
        engine.register_filesystem(files)
