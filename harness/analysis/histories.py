"""One figure of each of many reports, in their order: like with like, and where it changed for good.

A series is a quantile of one endpoint under one load on one machine: reports of another load, other parameters or
another machine are other series and are not mixed in. The reports are frames that `pastreports` read; what a change is,
is `history`'s. Next: `history_shown`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd

from harness.analysis.history import History, change_points

QUANTILES = (0.5, 0.95)
"""Of each endpoint; the p99 of a report is carried by few requests."""

ALIKE = ("mode", "load", "cpu", "cpu_count")
"""Columns of the measurements in which reports of one series agree; `load` is a digest of all parameters."""


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What one report says of itself."""

    name: str  # of its folder
    measurements: pd.DataFrame  # as `tables.measurement_frame` wrote it
    latencies: pd.DataFrame  # as `tables.latency_frame` wrote it


@dataclasses.dataclass(frozen=True)
class Series:
    """One figure over reports."""

    mode: str
    endpoint: str
    q: float
    points: pd.DataFrame  # a row per report, oldest first: report, started_at, commit, latency_ms (inf among failures)
    history: History

    @property
    def name(self) -> str:
        """Return what it is called."""
        return f"{self.endpoint} p{self.q * 100:g}"


def series_of(reports: Sequence[Report], current: Report) -> tuple[Series, ...]:
    """Return the series that end with the report `current`, by load, endpoint and quantile.

    A measurement that was reported more than once counts once, as its newest report has it; only reports up to this
    one's start count.
    """
    found: list[Series] = []
    for mode in current.measurements["mode"].unique():
        alike = _alike(current, mode)
        latest = current.measurements.loc[current.measurements["mode"] == mode, "started_at"].min()
        past = [one for one in reports if _alike(one, mode) == alike and _began(one, mode) <= latest]
        once = {_measured(one, mode): one for one in (*past, current)}
        ordered = sorted(once.values(), key=lambda one: (_began(one, mode), one.name))
        own = current.latencies[current.latencies["mode"] == mode]
        found += [_series(ordered, mode, endpoint, q) for endpoint in own["endpoint"].unique() for q in QUANTILES]
    return tuple(found)


def change_frame(found: Sequence[Series]) -> pd.DataFrame:
    """Return a row per change point: mode, endpoint, q, report, started_at, commit, before_ms, after_ms, change."""
    rows = [
        {
            "mode": one.mode,
            "endpoint": one.endpoint,
            "q": one.q,
            **one.points.iloc[change.index][["report", "started_at", "commit"]].to_dict(),
            "before_ms": change.before,
            "after_ms": change.after,
            "change": change.change,
        }
        for one in found
        for change in one.history.changes
    ]
    columns = ["mode", "endpoint", "q", "report", "started_at", "commit", "before_ms", "after_ms", "change"]
    return pd.DataFrame(rows, columns=columns)


def _alike(report: Report, mode: str) -> frozenset[tuple[str, ...]]:
    """Return what must agree between reports: of every measurement of a load, whatever is in ALIKE."""
    rows = report.measurements[report.measurements["mode"] == mode]
    return frozenset(tuple(str(row[name]) for name in ALIKE) for row in rows.to_dict("records"))


def _began(report: Report, mode: str) -> pd.Timestamp:
    rows = report.measurements[report.measurements["mode"] == mode]
    began: pd.Timestamp = rows["started_at"].min()
    return began


def _measured(report: Report, mode: str) -> frozenset[str]:
    return frozenset(report.measurements.loc[report.measurements["mode"] == mode, "measurement_id"])


def _series(reports: Sequence[Report], mode: str, endpoint: str, q: float) -> Series:
    """Return one figure of these reports; a report without the endpoint is no point."""
    rows = []
    for report in reports:
        latencies = report.latencies
        own = latencies[(latencies["mode"] == mode) & (latencies["endpoint"] == endpoint) & (latencies["q"] == q)]
        if own.empty:
            continue
        value = own["latency_ms"].iloc[0]
        commit = report.measurements.loc[report.measurements["mode"] == mode, "commit"].iloc[0]
        rows.append(
            {
                "report": report.name,
                "started_at": _began(report, mode),
                "commit": None if pd.isna(commit) else str(commit),
                "latency_ms": np.inf if pd.isna(value) else float(value),
            }
        )
    points = pd.DataFrame(rows, columns=["report", "started_at", "commit", "latency_ms"])
    return Series(mode, endpoint, q, points, change_points(points["latency_ms"].to_numpy(dtype=np.float64)))
