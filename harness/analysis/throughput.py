"""Ticks per second while a tick is due.

What is measured: the ticks of all runs, over the time in which at least one run was unfinished (the union of their
[created, ended], by the service's own duration where it tells one). While a run is unfinished a tick of it is due,
except while it waits for a child or for a step's own latency; so the time is too long rather than too short and the
rate too low rather than too high. A PASS is therefore safe as it stands. A FAIL is given only when the resources,
sampled once a second, say that a tick was due in most of the seconds meanwhile; otherwise the question stays open.

The unit is the run with its children. At each instant the busy time is shared evenly by the runs unfinished then, so
that the shares add up to the busy time and each unit has ticks and seconds of its own (see `means.ratio_bounds`).
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from harness.analysis.dataset import GROUPED_BY_TRIAL, Dataset
from harness.analysis.dependence import Floats
from harness.analysis.further import further_words
from harness.analysis.means import MIN_UNITS, more_for_ratio, ratio_bounds
from harness.analysis.slo import (
    Slo,
    Status,
    Verdict,
    interval_of,
    number,
    percent,
    plural,
    settle,
    verdict_of,
)
from harness.sample import Mode

DUE_SECONDS_MIN = 3
"""Seconds of resources needed before they say anything about when ticks were due."""

DUE_SHARE_MIN = 0.5
"""Of the busy seconds, the share in which a tick must have been due before a low rate is the workers' fault."""


def judge(slo: Slo, mode: Mode, data: Dataset) -> Verdict:
    """Bound the ticks per busy second, both ways."""
    spans = busy_spans(data.runs)
    grouped = mode in GROUPED_BY_TRIAL
    unit = "bursts" if grouped else "runs"
    if spans.empty:
        reason = f"No run of the {mode.value} samples tells both its ticks and its time."
        return verdict_of(slo, mode, Status.INCONCLUSIVE, reason, of=unit)
    key = "trial" if grouped else "root_key"
    units = spans.groupby(["measurement_id", key], sort=False)[["ticks", "busy_s"]].sum()
    bounds = ratio_bounds(units["ticks"].to_numpy(dtype=np.float64), units["busy_s"].to_numpy(dtype=np.float64))
    busy = f"{number(float(spans['busy_s'].sum()))} s"
    head = f"{int(spans['ticks'].sum()):,} ticks in {busy} while a tick was due (some run was unfinished)"
    if bounds.lower is None or bounds.upper is None:
        more = more_for_ratio(bounds, slo.limit)
        reason = f"{head}, but {plural(bounds.units, unit)} say next to nothing; a bound needs {MIN_UNITS}."
        return verdict_of(
            slo, mode, Status.INCONCLUSIVE, reason + further_words(more, unit, bounds.units, mode, data),
            measured=bounds.estimate, size=bounds.units, of=unit, effective=bounds.effective, more=more,
        )  # fmt: skip
    lower = max(bounds.lower, 0.0)
    status = settle(slo.op, slo.limit, lower, bounds.upper)
    more = more_for_ratio(bounds, slo.limit) if status is Status.INCONCLUSIVE else None
    side = f"above {number(lower)}" if status is Status.PASS else f"between {number(lower)} and {number(bounds.upper)}"
    reason = f"{head}: {number(bounds.estimate)} per second, with 95 % confidence {side}."
    if status is Status.INCONCLUSIVE:
        reason += further_words(more, unit, bounds.units, mode, data)
    if status is Status.FAIL:
        status, why = _blame(data)
        reason += why
    return verdict_of(
        slo, mode, status, reason, measured=bounds.estimate, size=bounds.units, of=unit,
        effective=bounds.effective, more=more,
        interval=interval_of("ticks per busy second", "/s", bounds.estimate, (lower, bounds.upper), slo.limit),
    )  # fmt: skip


def busy_spans(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row per run that tells its ticks and its time: measurement_id, trial, root_key, ticks, busy_s.

    `busy_s` is its share of the seconds in which at least one run of its measurement was unfinished. A run that was
    never seen finished counts until the last poll that saw it unfinished.
    """
    ended = runs["created_at_ns"] + (runs["server_completion_ms"] * 1e6)
    ended = ended.fillna(runs["first_finished_at_ns"]).fillna(runs["last_unfinished_at_ns"])
    known = runs.assign(ended_at_ns=ended).dropna(subset=["created_at_ns", "ended_at_ns", "ticks"])
    known = known[known["ended_at_ns"] > known["created_at_ns"]].sort_values(["measurement_id", "created_at_ns"])
    shares = [
        pd.Series(
            _shared_seconds(
                one["created_at_ns"].to_numpy(dtype=np.float64), one["ended_at_ns"].to_numpy(dtype=np.float64)
            ),
            index=one.index,
        )
        for _, one in known.groupby("measurement_id", sort=True)
    ]
    busy = pd.concat(shares) if shares else pd.Series(dtype=np.float64)
    columns = ["measurement_id", "trial", "root_key", "ticks", "busy_s"]
    return known.assign(busy_s=busy)[columns]


def _shared_seconds(start: Floats, end: Floats) -> Floats:
    """Return each interval's share of the union, in seconds, shape (n_intervals,): evenly among those open together.

    Integrates 1 / (number open) from each start to each end over the sorted edges.
    """
    edges = np.unique(np.concatenate([start, end]))
    opened = np.searchsorted(np.sort(start), edges[:-1], side="right")
    closed = np.searchsorted(np.sort(end), edges[:-1], side="right")
    live = opened - closed
    each = np.divide(np.diff(edges), live, out=np.zeros(len(live)), where=live > 0)
    total = np.concatenate([[0.0], np.cumsum(each)]) / 1e9
    shares: Floats = total[np.searchsorted(edges, end)] - total[np.searchsorted(edges, start)]
    return shares


def _blame(data: Dataset) -> tuple[Status, str]:
    """Say whether a low rate is the workers' (ticks were due meanwhile) or may be the runs' own waiting."""
    resources, runs = data.resources, data.runs
    first, last = (
        runs["created_at_ns"].min(),
        runs["first_finished_at_ns"].fillna(runs["last_unfinished_at_ns"]).max(),
    )
    meanwhile = resources[(resources["at_ns"] >= first) & (resources["at_ns"] <= last)]
    told = meanwhile.dropna(subset=["queue_depth", "oldest_due_tick_s"], how="all")
    due = (told["queue_depth"].fillna(0) > 0) | (told["oldest_due_tick_s"].fillna(0) > 0)
    if len(told) < DUE_SECONDS_MIN:
        return (
            Status.INCONCLUSIVE,
            " Runs may have been waiting meanwhile: no record says whether a tick was due.",
        )
    share = float(due.mean())
    seen = f" A tick was due in {percent(share)} of {plural(len(told), 'seconds')}"
    if share < DUE_SHARE_MIN:
        return Status.INCONCLUSIVE, f"{seen}, so runs were mostly waiting for something else."
    return Status.FAIL, f"{seen}."
