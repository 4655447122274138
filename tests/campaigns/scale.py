"""Quantiles of many rows by three engines in one run: `harness latencies`, pandas and Polars, each in a fresh process.

Writes a sample set of so many rows with lognormal latencies and a tail of failures, as the harness writes one, lets
each engine give the same numbers (smallest observed value that at least a share q do not exceed, failures infinitely
slow), compares them, and writes down the time and the largest resident memory of each process. The rows are removed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from harness.sample import Endpoint, Mode, Outcome, Sample, arrow_schema
from tests.campaigns.evidence import write_page
from tests.campaigns.flags import Flags
from tests.harness.synthetic import ORIGIN_NS, WALL_NS, Plan, hashes, write_sample_set

PAGE = Path("docs/evidence/scale.md")
PEERS = Path(".venv-tools/peers/bin/python")
SEED = 2026
FILE_ROWS = 1_000_000
QUANTILES = (0.5, 0.95, 0.99, 0.999)
FAILING = 0.002
LOOK_S = 0.02
TYPICAL_MS = {Endpoint.CREATE: 25.0, Endpoint.SPAWN: 18.0, Endpoint.SNAPSHOT: 9.0}

PANDAS = """
import glob, json, sys
import numpy as np, pandas as pd
columns = ["endpoint", "outcome", "latency_ms"]
frame = pd.concat([pd.read_parquet(file, columns=columns) for file in sorted(glob.glob(sys.argv[1]))])
told = {}
for endpoint, rows in frame.groupby("endpoint", observed=True):
    ok = (rows["outcome"] == "ok").to_numpy()
    ms = np.where(ok, rows["latency_ms"].to_numpy(), np.inf)
    found = [float(np.quantile(ms, q, method="inverted_cdf")) for q in json.loads(sys.argv[2])]
    told[str(endpoint)] = [len(ms), int((~ok).sum()), float(ms[ok].mean()), *found]
print(json.dumps(told))
"""

POLARS = """
import json, sys
import polars as pl
ms = pl.when(pl.col("outcome").cast(pl.String) == "ok").then(pl.col("latency_ms")).otherwise(float("inf"))
good = ms.is_finite()
found = [ms.quantile(q, "equiprobable").alias(str(q)) for q in json.loads(sys.argv[2])]
frame = pl.scan_parquet(sys.argv[1]).group_by(pl.col("endpoint").cast(pl.String)).agg(
    pl.len().alias("requests"), (~good).sum().alias("failed"), ms.filter(good).mean().alias("mean"), *found
).collect(engine="streaming")
print(json.dumps({row[0]: list(row[1:]) for row in frame.iter_rows()}))
"""


@dataclasses.dataclass(frozen=True)
class Taken:
    """What one engine took and gave."""

    engine: str
    seconds: float
    memory_mb: float  # largest resident memory of the process
    told: dict[str, list[float]]  # by endpoint: requests, failed, mean, then QUANTILES; empty when it did not finish


def write_rows(root: Path, rows: int) -> Path:
    """Write a set of so many rows, some per cent of them failures, in files of FILE_ROWS; return its folder."""
    path = write_sample_set(root, Plan(mode=Mode.OPEN, runs=1, children=0, polls=0, measurement_id="scale"))
    (path / "samples-00001.parquet").unlink()
    random = np.random.default_rng(SEED)
    schema = arrow_schema(Sample, "scale")
    for number, first in enumerate(range(0, rows, FILE_ROWS), start=1):
        table = _table(random, first, min(FILE_ROWS, rows - first), schema)
        pq.write_table(table, path / f"samples-{number:05d}.parquet", compression="zstd")
    manifest = json.loads((path / "manifest.json").read_bytes())
    end_ns = ORIGIN_NS + rows * 10_000 + 10_000_000_000
    manifest["clock"]["end"] = {"monotonic_ns": end_ns, "wall_ns": WALL_NS + end_ns - ORIGIN_NS}
    manifest |= {"planned_requests": rows, "files": hashes(path)}
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return path


def _table(random: np.random.Generator, first: int, count: int, schema: pa.Schema) -> pa.Table:
    """Make rows: 100,000 a second, service times lognormal and rounded as the recorder rounds them."""
    endpoints = random.integers(0, len(TYPICAL_MS), count)
    typical = np.array(list(TYPICAL_MS.values()))[endpoints]
    ms = np.round(typical * np.exp(0.6 * random.standard_normal(count)) * 1024) / 1024
    ok = random.random(count) >= FAILING
    due = ORIGIN_NS + 10_000 * np.arange(first, first + count)
    done = due + (ms * 1e6).astype(np.int64)
    numbers = pa.array(np.arange(first, first + count)).cast(pa.string())
    given: dict[str, Any] = {
        "run_key": pc.binary_join_element_wise("run", numbers, "-"),
        "scenario": _words(["scale"], np.zeros(count, np.int8)),
        "endpoint": _words([one.value for one in TYPICAL_MS], endpoints.astype(np.int8)),
        "mode": _words([Mode.OPEN.value], np.zeros(count, np.int8)),
        "trial": np.zeros(count, np.int64), "worker": np.zeros(count, np.int64),
        "intended_at_ns": due, "sent_at_ns": due, "first_byte_at_ns": done, "done_at_ns": done,
        "latency_ms": ms, "service_ms": ms, "status": np.where(ok, 200, 503),
        "outcome": _words([Outcome.HTTP_ERROR.value, Outcome.OK.value], ok.astype(np.int8)),
    }  # fmt: skip
    columns = [
        (given[field.name] if isinstance(given[field.name], pa.Array) else pa.array(given[field.name])).cast(field.type)
        if field.name in given
        else pa.nulls(count, field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _words(names: list[str], codes: Any) -> pa.Array:
    """Return a column of a few words."""
    return pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(names))


def measured(engine: str, words: list[str]) -> tuple[float, float, str]:
    """Carry out a command; return its seconds, its largest resident memory in MB and what it printed.

    The kernel keeps the largest (VmHWM) for each program; what `wait4` tells begins with the memory of whoever forked.
    """
    with tempfile.TemporaryFile() as out:
        began, most_kb = time.monotonic(), 0
        process = subprocess.Popen(words, stdout=out)  # noqa: S603 - our own words
        while process.poll() is None:
            most_kb = max(most_kb, _most_resident_kb(process.pid))
            time.sleep(LOOK_S)
        took = time.monotonic() - began
        out.seek(0)
        text = out.read().decode()
    sys.stderr.write(f"{engine}: {took:.1f} s, {most_kb / 1024:.0f} MB, exit {process.returncode}\n")
    return took, most_kb / 1024, text if process.returncode == 0 else ""


def _most_resident_kb(pid: int) -> int:
    """Return the largest resident memory so far of a process, 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def ours(path: Path, memory_mb: int) -> Taken:
    """Let `harness latencies` do it."""
    words = [sys.executable, "-m", "harness", "latencies", "--json", "--memory-mb", str(memory_mb), str(path)]
    took, used, text = measured("harness latencies", words)
    found = json.loads(text)["latencies"] if text else []
    told = {
        one["endpoint"]: [
            one["requests"],
            one["failed"],
            one["mean_ms"],
            *map(_or_failed, one["quantiles_ms"].values()),
        ]
        for one in found
    }
    return Taken("harness latencies", took, used, told)


def _or_failed(quantile_ms: float | None) -> float:
    """Return a quantile as the other engines tell it: infinite among the failures."""
    return math.inf if quantile_ms is None else quantile_ms


def peer(engine: str, python: str, code: str, path: Path) -> Taken:
    """Let another engine do it."""
    words = [python, "-c", code, str(path / "samples-*.parquet"), json.dumps(QUANTILES)]
    took, used, text = measured(engine, words)
    return Taken(engine, took, used, json.loads(text) if text else {})


def agree(one: Taken, other: Taken) -> bool:
    """Tell whether two engines give the same numbers: ours are told with six digits, and counts whole."""
    return one.told.keys() == other.told.keys() and all(
        math.isclose(float(f"{mine:.6g}"), float(f"{theirs:.6g}"), rel_tol=1e-9)
        for endpoint, numbers in one.told.items()
        for mine, theirs in zip(numbers, other.told[endpoint], strict=True)
    )


def compare(rows: int, memory_mb: int) -> tuple[list[str], bool]:
    """Let every engine do it; return the lines of the page, and whether they agree and ours stays small."""
    root = Path(tempfile.mkdtemp(prefix="scale-"))
    try:
        began = time.monotonic()
        path = write_rows(root, rows)
        size = sum(file.stat().st_size for file in path.glob("*.parquet"))
        sys.stderr.write(f"{rows:,} rows, {size / 1e6:.0f} MB, in {time.monotonic() - began:.0f} s\n")
        found = [ours(path, memory_mb), peer("pandas", sys.executable, PANDAS, path)]
        if PEERS.exists():
            found.append(peer("Polars", str(PEERS), POLARS, path))
    finally:
        shutil.rmtree(root)
    same = all(agree(found[0], other) for other in found[1:] if other.told)
    small = found[0].memory_mb <= 1024 and bool(found[0].told)
    verdict = (
        f"All engines that finished give the same numbers: {'yes' if same else '**NO**'}."
        f" `harness latencies` within 1 GB: {'yes' if small else '**NO**'}."
    )
    lines = [
        f"## {rows:,} rows in {size / 1e6:,.0f} MB of Parquet",
        "",
        verdict,
        "",
        "| engine | s | largest resident memory, MB |",
        "|---|---|---|",
        *(f"| {one.engine} | {one.seconds:.1f} | {one.memory_mb:,.0f}{'' if one.told else ' (did not finish)'} |"
          for one in found),
        "",
    ]  # fmt: skip
    return lines, same and small


def main() -> int:
    """Measure and write the page; 1 when engines disagree or ours takes more than a gigabyte."""
    parser = Flags("scale", __doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000_000])
    parser.add_argument("--memory-mb", type=int, default=512)
    given = parser.parse_args()
    about = (
        f"A made-up open loop (seed {SEED}): requests, failures, mean, p50, p95, p99 and p99.9 of three endpoints, by"
        " one definition of a quantile. Each engine has a process of its own; `harness latencies` also hashes every"
        " file. One run, so the times are rough."
    )
    found = [compare(rows, given.memory_mb) for rows in given.rows]
    lines = [about, "", *(line for told, _ in found for line in told)]
    words = " ".join(map(str, given.rows))
    write_page(
        PAGE, "Evidence: quantiles of many rows", "scale", lines[:-1], f" --rows {words}", of="`make bench-scale`"
    )
    return 0 if all(held for _, held in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
