"""Where each number of a report comes from: its id, the function that made it, the files it was made from, their rows.

Written beside the tables as `numbers.json`, so that whoever doubts a number can find the bytes (by sha256), count the
rows and compute it again by other means; a test does so for every count, mean and quantile. An id is the path of a
cell: table, the row's key, column, as in `latencies/smoke/create/0.95/latency_ms`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
import pandas as pd

from harness.analysis.dataset import Dataset
from harness.evaluation import Evaluation

KEYS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "measurements": ("harness.analysis.tables.measurement_frame", ("measurement_id",), ""),
    "verdicts": ("harness.analysis.judges.judge_all", ("name", "mode"), ""),
    "latencies": ("harness.analysis.tables.latency_frame", ("mode", "endpoint", "q"), "requests"),
    "runs": ("harness.analysis.tables.run_frame", ("measurement_id", "runs"), "count"),
    "failures": ("harness.analysis.tables.failure_frame", ("endpoint", "outcome", "status", "error"), "requests"),
    "quotas": ("harness.analysis.quotas.quota_rows", ("limit",), ""),
    "comparisons": ("harness.analysis.gate.comparison_frame", ("mode", "endpoint", "statistic"), ""),
}
"""Of each table: the function that makes it, the columns that name a row, and the one that counts its source rows."""

GATE = "harness.analysis.gate.judge_regression"
"""Makes those verdicts whose names begin with `regression-`."""


class Number(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One number of a report."""

    id: str  # table/key/column
    value: float  # as the table has it
    function: str  # dotted name of what made it
    rows: int  # of the source files that entered it
    files: tuple[str, ...]  # sha256 of each source file, as the manifests vouch for them


class Numbers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The numbers of a report."""

    schema_version: Literal[1]
    files: dict[str, str]  # sha256: measurement and file name
    numbers: tuple[Number, ...]  # ordered by table, row and column


def numbers_of(evaluation: Evaluation, frames: Mapping[str, pd.DataFrame]) -> Numbers:
    """Return every number of these tables with where it comes from."""
    sides = [evaluation.data] if evaluation.baseline is None else [evaluation.data, evaluation.baseline]
    files = {
        digest: f"{manifest.measurement_id}/{name}"
        for side in sides
        for manifest in side.manifests
        for name, digest in sorted(manifest.files.items())
    }
    found: list[Number] = []
    for table, frame in frames.items():
        function, keys, counted = KEYS[table]
        columns = [
            name for name in frame.columns
            if name not in keys and pd.api.types.is_numeric_dtype(frame[name]) and frame[name].dtype != bool
        ]  # fmt: skip
        for row in frame.to_dict("records"):
            key = "/".join("" if pd.isna(row[name]) else str(row[name]).replace("/", "%2F") for name in keys)
            gated = table == "comparisons" or str(row.get("name", "")).startswith("regression-")
            of = sides if gated else sides[:1]
            rows = int(row[counted]) if counted else sum(_rows(side, row) for side in of)
            made = GATE if gated and table == "verdicts" else function
            sources = tuple(digest for side in of for digest in _files(side, row))
            found += [
                Number(f"{table}/{key}/{name}", float(row[name]), made, rows, sources)
                for name in columns
                if not pd.isna(row[name])
            ]
    return Numbers(1, files, tuple(found))


def _files(data: Dataset, row: Mapping[Any, Any]) -> list[str]:
    """Return the sha256 of the files of the measurements that a table's row is about."""
    about = [one for one in data.manifests if _is_about(one.measurement_id, one.mode, row)]
    return [digest for one in about for _, digest in sorted(one.files.items())]


def _rows(data: Dataset, row: Mapping[Any, Any]) -> int:
    """Return how many samples and runs are of the measurements, and of the endpoint, that a table's row is about."""
    names = [one.measurement_id for one in data.manifests if _is_about(one.measurement_id, one.mode, row)]
    samples = data.samples[data.samples["measurement_id"].isin(names)]
    if "endpoint" in row:
        return int((samples["endpoint"] == row["endpoint"]).sum())
    return len(samples) + int(data.runs["measurement_id"].isin(names).sum())


def _is_about(measurement_id: str, mode: str, row: Mapping[Any, Any]) -> bool:
    """Say whether a row is about a measurement: its own, one of its mode, or any where it names neither."""
    if not pd.isna(row.get("measurement_id")):
        return bool(row["measurement_id"] == measurement_id)
    return pd.isna(row.get("mode")) or bool(row["mode"] == mode)
