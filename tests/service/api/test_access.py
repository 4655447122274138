"""Tokens, roles and installation rights over HTTP."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Any

import httpx
from sqlalchemy import text
from starlette.routing import Route

from service.app import create_app
from service.auth import Callers, Role, hash_token, issue_token, revoke_token
from service.db import Database
from service.errors import Unauthenticated
from service.exchange import Operation
from service.quota.inforce import Quotas
from service.quota.limits import DEFAULT, LIFTED
from service.settings import Settings


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.at_s = 0.0

    def monotonic(self) -> float:
        return self.at_s

    def now(self) -> dt.datetime:
        return dt.datetime.now(dt.UTC) + dt.timedelta(seconds=self.at_s)


async def refused(callers: Callers, header: bytes) -> bool:
    """Tell whether a header is refused, as the endpoint layer asks."""
    if callers.remembered(header) is not None:
        return False
    try:
        await callers.identify(header)
    except Unauthenticated:
        return True
    return False


async def test_an_installation_token_sets_up_a_tenant_that_can_run(installation: httpx.AsyncClient) -> None:
    made = await installation.post("/api/workspaces/", json={"name": "acme", "quota_class": "calibration"})
    workspace_id = made.json()["workspace_id"]
    assert made.json() == {"workspace_id": workspace_id, "name": "acme", "quota_class": "calibration"}
    script = [{"kind": "MODEL_CALL", "latency_ms": 500}, {"kind": "OBSERVATION"}]
    agent = await installation.post(f"/api/workspaces/{workspace_id}/agents/", json={"name": "a", "script": script})
    token = await installation.post(
        f"/api/workspaces/{workspace_id}/tokens/", json={"role": "OPERATOR", "expires_days": 1}
    )
    assert (agent.status_code, token.status_code, token.json()["role"]) == (200, 200, "OPERATOR")
    answer = await installation.post(
        "/api/runs/",
        json={"workspace_id": workspace_id, "agent_id": agent.json()["agent_id"]},
        headers={"authorization": f"Bearer {token.json()['token']}"},
    )
    assert answer.status_code == 200


WHO_MAY: dict[str | None, set[str]] = {
    None: {"GET /", "GET /livez", "GET /readyz", "GET /metrics", "GET /openapi.json", "GET /docs"},
    "VIEWER": {
        "GET /api/runs/",
        "GET /api/runs/{run_id}/",
        "GET /api/runs/{run_id}/snapshot/",
        "GET /api/runs/{run_id}/archives/",
        "GET /api/archives/{archive_id}/download/",
        "GET /api/toolcalls/",
        "GET /api/workspaces/{workspace_id}/tools/",
        "GET /api/workspaces/{workspace_id}/quotas/",
        "GET /api/quota-revisions/",
        "GET /api/quota-revisions/{revision}/",
        "POST /api/ws-tickets/",
    },
    "OPERATOR": {
        "POST /api/runs/",
        "POST /api/runs/{run_id}/spawn_subrun/",
        "POST /api/runs/{run_id}/cancel/",
        "POST /api/runs/{run_id}/pause/",
        "POST /api/runs/{run_id}/resume/",
        "POST /api/toolcalls/{tool_call_id}/approve/",
        "POST /api/toolcalls/{tool_call_id}/reject/",
    },
    "ADMIN of the installation": {
        "POST /api/workspaces/",
        "PATCH /api/workspaces/{workspace_id}/",
        "POST /api/workspaces/{workspace_id}/agents/",
        "POST /api/workspaces/{workspace_id}/tokens/",
        "POST /api/workspaces/{workspace_id}/tools/",
    },
}
"""The least that each route asks for. What stands nowhere here, such as rehydrating a run, no token may do."""


def test_each_route_asks_for_the_role_that_is_written_here_and_there_is_no_other() -> None:
    app = create_app(Settings("postgresql://nobody@127.0.0.1:1/none", "redis://127.0.0.1:1"))
    found: dict[str | None, set[str]] = {}
    for route in app.routes:
        if isinstance(route, Route):
            operation = route.endpoint
            assert isinstance(operation, Operation)
            (method,) = set(route.methods or ()) - {"HEAD"}
            role = None if operation.role is None else operation.role.name
            who = f"{role} of the installation" if operation.installation else role
            found.setdefault(who, set()).add(f"{method} {route.path}")
    assert found == WHO_MAY


async def test_administration_needs_an_installation_token(tenant: Any) -> None:
    for path in (
        "/api/workspaces/",
        f"/api/workspaces/{tenant.workspace_id}/agents/",
        f"/api/workspaces/{tenant.workspace_id}/tokens/",
    ):
        answer = await tenant.as_role("OWNER").post(path, json={"name": "x", "role": "VIEWER"})
        assert answer.status_code in (403, 422), path
        answer = await tenant.as_role("OWNER").post(
            path, json={"role": "VIEWER"} if "tokens" in path else {"name": "x"}
        )
        assert (answer.status_code, answer.json()["type"]) == (403, "urn:plimsoll:problem:role-too-low"), path


async def test_administration_names_the_field_that_is_wrong(installation: httpx.AsyncClient, tenant: Any) -> None:
    workspace = f"/api/workspaces/{tenant.workspace_id}"
    for path, body, field in (
        ("/api/workspaces/", {"name": ""}, "name"),
        ("/api/workspaces/", {"name": "x" * 201}, "name"),
        ("/api/workspaces/", {"name": "a", "quota_class": "gold"}, "quota_class"),
        (f"{workspace}/agents/", {"name": "a", "script": []}, "script"),
        (f"{workspace}/agents/", {"name": "a", "script": [{"kind": "DANCE"}]}, "script"),
        (f"{workspace}/agents/", {"name": "a", "script": [{"kind": "SUBRUN_SPAWN"}]}, "script[0].kind"),
        (
            f"{workspace}/agents/",
            {"name": "a", "script": [{"kind": "PLAN", "latency_ms": -1}]},
            "script[0].latency_ms",
        ),
        (f"{workspace}/tokens/", {"role": "KING"}, "role"),
        (f"{workspace}/tokens/", {"role": "VIEWER", "expires_days": 0}, "expires_days"),
    ):
        answer = await installation.post(path, json=body)
        assert (answer.status_code, answer.json()["field"]) == (422, field), body


async def test_an_absent_workspace_has_no_agents_and_no_tokens(installation: httpx.AsyncClient) -> None:
    absent = f"/api/workspaces/{uuid.uuid4()}"
    assert (await installation.post(f"{absent}/agents/", json={"name": "a"})).status_code == 404
    assert (await installation.post(f"{absent}/tokens/", json={"role": "VIEWER"})).status_code == 404
    assert (await installation.patch(f"{absent}/", json={"quota_class": "default"})).status_code == 404


async def test_a_change_of_quota_class_is_in_force_within_a_second(
    installation: httpx.AsyncClient, tenant: Any, database: Database
) -> None:
    clock = Clock()
    quotas = Quotas(database, clock.monotonic)
    assert await quotas.of(tenant.workspace_id) == DEFAULT
    changed = await installation.patch(f"/api/workspaces/{tenant.workspace_id}/", json={"quota_class": "calibration"})
    assert changed.json()["quota_class"] == "calibration"
    clock.at_s = 0.999
    assert quotas.known(tenant.workspace_id) == DEFAULT
    clock.at_s = 1.0
    assert quotas.known(tenant.workspace_id) is None
    assert await quotas.of(tenant.workspace_id) == LIFTED


async def test_the_database_never_holds_a_token(database: Database, tenant: Any) -> None:
    async with database.read() as connection:
        found = await connection.execute(text("SELECT tokens::text AS row FROM tokens"))
        stored = " ".join(row.row for row in found)
    for token in tenant.tokens.values():
        assert token not in stored
        assert hash_token(token).hex() in stored


async def test_an_expired_token_is_refused_at_its_instant(database: Database) -> None:
    clock = Clock()
    async with database.begin() as connection:
        issued = await issue_token(connection, None, "VIEWER", expires_days=1)
    callers = Callers(database, clock.monotonic, clock.now)
    header = f"Bearer {issued.token}".encode()
    assert not await refused(callers, header)
    clock.at_s = 86_399.5
    assert not await refused(callers, header)
    clock.at_s = 86_400.1
    assert await refused(callers, header)


async def test_a_revoked_token_is_refused_within_a_second(database: Database) -> None:
    clock = Clock()
    async with database.begin() as connection:
        issued = await issue_token(connection, None, "VIEWER")
    callers = Callers(database, clock.monotonic, clock.now)
    header = f"Bearer {issued.token}".encode()
    assert not await refused(callers, header)
    async with database.begin() as connection:
        assert await revoke_token(connection, issued.token)
        assert not await revoke_token(connection, issued.token)
    clock.at_s = 1.0
    assert await refused(callers, header)


async def test_a_token_can_be_revoked_by_its_first_characters(database: Database) -> None:
    async with database.begin() as connection:
        issued = await issue_token(connection, None, "VIEWER")
        assert await revoke_token(connection, issued.token[:13])
    assert await refused(Callers(database), f"Bearer {issued.token}".encode())


async def test_the_scheme_is_read_without_regard_to_case(database: Database) -> None:
    async with database.begin() as connection:
        issued = await issue_token(connection, None, "ADMIN")
    caller = await Callers(database).identify(f"bEARER {issued.token}".encode())
    assert (caller.role, caller.workspace_id) == (Role.ADMIN, None)


async def test_a_header_that_is_far_too_long_is_unknown_and_not_remembered(database: Database) -> None:
    async with database.begin() as connection:
        token = (await issue_token(connection, None, "OWNER")).token
    callers = Callers(database)
    padded = b"Bearer " + b" " * 60_000 + token.encode()
    assert await refused(callers, padded)
    assert callers.remembered(padded) is None
