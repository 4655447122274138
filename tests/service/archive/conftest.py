"""Finished runs, the folder for their bundles, and every row that belongs to them."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from service.archive import Folder
from service.tick import Ticker
from tests.tenants import Tenant

Rows = dict[str, list[str]]
"""Every row of a table as text, by table."""

FinishRuns = Callable[..., Awaitable[list[uuid.UUID]]]

TABLES = ("workspaces", "agents", "runs", "steps", "events", "run_archives")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """An archive folder that does not exist yet."""
    return Folder(tmp_path / "archives")


@pytest.fixture
def finish_runs(tenant: Tenant, ticker: Ticker) -> FinishRuns:
    """Return a function that accepts runs and turns them over until all have ended."""

    async def finish(count: int = 1, children: int = 0) -> list[uuid.UUID]:
        run_ids = await tenant.runs(count, expected_subruns=children)
        for run_id in run_ids:
            for _ in range(children):
                await tenant.spawn(run_id)
        while claims := await ticker.claim():
            await ticker.settle(claims, await ticker.outcomes(claims))
        return run_ids

    return finish


async def every_row(tenant: Tenant) -> Rows:
    """Return every row of every table that archives touch, as PostgreSQL writes it."""
    return {
        table: [row["row"] for row in await tenant.rows(f"SELECT t::text AS row FROM {table} t ORDER BY 1")]  # noqa: S608 - constants
        for table in TABLES
    }
