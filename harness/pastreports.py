"""Reads earlier reports of this checkout, for the history of a figure over many of them.

Only their tables are read, never their samples. A report that is not finished, invalid, or was written by an older
version, which did not tell its load, is no point of a history; a file that cannot be read is told on stderr and left
out, since a broken old report is no reason to refuse a new one. Next: `analysis/histories`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa

from harness.analysis.histories import Report

REPORTS_MAX = 300
"""Newest reports that are read: a year of working days."""

FRAMES = ("measurements", "latencies")


def past_reports(root: Path, besides: Path) -> tuple[Report, ...]:
    """Return the reports in the folder `root`, oldest first, without the one at `besides`."""
    folders = sorted(path.parent for path in root.glob("*/verdict.json"))
    found = [read_report(folder) for folder in folders[-REPORTS_MAX:] if folder.resolve() != besides.resolve()]
    return tuple(one for one in found if one is not None)


def read_report(folder: Path) -> Report | None:
    """Return what a report says of itself; null when it has no figures, or none that can be read."""
    files = [folder / "tables" / f"{name}.parquet" for name in FRAMES]
    if not all(file.exists() for file in files):
        return None
    try:
        measurements, latencies = (pd.read_parquet(file) for file in files)
    except (OSError, pa.ArrowException) as fault:
        sys.stderr.write(f"history: {folder.name} cannot be read ({type(fault).__name__}) and is left out\n")
        return None
    return Report(folder.name, measurements, latencies) if "load" in measurements else None
