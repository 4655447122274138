"""Which workspaces the figures of refusals name."""

from __future__ import annotations

import uuid

from service.quota.limits import Limit
from service.quota.refusals import MOST_NAMED, OTHER, count_refusal
from service.telemetry import QUOTA_REFUSALS


def counted(limit: Limit, workspace: str) -> float:
    """Return the figure of one label pair."""
    return float(QUOTA_REFUSALS.labels(limit, workspace)._value.get())


def test_a_workspace_is_named_with_each_of_its_limits() -> None:
    workspace_id = uuid.uuid4()
    for limit in (Limit.RUN_CREATION, Limit.RUN_CREATION, Limit.LIVE_RUNS):
        count_refusal(limit, workspace_id, {})
    found = [counted(limit, str(workspace_id)) for limit in (Limit.RUN_CREATION, Limit.LIVE_RUNS, Limit.WEBSOCKETS)]
    assert found == [2, 1, 0]


def test_those_who_come_too_late_to_be_named_are_counted_together() -> None:
    before = counted(Limit.RUN_CREATION, OTHER)
    named = {uuid.uuid4(): f"workspace {number}" for number in range(MOST_NAMED)}
    early, late = next(iter(named)), [uuid.uuid4() for _ in range(3)]
    for workspace_id in (early, *late, *late):
        count_refusal(Limit.RUN_CREATION, workspace_id, named)
    assert len(named) == MOST_NAMED
    assert counted(Limit.RUN_CREATION, OTHER) == before + 6
    assert counted(Limit.RUN_CREATION, "workspace 0") == 1
