"""From the recorded rows of searches to what quotas are made from: one `Throughput` for each rate that can be limited.

A search for capacity gives the trials at the highest rate that was sustained, a search for burst limits the highest
burst that met the SLO. Where one endpoint was searched more than once, the least that was shown counts, and a search
that showed nothing is the least of all: measuring again never makes a quota larger. Before: `ratesets`, `brackets`;
next: `quotas`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd

from harness.analysis.brackets import limits_of
from harness.analysis.dataset import Dataset
from harness.analysis.quotas import QuotaRow, Throughput
from harness.analysis.ratesets import Capacity, capacities
from harness.analysis.slo import Status
from harness.analysis.validity import Finding
from harness.sample import Endpoint
from service.quota.limits import RATES, Limit
from service.quota.tables import Tables

ENDPOINT_OF = {
    Limit.RUN_CREATION: Endpoint.CREATE,
    Limit.SUBRUN_SPAWN: Endpoint.SPAWN,
    Limit.SNAPSHOT_POLL: Endpoint.SNAPSHOT,
}
"""Whose requests a rate limits. The turns of workers are no requests, and no search measures them."""


@dataclasses.dataclass(frozen=True)
class QuotaTable:
    """What is proposed; with a refusal, nothing is, whatever the rows say."""

    data: Dataset
    findings: tuple[Finding, ...]  # reasons not to trust the measurement; then there are no rows
    fraction: float
    active: Tables | None  # in force; null when it is not known, then there are no rows
    active_named: str  # the same in words
    rows: tuple[QuotaRow, ...]  # a row for each rate that can be limited
    refusal: str | None  # why nothing is proposed, a sentence; null when something is

    @property
    def measured(self) -> tuple[QuotaRow, ...]:
        """Return the rows that hold a quota of their own."""
        return tuple(row for row in self.rows if row.status is Status.PASS)


def counted(data: Dataset) -> dict[Limit, Capacity]:
    """Return of each limit the search that its quota is made from, where there is one.

    Raises UnreadableFile for a manifest that does not say what was asked.
    """
    found = capacities(data)
    least = {}
    for limit, endpoint in ENDPOINT_OF.items():
        own = [one for one in found if one.requirement.latency.endpoint is endpoint]
        if own:
            least[limit] = min(own, key=lambda one: 0.0 if one.stable is None else one.stable.served_per_s_lower)
    return least


def throughputs(data: Dataset) -> tuple[Throughput, ...]:
    """Return what was shown of each rate that can be limited, in their order; without trials where nothing was."""
    least, bursts = counted(data), _bursts(data)
    return tuple(_throughput(limit, least.get(limit), bursts.get(limit)) for limit in RATES)


def quota_frame(rows: Sequence[QuotaRow], data: Dataset) -> pd.DataFrame:
    """Return a row for each limit that was measured: the columns of `QuotaRow`, measurement and endpoint first."""
    least = counted(data)
    table = [
        {"measurement_id": least[row.limit].measurement_id, "endpoint": ENDPOINT_OF[row.limit].value}
        | {name: getattr(row, name) for name in QuotaRow.__dataclass_fields__}
        | {"limit": row.limit.value, "status": row.status.value}
        for row in rows
        if row.limit in least
    ]
    columns = ["measurement_id", "endpoint", *QuotaRow.__dataclass_fields__]
    words = dict.fromkeys(("measurement_id", "endpoint", "limit", "status", "reason"), "string")
    whole = dict.fromkeys(("trials", "burst"), "Int64")
    rest = dict.fromkeys((name for name in columns if name not in words | whole), "Float64")
    return pd.DataFrame(table, columns=columns).astype(words | whole | rest)


def _throughput(limit: Limit, found: Capacity | None, burst: int | None) -> Throughput:
    """Return what one search shows of one limit."""
    if found is None or found.stable is None:
        nothing = np.empty(0)
        return Throughput(limit, nothing, nothing, 0.0, absent=_absent(limit, found))
    best = found.best
    waited = np.concatenate([window.latency for window in best])
    served = np.array([window.served_per_s * found.span.window_s for window in best])
    mean = float(waited[np.isfinite(waited)].mean())
    return Throughput(limit, served, np.full(len(best), found.span.window_s), mean, found.stable.rate_per_s, burst)


def _absent(limit: Limit, found: Capacity | None) -> str:
    """Say why a limit has no trials."""
    if limit not in ENDPOINT_OF:
        return "No search measures the turns of workers"
    if found is None:
        return "No search for its capacity is among these samples"
    return "No rate was shown to be sustained"


def _bursts(data: Dataset) -> dict[Limit, int | None]:
    """Return the least of the highest bursts that met the SLO, by limit; null where a search showed none."""
    found = limits_of(data)
    least: dict[Limit, int | None] = {}
    for limit, endpoint in ENDPOINT_OF.items():
        own = [one.highest_pass for one in found if one.requirement.endpoint is endpoint]
        least[limit] = None if None in own else min((one for one in own if one is not None), default=None)
    return least
