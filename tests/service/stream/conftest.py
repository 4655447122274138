"""Real sockets on a real server, with a database and a Redis for all tests of the streams."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass

import httpx
import pytest

from service.app import create_app
from service.auth import issue_token
from service.db import Database
from service.embedded import Stack
from service.settings import Settings
from service.stream.timing import Timing
from service.workspaces import create_agent, create_workspace
from tests.sockets import Writer, open_writer, serve

TIMING = Timing(
    look_every_s=0.2, send_patience_s=0.5, lag_patience_s=1.0, recheck_s=0.2, lease_s=2.0, renew_every_s=0.5
)


@pytest.fixture(scope="session")
def database_url(new_database: Callable[[], str]) -> str:
    """One database for all tests of the streams: each makes a tenant of its own, and tenants never meet."""
    return new_database()


@pytest.fixture(scope="session")
def redis_url(stack: Stack) -> str:
    """The Redis database of these tests."""
    return f"{stack.redis_url}?db=0"


@pytest.fixture(scope="session")
def url(database_url: str, redis_url: str) -> Iterator[str]:
    """Where the service listens: the real application, with short intervals."""
    settings = Settings(
        database_url, redis_url, log_level="error", allowed_origins=frozenset({"https://app.example.com"})
    )
    with serve(create_app(settings, TIMING)) as address:
        yield address


@dataclass
class Tenant:
    """A workspace with an agent, a token of each role, and an HTTP client."""

    workspace_id: uuid.UUID
    agent_id: uuid.UUID
    tokens: dict[str, str]
    http: httpx.AsyncClient

    @property
    def token(self) -> str:
        """The token that most tests use."""
        return self.tokens["OPERATOR"]

    async def create(self) -> str:
        """Create a run and return its id."""
        body = {"workspace_id": str(self.workspace_id), "agent_id": str(self.agent_id)}
        response = await self.http.post("/api/runs/", json=body)
        assert response.status_code == 200, response.text
        return str(response.json()["run_id"])

    async def ticket(self, role: str = "VIEWER") -> str:
        """Return a new ticket."""
        header = {"authorization": f"Bearer {self.tokens[role]}"}
        response = await self.http.post("/api/ws-tickets/", headers=header)
        assert response.status_code == 200, response.text
        return str(response.json()["ticket"])


NewTenant = Callable[..., Awaitable[Tenant]]


@pytest.fixture
async def new_tenant(url: str, database: Database) -> AsyncIterator[NewTenant]:
    """Return a function that makes a workspace with an agent and a token of each role."""
    clients: list[httpx.AsyncClient] = []

    async def make(quota_class: str = "default") -> Tenant:
        async with database.begin() as connection:
            workspace_id = await create_workspace(connection, "tenant", quota_class)
            agent_id = await create_agent(connection, workspace_id, "agent")
            tokens = {
                role: (await issue_token(connection, workspace_id, role)).token
                for role in ("VIEWER", "OPERATOR", "ADMIN", "OWNER")
            }
        header = {"authorization": f"Bearer {tokens['OPERATOR']}"}
        clients.append(httpx.AsyncClient(base_url=url, headers=header, timeout=30))
        return Tenant(workspace_id, agent_id, tokens, clients[-1])

    yield make
    for client in clients:
        await client.aclose()


@pytest.fixture
async def tenant(new_tenant: NewTenant) -> Tenant:
    """A tenant without limits."""
    return await new_tenant("calibration")


@pytest.fixture
async def writer(database: Database, redis_url: str) -> AsyncIterator[Writer]:
    """A writer of events."""
    async with open_writer(database, redis_url) as opened:
        yield opened
