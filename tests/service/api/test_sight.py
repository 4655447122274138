"""What is remembered of runs may be forgotten at any moment; a run that exists is found all the same."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pytest

from service.api.sight import Sight
from service.auth import Caller, Role
from service.db import Database


async def test_a_batch_that_overflows_the_memory_is_found_whole(
    tenant: Any, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sight, "MOST", 2)
    run_ids = [uuid.UUID((await tenant.create())["run_id"]) for _ in range(5)]
    caller = Caller(uuid.uuid4(), tenant.workspace_id, Role.VIEWER, None)
    sight = Sight(database)
    found = await asyncio.gather(*(sight.find(caller, run_id) for run_id in run_ids))
    assert {facts.workspace_id for facts in found} == {tenant.workspace_id}
