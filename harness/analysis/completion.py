"""How long runs take from creation to their end, as polling could see it.

Polling knows an end only as an interval: after the last poll that saw the run unfinished, by the first that saw it
final. So the slowest run of a sample is an interval too, and the verdict compares the whole of it with the target.
Every parent run counts: one that failed, or was never seen finished, has no completion time, and is never dropped.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from harness.analysis.dataset import Dataset
from harness.analysis.slo import Slo, Status, Verdict, interval_of, number, plural, settle, verdict_of
from harness.sample import Mode

COMPLETED = "COMPLETED"


def judge(slo: Slo, mode: Mode, data: Dataset) -> Verdict:
    """Compare the slowest parent run with the target: a census of this sample, no inference."""
    bounds = completion_bounds(data.runs)
    if bounds.empty:
        return verdict_of(slo, mode, Status.INCONCLUSIVE, f"The {mode.value} samples hold no run.", of="runs")
    lower, upper = float(bounds["lower_s"].max()), float(bounds["upper_s"].max())
    status = settle(slo.op, slo.limit, lower, upper)
    failed = int((bounds["lower_s"] == math.inf).sum())
    open_ended = int((bounds["upper_s"] == math.inf).sum()) - failed
    reason = f"The slowest of {plural(len(bounds), 'runs')} took {_between(lower, upper)}."
    if failed:
        reason = f"{failed} of {plural(len(bounds), 'runs')} did not complete at all."
    elif open_ended:
        were = "was" if open_ended == 1 else "were"
        reason = f"{open_ended} of {plural(len(bounds), 'runs')} {were} not seen finished while polled."
    interval = None
    if math.isfinite(lower):
        interval = interval_of("slowest run", "s", lower if math.isinf(upper) else upper, (lower, upper), slo.limit)
    return verdict_of(slo, mode, status, reason, measured=upper, size=len(bounds), of="runs", interval=interval)


def completion_bounds(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row per parent run: run_key, lower_s, upper_s; infinity where it never completed or was not seen to."""
    parents = runs[runs["parent_run_key"].isna()]
    created = parents["created_at_ns"].to_numpy(dtype=np.float64, na_value=np.nan)
    unfinished = parents["last_unfinished_at_ns"].to_numpy(dtype=np.float64, na_value=np.nan)
    finished = parents["first_finished_at_ns"].to_numpy(dtype=np.float64, na_value=np.nan)
    lower = np.nan_to_num((unfinished - created) / 1e9, nan=0.0).clip(min=0.0)
    upper = np.nan_to_num((finished - created) / 1e9, nan=math.inf)
    status = parents["final_status"]
    ended_otherwise = (status.notna() & (status != COMPLETED)).to_numpy(dtype=bool)
    never = ended_otherwise | np.isnan(created)
    return pd.DataFrame(
        {
            "run_key": parents["run_key"].to_numpy(),
            "lower_s": np.where(never, math.inf, lower),
            "upper_s": np.where(never, math.inf, upper),
        }
    )


def _between(lower: float, upper: float) -> str:
    """Return the interval in words."""
    if math.isinf(upper):
        return f"at least {number(lower)} s"
    return f"at most {number(upper)} s" if lower <= 0.0 else f"between {number(lower)} and {number(upper)} s"
