"""The API describes itself, and the description is true."""

from __future__ import annotations

import enum
import re
from typing import Any

import httpx
import msgspec
import pytest

from service.api.answers import (
    Created,
    Index,
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
from service.auth import Role
from service.events import EventType
from service.joins import FailurePolicy, GroupState, JoinPolicy
from service.quota import usage
from service.quota.history import RevisionPage, RevisionView
from service.quota.limits import Limit
from service.quota.revisions import Change, State
from service.quota.usage import WorkspaceQuotas
from service.runs import RunStatus, StepKind
from service.toolcalls import Risk, ToolCallStatus
from service.workspaces import QuotaClass


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


ENUMERATIONS: dict[tuple[str, ...], type[enum.Enum]] = {
    ("RunView", "status"): RunStatus,
    ("RunView", "paused_from"): RunStatus,
    ("ChildView", "status"): RunStatus,
    ("Created", "status"): RunStatus,
    ("Spawned", "status"): RunStatus,
    ("Holder", "status"): RunStatus,
    ("StepView", "kind"): StepKind,
    ("EventView", "event_type"): EventType,
    ("GroupView", "join_policy"): JoinPolicy,
    ("GroupView", "failure_policy"): FailurePolicy,
    ("GroupView", "state"): GroupState,
    ("SpawnOptions", "join_policy"): JoinPolicy,
    ("SpawnOptions", "failure_policy"): FailurePolicy,
    ("ToolCallView", "status"): ToolCallStatus,
    ("ToolCallView", "risk"): Risk,
    ("ToolView", "risk"): Risk,
    ("ToolBody", "risk"): Risk,
    ("WorkspaceBody", "quota_class"): QuotaClass,
    ("WorkspacePatch", "quota_class"): QuotaClass,
    ("WorkspaceView", "quota_class"): QuotaClass,
    ("WorkspaceQuotas", "quota_class"): QuotaClass,
    ("LimitUse", "limit"): Limit,
    ("LimitUse", "kind"): usage.Kind,
    ("LimitUse", "per"): usage.Per,
    ("ShadowCount", "limit"): Limit,
    ("RevisionView", "state"): State,
    ("Happened", "from_state"): State,
    ("Happened", "to_state"): State,
    ("Happened", "change"): Change,
    ("TokenBody", "role"): Role,
    ("TokenView", "role"): Role,
    ("/api/runs/", "status"): RunStatus,
    ("/api/toolcalls/", "status"): ToolCallStatus,
}
"""Which enumeration stands behind a field of a schema, or behind a parameter of a path."""

FREE = {("Holder", "kind"), ("Problem", "status")}
"""Fields that are called like an enumeration and are none."""

CALLED_LIKE_ONE = {
    "status", "state", "kind", "risk", "role", "quota_class", "event_type", "join_policy", "failure_policy",
    "limit", "per", "change", "from_state", "to_state", "paused_from",
}  # fmt: skip


def values_of(schema: dict[str, Any], document: dict[str, Any]) -> set[str] | None:
    """Return what a schema enumerates, null apart."""
    if "$ref" in schema:
        return values_of(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]], document)
    found = [each for each in (values_of(one, document) for one in schema.get("anyOf", ())) if each is not None]
    return set(schema["enum"]) if "enum" in schema else found[0] if found else None


async def test_what_has_few_values_names_them_and_they_are_the_ones_of_its_type(url: str) -> None:
    async with httpx.AsyncClient(base_url=url) as client:
        document = (await client.get("/openapi.json")).json()
    told = {
        (name, field): values_of(schema, document)
        for name, described in document["components"]["schemas"].items()
        for field, schema in described.get("properties", {}).items()
        if field in CALLED_LIKE_ONE and (name, field) not in FREE
    } | {
        (path, parameter["name"]): values_of(parameter["schema"], document)
        for path, methods in document["paths"].items()
        for parameter in methods.get("get", {"parameters": []})["parameters"]
        if parameter["name"] == "status"
    }
    assert told.pop(("Health", "status")) == {"ok", "degraded"}
    assert told == {
        place: {each.name if issubclass(kind, enum.IntEnum) else each.value for each in kind}
        for place, kind in ENUMERATIONS.items()
    }


async def test_whoever_opens_the_printed_url_is_told_what_answers_there_and_every_path_that_is_named_does(
    url: str,
) -> None:
    async with httpx.AsyncClient(base_url=url) as client:
        answer = await client.get("/")
        told = answer.json()
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
        strictly(answer.content, Index)
        document = (await client.get(told["openapi"])).json()
        assert told == {
            "service": "plimsoll",
            "version": document["info"]["version"],
            "docs": "/docs",
            "openapi": "/openapi.json",
            "livez": "/livez",
            "readyz": "/readyz",
            "metrics": "/metrics",
        }
        statuses = {path: (await client.get(path)).status_code for path in told.values() if path.startswith("/")}
        assert statuses == dict.fromkeys(statuses, 200)
        assert (await client.post("/")).headers["allow"] == "GET, HEAD"
        assert (await client.head("/")).content == b""
