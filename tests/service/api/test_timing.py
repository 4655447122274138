"""Server-Timing: where a request's time went, also of a request that is refused."""

from __future__ import annotations

import re
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from service.errors import IllegalState
from service.exchange import Exchange


def parts(answer: httpx.Response) -> dict[str, float]:
    """Return the milliseconds of each part."""
    return {name: float(ms) for name, ms in re.findall(r"(\w+);dur=([\d.]+)", answer.headers["server-timing"])}


async def repeated(ask: Callable[[], Awaitable[httpx.Response]]) -> httpx.Response:
    """Ask until a quota refuses."""
    while (answer := await ask()).status_code == 200:
        pass
    assert answer.status_code == 429, answer.text
    return answer


async def test_what_a_rate_refuses_was_waiting_for_the_quota(tenant: Any) -> None:
    run_id = (await tenant.create())["run_id"]
    poll, body = f"/api/runs/{run_id}/snapshot/", {"options": {"quorum": 1, "join_policy": "QUORUM"}}
    refused = await repeated(lambda: tenant.operator.get(poll))
    assert parts(refused)["quota"] > 0
    assert parts(refused)["publish"] == 0
    spawn = await repeated(lambda: tenant.operator.post(f"/api/runs/{run_id}/spawn_subrun/", json=body))
    assert parts(spawn)["quota"] > 0


async def test_what_a_cap_refuses_was_waiting_for_the_database(tenant: Any) -> None:
    body = {"workspace_id": str(tenant.workspace_id), "agent_id": str(tenant.agent_id)}
    refused = await repeated(lambda: tenant.operator.post("/api/runs/", json=body))
    assert refused.json()["violated-policies"] == ["live_parent_runs"]
    assert parts(refused)["db"] > 0
    assert parts(refused)["quota"] > 0


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/runs/{absent}/", 404),
        ("GET", "/api/runs/{absent}/snapshot/", 404),
        ("POST", "/api/runs/{absent}/spawn_subrun/", 404),
        ("POST", "/api/runs/{run}/resume/", 409),
        ("POST", "/api/toolcalls/{absent}/approve/", 404),
        ("GET", "/api/runs/{absent}/archives/", 404),
        ("GET", "/api/toolcalls/?workspace_id={absent}", 404),
    ],
)
async def test_what_is_refused_says_what_it_asked_the_database(
    tenant: Any, installation: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    run_id = (await tenant.create())["run_id"]
    body: dict[str, str] | None = None if method == "GET" else {}
    answer = await installation.request(method, path.format(absent=uuid.uuid4(), run=run_id), json=body)
    assert (answer.status_code, parts(answer)["db"] > 0) == (status, True), answer.text


def test_a_timed_block_that_raises_is_booked_and_several_add_up() -> None:
    exchange: Exchange[None] = Exchange({"type": "http"})
    with exchange.timed("db_ms"):
        pass
    first = exchange.db_ms
    with pytest.raises(IllegalState), exchange.timed("db_ms"):
        raise IllegalState("no")
    assert 0 < first < exchange.db_ms
    assert (exchange.quota_ms, exchange.publish_ms) == (0, 0)
