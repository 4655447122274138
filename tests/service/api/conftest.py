"""A service to call: the real application behind a real socket, on a database and a Redis of the test's own."""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from service.app import create_app
from service.auth import issue_token
from service.db import Database
from service.embedded import Stack
from service.server import configuration
from service.settings import Settings
from service.workspaces import create_agent, create_workspace


class ReadyServer(uvicorn.Server):
    """A server that says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


@dataclass
class Tenant:
    """A workspace with an agent, and a client for each role."""

    workspace_id: uuid.UUID
    agent_id: uuid.UUID
    url: str
    tokens: dict[str, str]
    clients: dict[str, httpx.AsyncClient] = field(default_factory=dict)

    def as_role(self, role: str) -> httpx.AsyncClient:
        """Return a client whose token has that role."""
        if role not in self.clients:
            self.clients[role] = httpx.AsyncClient(
                base_url=self.url, headers={"authorization": f"Bearer {self.tokens[role]}"}, timeout=30
            )
        return self.clients[role]

    @property
    def operator(self) -> httpx.AsyncClient:
        """The client that most tests use."""
        return self.as_role("OPERATOR")

    async def create(self, **more: Any) -> dict[str, Any]:
        """Create a run and return the answer's JSON."""
        body = {"workspace_id": str(self.workspace_id), "agent_id": str(self.agent_id), **more}
        response = await self.operator.post("/api/runs/", json=body)
        assert response.status_code == 200, response.text
        created: dict[str, Any] = response.json()
        return created

    async def snapshot(self, run_id: str, **query: Any) -> dict[str, Any]:
        """Return a run's snapshot."""
        response = await self.operator.get(f"/api/runs/{run_id}/snapshot/", params=query)
        assert response.status_code == 200, response.text
        seen: dict[str, Any] = response.json()
        return seen


@pytest.fixture(scope="session")
def database_url(new_database: Callable[[], str]) -> str:
    """One database for all tests of the HTTP surface: each makes a tenant of its own, and tenants never meet."""
    return new_database()


@pytest.fixture(scope="session")
def redis_url(stack: Stack) -> str:
    """The Redis database of these tests."""
    return f"{stack.redis_url}?db=0"


@pytest.fixture(scope="session")
def archive_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the service looks for bundles."""
    return tmp_path_factory.mktemp("archives")


@pytest.fixture(scope="session")
def url(database_url: str, redis_url: str, archive_dir: Path) -> Iterator[str]:
    """Where the service listens: the real application in a thread and an event loop of its own."""
    app = create_app(Settings(database_url, redis_url, log_level="error", archive_dir=archive_dir))
    server = ReadyServer(configuration(app, port=0, loop="none", log_level="error"))
    thread = threading.Thread(target=server.run, name="service")
    thread.start()
    assert server.ready.wait(30), "the service did not start"
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


@pytest.fixture
async def installation(url: str, database: Database) -> AsyncIterator[httpx.AsyncClient]:
    """A client with an installation token."""
    async with database.begin() as connection:
        issued = await issue_token(connection, None, "OWNER")
    async with httpx.AsyncClient(
        base_url=url, headers={"authorization": f"Bearer {issued.token}"}, timeout=30
    ) as client:
        yield client


@pytest.fixture
async def new_tenant(url: str, database: Database) -> AsyncIterator[Callable[..., Awaitable[Tenant]]]:
    """Return a function that makes a workspace with an agent and a token of each role."""
    made: list[Tenant] = []

    async def make(quota_class: str = "default", script: list[dict[str, Any]] | None = None) -> Tenant:
        async with database.begin() as connection:
            workspace_id = await create_workspace(connection, "tenant", quota_class)
            agent_id = await create_agent(connection, workspace_id, "agent", script)
            tokens = {
                role: (await issue_token(connection, workspace_id, role)).token
                for role in ("VIEWER", "OPERATOR", "ADMIN", "OWNER")
            }
        made.append(Tenant(workspace_id, agent_id, url, tokens))
        return made[-1]

    yield make
    for tenant in made:
        for client in tenant.clients.values():
            await client.aclose()


@pytest.fixture
async def tenant(new_tenant: Callable[..., Awaitable[Tenant]]) -> Tenant:
    """A tenant under the default quota."""
    return await new_tenant()
