"""Sums a sample set up in a few plain numbers, for whoever just made it.

No verdict and no interval: those are the report's. Every request that was sent counts, a timeout with the time after
which the client gave up, so a mean is never better for what went wrong.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow.compute as pc

from harness.sample import Endpoint, Outcome
from harness.sampleset import SampleSet


@dataclasses.dataclass(frozen=True, slots=True)
class EndpointSummary:
    """One endpoint's requests."""

    requests: int  # planned
    failed: int  # any outcome but ok
    latency_ms_mean: float | None  # from the intended instant; null when none was sent
    latency_ms_p95: float | None  # an observed value: the smallest that 95 % of the requests did not exceed


@dataclasses.dataclass(frozen=True, slots=True)
class RunsSummary:
    """What became of the runs; `subruns` counts children likewise."""

    planned: int
    completed: int
    failed: int  # ended otherwise, or never created
    timed_out: int  # not seen final within the poll timeout
    completion_ms_mean: float | None  # of the completed ones, by the service's own clock


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """What `harness run` prints."""

    samples: str  # the set's folder
    complete: bool
    endpoints: dict[str, EndpointSummary]
    runs: RunsSummary
    subruns: RunsSummary

    def lines(self) -> list[str]:
        """Return a short table."""
        shown = [f"{'endpoint':<10}{'requests':>10}{'failed':>8}{'mean ms':>10}{'p95 ms':>10}"]
        for name, row in self.endpoints.items():
            mean, p95 = _number(row.latency_ms_mean), _number(row.latency_ms_p95)
            shown.append(f"{name:<10}{row.requests:>10}{row.failed:>8}{mean:>10}{p95:>10}")
        for name, runs in (("runs", self.runs), ("subruns", self.subruns)):
            shown.append(
                f"{name}: {runs.completed} of {runs.planned} completed, {runs.failed} failed,"
                f" {runs.timed_out} timed out, mean completion {_number(runs.completion_ms_mean)} ms"
            )
        return shown


def summarise(measured: SampleSet) -> Summary:
    """Sum the set up."""
    endpoints = {str(endpoint): _endpoint(measured, endpoint) for endpoint in Endpoint}
    return Summary(
        samples=str(measured.path),
        complete=measured.manifest.complete,
        endpoints={name: row for name, row in endpoints.items() if row.requests},
        runs=_runs(measured, children=False),
        subruns=_runs(measured, children=True),
    )


def _endpoint(measured: SampleSet, endpoint: Endpoint) -> EndpointSummary:
    rows = measured.samples.filter(pc.equal(measured.samples["endpoint"].cast("string"), str(endpoint)))
    failed = pc.sum(pc.not_equal(rows["outcome"].cast("string"), str(Outcome.OK))).as_py() or 0
    latency_ms = rows["latency_ms"].drop_null().to_numpy()
    if not len(latency_ms):
        return EndpointSummary(len(rows), failed, None, None)
    p95 = float(np.quantile(latency_ms, 0.95, method="inverted_cdf"))
    return EndpointSummary(len(rows), failed, float(latency_ms.mean()), p95)


def _runs(measured: SampleSet, *, children: bool) -> RunsSummary:
    is_parent = pc.is_null(measured.runs["parent_run_key"])
    rows = measured.runs.filter(pc.invert(is_parent) if children else is_parent)
    completed = pc.fill_null(pc.equal(rows["final_status"], "COMPLETED"), False)
    done, timed_out = pc.sum(completed).as_py() or 0, pc.sum(rows["poll_timed_out"]).as_py() or 0
    mean = pc.mean(rows.filter(completed)["server_completion_ms"]).as_py()
    return RunsSummary(len(rows), done, len(rows) - done - timed_out, timed_out, mean)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
