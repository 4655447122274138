"""`python -m harness latencies`: its flags, and its table for a person."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from harness.analysis.slo import number

if TYPE_CHECKING:
    from harness.largesets import Latencies


HELP = "exact quantiles of sample sets of any size, also in remote storage"
DESCRIPTION = (
    "Print requests, failures, mean and exact quantiles per load and endpoint of all sample sets given, with bounded"
    " memory however many rows they hold. Nothing is judged: that is `report`."
)


def add_flags(command: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add = command.add_argument
    add("places", nargs="+", metavar="PLACE",
        help="a sample set, or a folder of some: a path, or an address that fsspec reads (s3://bucket/samples, with its"
        " package installed)")  # fmt: skip
    add("--memory-mb", type=int, default=512, metavar="MB", help="that the engine may use (default: 512)")
    add("--json", action="store_true", help="print one JSON object (latencies in ms) instead of the table")


def latency_lines(places: Sequence[str], memory_mb: int, *, as_json: bool) -> list[str]:
    """Return what the command prints. Raises HarnessError."""
    from harness.largesets import read_latencies  # slow to import

    found = read_latencies(places, memory_mb)
    if as_json:
        return [msgspec.json.encode({"latencies": [dataclasses.asdict(one) for one in found]}).decode()]
    return _table(found)


def _table(found: Sequence[Latencies]) -> list[str]:
    """Return the latencies in columns."""
    names = list(found[0].quantiles_ms) if found else []
    rows = [["load", "endpoint", "requests", "failed", "mean ms", *(f"{name} ms" for name in names)]]
    rows += [
        [one.mode, one.endpoint, f"{one.requests:,}", f"{one.failed:,}", _told(one.mean_ms, "-")]
        + [_told(value, "failed") for value in one.quantiles_ms.values()]
        for one in found
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _told(value: float | None, without: str) -> str:
    return without if value is None else number(value)
