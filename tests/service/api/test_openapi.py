"""The API describes itself, and the description is true."""

from __future__ import annotations

import re
from typing import Any

import httpx
import msgspec
import pytest

from service.api.answers import (
    Created,
    Problem,
    RunPage,
    RunView,
    SnapshotView,
    Spawned,
    TokenView,
    ToolCallPage,
    ToolPage,
    ToolView,
    WorkspaceView,
)
from service.quota.history import RevisionPage, RevisionView
from service.quota.usage import WorkspaceQuotas


def strictly(body: bytes, kind: type[msgspec.Struct]) -> None:
    """Decode a body and require that nothing of it was left over."""
    decoded = msgspec.json.decode(body, type=kind)
    sent, kept = msgspec.json.decode(body), msgspec.to_builtins(decoded, str_keys=True)
    assert_same_keys(sent, kept)


def assert_same_keys(sent: Any, kept: Any) -> None:
    if isinstance(sent, dict):
        assert sent.keys() <= kept.keys(), sent.keys() - kept.keys()
        for key, value in sent.items():
            assert_same_keys(value, kept[key])
    elif isinstance(sent, list):
        for one, other in zip(sent, kept, strict=True):
            assert_same_keys(one, other)


async def test_answers_are_what_the_description_says(tenant: Any, installation: httpx.AsyncClient) -> None:
    body = {"workspace_id": str(tenant.workspace_id), "agent_id": str(tenant.agent_id)}
    created = await tenant.operator.post("/api/runs/", json=body)
    run_id = created.json()["run_id"]
    strictly(created.content, Created)
    strictly((await tenant.operator.post(f"/api/runs/{run_id}/spawn_subrun/", json={})).content, Spawned)
    for path, kind in (
        ("/api/runs/", RunPage),
        (f"/api/runs/{run_id}/", RunView),
        (f"/api/runs/{run_id}/snapshot/", SnapshotView),
        ("/api/toolcalls/", ToolCallPage),
        (f"/api/workspaces/{tenant.workspace_id}/tools/", ToolPage),
        (f"/api/workspaces/{tenant.workspace_id}/quotas/", WorkspaceQuotas),
        ("/api/quota-revisions/", RevisionPage),
        ("/api/quota-revisions/1/", RevisionView),
        ("/api/nothing/", Problem),
        ("/api/runs/?limit=0", Problem),
    ):
        strictly((await tenant.operator.get(path)).content, kind)
    strictly((await installation.post("/api/workspaces/", json={"name": "a"})).content, WorkspaceView)
    token = await installation.post(f"/api/workspaces/{tenant.workspace_id}/tokens/", json={"role": "VIEWER"})
    strictly(token.content, TokenView)
    tool = {"name": "loud", "tool": "echo", "risk": "SAFE"}
    strictly((await installation.post(f"/api/workspaces/{tenant.workspace_id}/tools/", json=tool)).content, ToolView)
    run = (await tenant.operator.post(f"/api/runs/{run_id}/pause/", json={})).content
    strictly(run, RunView)


async def test_every_route_is_described_with_its_body_and_its_role(url: str) -> None:
    async with httpx.AsyncClient(base_url=url) as client:
        document = (await client.get("/openapi.json")).json()
    create = document["paths"]["/api/runs/"]["post"]
    assert (document["openapi"], create["x-role"], create["summary"]) == ("3.1.0", "OPERATOR", "Accept a run.")
    reference = create["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    assert set(document["components"]["schemas"][reference.rpartition("/")[2]]["required"]) == {
        "workspace_id",
        "agent_id",
    }
    assert {"/livez", "/readyz", "/metrics", "/openapi.json", "/docs"} <= document["paths"].keys()
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert operation["summary"].endswith("."), path
            named = [p["name"] for p in operation["parameters"] if p["in"] == "path"]
            assert named == re.findall(r"{(\w+)}", path)


@pytest.mark.parametrize("path", ["/docs", "/docs/"])
async def test_the_page_shows_every_path_and_asks_nothing_of_another_host(url: str, path: str) -> None:
    async with httpx.AsyncClient(base_url=url) as client:
        document, answer = (await client.get("/openapi.json")).json(), await client.get(path)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    for described in document["paths"]:
        assert f"<code>{described}</code>" in answer.text
    assert not re.search(r"https?://|<script|src=", answer.text)
