"""The tables of a report, as data frames: what is written beside it and what its pages show.

Each frame says in its columns what unit it is in; `display` makes them readable. Empty when there is nothing to say.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import numpy as np
import pandas as pd

from harness.analysis.completion import completion_bounds
from harness.analysis.dataset import Dataset, asked_alike, groups_of, moment_ns, waited_ms
from harness.analysis.quantiles import estimate_quantile, quantile
from harness.analysis.slo import Verdict, rounded
from harness.sample import Endpoint, Mode, Outcome
from harness.sampleset import Manifest

SHOWN_QUANTILES = (0.5, 0.95, 0.99)


def verdict_frame(verdicts: Iterable[Verdict]) -> pd.DataFrame:
    """Return a row per verdict, all of its numbers included."""
    rows = [
        {
            "name": verdict.name,
            "title": verdict.title,
            "mode": verdict.mode.value if verdict.mode else None,
            "verdict": verdict.verdict.value,
            "requirement": verdict.requirement,
            "target": verdict.target,
            "margin": verdict.margin,
            "unit": verdict.unit,
            "measured": verdict.measured,
            "bounded": verdict.interval.of if verdict.interval else None,
            "bound_unit": verdict.interval.unit if verdict.interval else None,
            "estimate": verdict.interval.estimate if verdict.interval else None,
            "lower": verdict.interval.lower if verdict.interval else None,
            "upper": verdict.interval.upper if verdict.interval else None,
            "limit": verdict.interval.limit if verdict.interval else None,
            "sample_size": verdict.sample_size,
            "sample_unit": verdict.sample_unit,
            "effective_size": verdict.effective_size,
            "more_needed": verdict.more_needed,
            "reason": verdict.reason,
        }
        for verdict in verdicts
    ]
    numbers = ("target", "margin", "measured", "estimate", "lower", "upper", "limit", "effective_size")
    types = dict.fromkeys(numbers, "Float64") | {"sample_size": "Int64", "more_needed": "Int64"}
    words = [
        "name",
        "title",
        "mode",
        "verdict",
        "requirement",
        "unit",
        "bounded",
        "bound_unit",
        "sample_unit",
        "reason",
    ]
    columns = list(rows[0]) if rows else [*types, *words]
    return pd.DataFrame(rows, columns=columns).astype(types | dict.fromkeys(words, "string"))


def latency_frame(data: Dataset) -> pd.DataFrame:
    """Return a row per mode, endpoint and quantile: what callers waited in ms, failures counted as infinitely slow.

    Columns: mode, endpoint, requests, failed, mean_ms (of those that succeeded), q, latency_ms, lower_ms, upper_ms,
    effective_size, refusal (why there is no interval).
    """
    rows: list[dict[str, object]] = []
    measured = {manifest.mode for manifest in data.manifests}
    for mode in [mode for mode in Mode if mode.value in measured]:
        part = data.of_modes([mode])
        for endpoint in Endpoint:
            samples = part.of_endpoint(endpoint)
            if samples.empty:
                continue
            waited = waited_ms(samples)
            answered = waited[np.isfinite(waited)]
            for q in SHOWN_QUANTILES:
                found = estimate_quantile(waited, q, groups_of(samples))
                rows.append(
                    {
                        "mode": mode.value,
                        "endpoint": endpoint.value,
                        "requests": len(samples),
                        "failed": len(samples) - len(answered),
                        "mean_ms": rounded(float(answered.mean())) if len(answered) else None,
                        "q": q,
                        "latency_ms": None if found.value_ms is None else rounded(found.value_ms),
                        "lower_ms": None if found.lower_ms is None else rounded(found.lower_ms),
                        "upper_ms": None if found.upper_ms is None else rounded(found.upper_ms),
                        "effective_size": rounded(found.effective),
                        "refusal": found.refusal,
                    }
                )
    types = dict.fromkeys(("mean_ms", "q", "latency_ms", "lower_ms", "upper_ms", "effective_size"), "Float64")
    types |= {"requests": "Int64", "failed": "Int64", "mode": "string", "endpoint": "string", "refusal": "string"}
    columns = list(rows[0]) if rows else list(types)
    return pd.DataFrame(rows, columns=columns).astype(types)


def run_frame(data: Dataset) -> pd.DataFrame:
    """Return a row per measurement and kind of run (parents, children): how many, how they ended, what they did.

    `completion_ms_median` is over parents, of the first moment at which polling saw the end;
    `server_completion_ms_median` is by the service's own clock.
    """
    rows: list[dict[str, object]] = []
    for name, one in data.runs.groupby("measurement_id", sort=True):
        is_parent = one["parent_run_key"].isna()
        for kind, runs in (("parents", one[is_parent]), ("children", one[~is_parent])):
            if runs.empty:
                continue
            seen = completion_bounds(runs)["upper_s"].to_numpy(dtype=np.float64) if kind == "parents" else np.array([])
            ended = runs["final_status"].dropna()
            own = runs["server_completion_ms"].dropna().to_numpy(dtype=np.float64)
            middle = quantile(seen, 0.5) if len(seen) else np.inf
            rows.append(
                {
                    "measurement_id": name,
                    "runs": kind,
                    "count": len(runs),
                    "completed": int((ended == "COMPLETED").sum()),
                    "ended_otherwise": int((ended != "COMPLETED").sum()),
                    "never_seen_finished": len(runs) - len(ended),
                    "completion_ms_median": rounded(middle * 1e3) if np.isfinite(middle) else None,
                    "server_completion_ms_median": rounded(quantile(own, 0.5)) if len(own) else None,
                    "ticks_per_run": _mean(runs["ticks"]),
                    "events_per_run": _mean(runs["events"]),
                }
            )
    numbers = ("completion_ms_median", "server_completion_ms_median", "ticks_per_run", "events_per_run")
    types = dict.fromkeys(numbers, "Float64")
    types |= dict.fromkeys(("count", "completed", "ended_otherwise", "never_seen_finished"), "Int64")
    types |= {"measurement_id": "string", "runs": "string"}
    columns = list(rows[0]) if rows else list(types)
    return pd.DataFrame(rows, columns=columns).astype(types)


def slowest_frame(data: Dataset, count: int) -> pd.DataFrame:
    """Return the `count` requests that waited longest, failures first: where each was, and where its time went.

    `at_s` counts from the first request of its measurement.
    """
    waited = waited_ms(data.samples)
    order = np.lexsort((np.arange(len(waited)), -waited))[: max(count, 0)]
    columns = ["endpoint", "run_key", "outcome", "status", "latency_ms", "service_ms"]
    columns += ["server_db_ms", "server_quota_ms", "server_publish_ms", "server_app_ms", "error"]
    rows = data.samples.iloc[order]
    at_s = (moment_ns(rows) - rows["measurement_id"].map(first_request_ns(data)).astype("Int64")) / 1e9
    return rows[columns].assign(at_s=at_s).reset_index(drop=True)


def failure_frame(data: Dataset) -> pd.DataFrame:
    """Return a row per endpoint, outcome, status and error of the requests that failed, commonest first."""
    failed = data.samples[data.samples["outcome"] != Outcome.OK.value]
    kinds = ["endpoint", "outcome", "status", "error"]
    counts = failed.groupby(kinds, dropna=False, sort=True).size().reset_index(name="requests")
    return counts.sort_values("requests", ascending=False, kind="stable").reset_index(drop=True)


def measurement_frame(data: Dataset) -> pd.DataFrame:
    """Return a row per sample set: what was measured, for how long, on what."""
    rows = [
        {
            "measurement_id": manifest.measurement_id,
            "mode": manifest.mode,
            "load": _load_digest(manifest),
            "started_at": pd.Timestamp(manifest.clock.start.wall_ns, unit="ns", tz="UTC").floor("s"),
            "requests": int((data.samples["measurement_id"] == manifest.measurement_id).sum()),
            "runs": int((data.runs["measurement_id"] == manifest.measurement_id).sum()),
            "duration_s": rounded((manifest.clock.end.monotonic_ns - manifest.clock.start.monotonic_ns) / 1e9),
            "attempt": manifest.attempt,
            "complete": manifest.complete,
            "commit": manifest.commit,
            "quota_revision": manifest.quota_revision,
            "tool": manifest.source.tool,
            "cpu": str(manifest.machine.get("cpu", "unknown")),
            "cpu_count": manifest.machine.get("cpu_count"),
        }
        for manifest in data.manifests
    ]
    types = {"quota_revision": "Int64", "cpu_count": "Int64", "commit": "string"}
    return pd.DataFrame(rows).astype(types)


def _load_digest(manifest: Manifest) -> str:
    """Return a name for what was asked for: the same for measurements that may be compared."""
    return hashlib.sha256(json.dumps(asked_alike(manifest), sort_keys=True).encode()).hexdigest()[:12]


def first_request_ns(data: Dataset) -> dict[str, int]:
    """Return when the first request of each measurement was due: where its time begins for a reader.

    Preparing a measurement takes seconds that belong to no request, so the manifest's own start would not do.
    """
    first = moment_ns(data.samples).groupby(data.samples["measurement_id"]).min().dropna().to_dict()
    return {
        one.measurement_id: int(first.get(one.measurement_id, one.clock.start.monotonic_ns)) for one in data.manifests
    }


def _mean(values: pd.Series) -> float | None:
    """Return the mean of what is known, or null."""
    known = values.dropna().to_numpy(dtype=np.float64)
    return rounded(float(known.mean())) if len(known) else None
