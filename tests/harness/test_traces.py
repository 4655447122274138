"""Every number of a report is traced to its bytes and computed again from them by another engine.

The engine here is Arrow on the files themselves: nothing of `harness` reads, joins or averages. Recomputed are all
counts, means, quantiles and rates; the bounds and effective sizes of the statistics have tests and calibrations of
their own.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from harness import pages
from harness.evaluation import load
from harness.traces import Numbers, numbers_of
from tests.harness.synthetic import Plan, change, write_sample_set

STATISTICAL = {"lower_ms", "upper_ms", "lower", "upper", "effective_size", "more_needed"}
"""Columns that are bounds, or what bounds rest on."""

GIVEN = {"target", "margin", "limit"}
"""Columns that come from the file of SLOs."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Numbers]:
    """Return a sample set with failures, and the numbers that a report of it has."""
    root = tmp_path_factory.mktemp("traced")
    fail = [change(index, outcome="timeout", status=None, error="no answer") for index in (3, 40, 41)]
    path = write_sample_set(root, Plan(runs=80), fail)
    (root / "tables").mkdir()
    pages.write_tables(root / "tables", load([path]))
    return path, msgspec.json.decode((root / "tables" / "numbers.json").read_bytes(), type=Numbers)


def test_every_number_names_its_function_its_rows_and_the_sha256_of_files_that_are_there(
    made: tuple[Path, Numbers],
) -> None:
    path, traced = made
    there = {hashlib.sha256(file.read_bytes()).hexdigest() for file in path.glob("*.parquet")}
    assert set(traced.files) == there
    assert len(traced.numbers) > 60
    assert len({one.id for one in traced.numbers}) == len(traced.numbers)
    for one in traced.numbers:
        module, _, name = one.function.rpartition(".")
        assert hasattr(__import__(module, fromlist=[name]), name), one
        assert (set(one.files) <= there, one.rows > 0) == (True, True), one


def test_every_cell_of_every_table_has_its_number(made: tuple[Path, Numbers]) -> None:
    path, traced = made
    cells = 0
    for file in sorted((path.parent / "tables").glob("*.parquet")):
        table = pq.read_table(file)
        numeric = [
            name
            for name, kind in zip(table.column_names, table.schema.types, strict=True)
            if (pa.types.is_integer(kind) or pa.types.is_floating(kind)) and name != "q"
        ]
        keys = {"failures": {"status"}}.get(file.stem, set())
        cells += sum(table.num_rows - table[name].null_count for name in numeric if name not in keys)
    assert len(traced.numbers) == cells


def test_every_count_mean_quantile_and_rate_is_the_same_by_another_engine(made: tuple[Path, Numbers]) -> None:
    path, traced = made
    again = Again(path)
    wrong, done = [], 0
    for one in traced.numbers:
        table, *key, column = one.id.split("/")
        if column in STATISTICAL | GIVEN:
            continue
        expected = getattr(again, table)(key, column)
        done += 1
        if not math.isclose(one.value, float(f"{expected:.6g}"), rel_tol=1e-9):
            wrong.append((one.id, one.value, expected))
    assert (wrong, done > 40) == ([], True)


def test_invalid_measurements_have_only_the_numbers_of_what_was_measured(tmp_path: Path) -> None:
    path = write_sample_set(tmp_path, Plan(), [lambda rows: rows.samples.__delitem__(-1)])
    (tmp_path / "tables").mkdir()
    evaluation = load([path])
    pages.write_tables(tmp_path / "tables", evaluation)
    found = json.loads((tmp_path / "tables" / "numbers.json").read_bytes())["numbers"]
    assert {one["id"].split("/")[0] for one in found} == {"measurements"}
    assert numbers_of(evaluation, {}).numbers == ()


class Again:
    """The same numbers, from the files alone."""

    def __init__(self, path: Path) -> None:
        self.samples = pq.read_table(path / "samples-00001.parquet")
        self.run_rows = pq.read_table(path / "runs.parquet")
        self.manifest = json.loads((path / "manifest.json").read_bytes())

    def of(self, endpoint: str) -> Any:
        return self.samples.filter(pc.equal(self.samples["endpoint"].cast("string"), endpoint))

    @staticmethod
    def waited(rows: Any) -> list[float]:
        pairs = zip(rows["latency_ms"].to_pylist(), rows["outcome"].cast("string").to_pylist(), strict=True)
        return sorted(ms if outcome == "ok" else math.inf for ms, outcome in pairs)

    def latencies(self, key: list[str], column: str) -> float:
        waited = self.waited(self.of(key[1]))
        answered = [ms for ms in waited if ms < math.inf]
        found: dict[str, float] = {
            "requests": len(waited),
            "failed": len(waited) - len(answered),
            "mean_ms": math.fsum(answered) / len(answered),
            "latency_ms": waited[math.ceil(round(float(key[2]) * len(waited), 9)) - 1],
        }
        return float(found[column])

    def runs(self, key: list[str], column: str) -> float:
        parent = pc.is_null(self.run_rows["parent_run_key"])
        rows = self.run_rows.filter(parent if key[1] == "parents" else pc.invert(parent))
        ended = [one for one in rows["final_status"].to_pylist() if one is not None]
        seen = zip(rows["first_finished_at_ns"].to_pylist(), self.due(rows), strict=True)
        found: dict[str, Any] = {
            "count": lambda: rows.num_rows,
            "completed": lambda: ended.count("COMPLETED"),
            "ended_otherwise": lambda: len(ended) - ended.count("COMPLETED"),
            "never_seen_finished": lambda: rows.num_rows - len(ended),
            "completion_ms_median": lambda: self.middle([(end - due) / 1e6 for end, due in seen]),
            "server_completion_ms_median": lambda: self.middle(rows["server_completion_ms"].to_pylist()),
            "ticks_per_run": lambda: pc.mean(rows["ticks"]).as_py(),
            "events_per_run": lambda: pc.mean(rows["events"]).as_py(),
        }
        return float(found[column]())

    def due(self, rows: pa.Table) -> list[int]:
        return [int(at) for at in rows["created_at_ns"].to_pylist()]

    @staticmethod
    def middle(values: list[float]) -> float:
        return sorted(values)[math.ceil(len(values) / 2) - 1]

    def failures(self, key: list[str], column: str) -> float:
        assert column == "requests"
        rows = self.of(key[0])
        return float(rows["outcome"].cast("string").to_pylist().count(key[1]))

    def measurements(self, key: list[str], column: str) -> float:
        clock = self.manifest["clock"]
        found: dict[str, float] = {
            "requests": self.samples.num_rows,
            "runs": self.run_rows.num_rows,
            "duration_s": (clock["end"]["monotonic_ns"] - clock["start"]["monotonic_ns"]) / 1e9,
            "attempt": self.manifest["attempt"],
            "quota_revision": self.manifest["quota_revision"],
            "cpu_count": self.manifest["machine"]["cpu_count"],
        }
        return float(found[column])

    def verdicts(self, key: list[str], column: str) -> float:
        name = key[0]
        if not key[1]:  # not applicable
            return {"sample_size": 0.0}[column]
        rows = self.samples if name == "no-failed-responses" else self.of(name.split("-")[0])
        waited = self.waited(rows)
        failed = sum(ms == math.inf for ms in waited)
        parents = self.run_rows.filter(pc.is_null(self.run_rows["parent_run_key"])).num_rows
        if name == "no-failed-responses":
            return float({"measured": failed, "estimate": failed, "sample_size": len(waited)}[column])
        if name == "snapshot-p95":
            p95 = waited[math.ceil(round(0.95 * len(waited), 9)) - 1]
            slow = sum(ms >= 375.0 for ms in waited) / len(waited)
            return float({"measured": p95, "estimate": slow, "sample_size": len(waited)}[column])
        if name == "tick-throughput":
            rate = self.ticks() / self.busy_s()
            return float({"measured": rate, "estimate": rate, "sample_size": parents}[column])
        mean = math.fsum(waited) / len(waited)
        return float({"measured": mean, "estimate": mean, "sample_size": parents}[column])

    def ticks(self) -> int:
        return int(pc.sum(self.run_rows["ticks"]).as_py())

    def busy_s(self) -> float:
        starts = self.run_rows["created_at_ns"].to_pylist()
        lengths = self.run_rows["server_completion_ms"].to_pylist()
        total, until = 0.0, -math.inf
        for start, end in sorted((at, at + ms * 1e6) for at, ms in zip(starts, lengths, strict=True)):
            total += max(0.0, end - max(start, until))
            until = max(until, end)
        return total / 1e9
