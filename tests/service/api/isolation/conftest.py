"""Two tenants beside each other on a service of their own, and what is spent of whose quota."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.app import create_app
from service.db import Database
from service.embedded import Stack
from service.quota.limits import Quota
from service.quota.rates import Rates
from service.quota.socket_leases import Full, Lease, Leases
from service.settings import Settings
from tests.neighbours import Neighbourhood, open_neighbourhood
from tests.sockets import serve


@pytest.fixture(scope="module")
def database_url(new_database: Any) -> str:
    return str(new_database())


@pytest.fixture(scope="module")
def redis_url(stack: Stack) -> str:
    return f"{stack.redis_url}?db=14"


@pytest.fixture(scope="module")
def archive_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("archives")


@pytest.fixture(scope="module")
def url(database_url: str, redis_url: str, archive_dir: Path) -> Iterator[str]:
    with serve(create_app(Settings(database_url, redis_url, log_level="error", archive_dir=archive_dir))) as address:
        yield address


@pytest.fixture
async def neighbourhood(database: Database, redis_url: str, archive_dir: Path) -> AsyncIterator[Neighbourhood]:
    async with open_neighbourhood(database, redis_url, archive_dir) as opened:
        yield opened


@pytest.fixture
def spent(monkeypatch: pytest.MonkeyPatch) -> list[uuid.UUID]:
    """Each workspace of which a token of a rate or a place of a cap on sockets is asked for, in order."""
    workspaces: list[uuid.UUID] = []
    take_token, take_place = Rates.take, Leases.take

    async def token(rates: Rates, workspace_id: uuid.UUID, *more: Any) -> dict[str, str]:
        workspaces.append(workspace_id)
        return await take_token(rates, workspace_id, *more)

    async def place(leases: Leases, lease: Lease, quota: Quota) -> Full | None:
        workspaces.append(lease.workspace_id)
        return await take_place(leases, lease, quota)

    monkeypatch.setattr(Rates, "take", token)
    monkeypatch.setattr(Leases, "take", place)
    return workspaces


@pytest.fixture
async def client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=30) as opened:
        yield opened
