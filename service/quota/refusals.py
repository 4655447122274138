"""Counts refusals by limit and workspace, in figures that cannot grow without end.

Each label pair is a time series that lives as long as its process and its Prometheus. So a process names the first
`MOST_NAMED` workspaces that it refuses something, and books all later ones as `other`: the sums stay right, and on an
installation with more tenants in trouble than that, `quotas explain` says what each of them uses. Naming the busiest
instead would mean to take names away again, which counters shared by several processes cannot do.
"""

from __future__ import annotations

import uuid

from service.telemetry import QUOTA_REFUSALS

MOST_NAMED = 500
"""Workspaces that a process names: with ten limits each, 5,000 series at the very most."""

OTHER = "other"

_named: dict[uuid.UUID, str] = {}


def count_refusal(limit: str, workspace_id: uuid.UUID, named: dict[uuid.UUID, str] = _named) -> None:
    """Count one refused request; `named` is what the process has named so far."""
    QUOTA_REFUSALS.labels(limit, name_of(workspace_id, named)).inc()


def name_of(workspace_id: uuid.UUID, named: dict[uuid.UUID, str]) -> str:
    """Return the label under which a workspace is counted by a process that has named these so far."""
    name = named.get(workspace_id)
    if name is None:
        name = OTHER
        if len(named) < MOST_NAMED:
            name = named[workspace_id] = str(workspace_id)
    return name
