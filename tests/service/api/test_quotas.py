"""The quota page and the history of revisions over HTTP: what they say, and to whom."""

from __future__ import annotations

import uuid
from typing import Any

import httpx
import pytest

from service.db import Database
from service.quota.revisions import activate, propose
from tests.quotatables import file_of, tables

DIGEST = "ab" * 32


def by_limit(page: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the page's limits by name."""
    return {each["limit"]: each for each in page["limits"]}


@pytest.fixture
async def refused(database: Database) -> int:
    """A revision that was measured and that a guardrail refused: its number."""
    file = file_of(
        tables(live_runs=200),
        author="ada",
        note="for acme",
        samples={"m-1": DIGEST},
        machine={"cpu_count": 2},
        commit="c0ffee",
    )
    async with database.begin() as connection:
        revision = await propose(connection, file, "ada")
        assert not (await activate(connection, revision, "bob", "hurry")).activated
    return revision


async def test_a_workspace_sees_its_limits_what_it_uses_and_who_holds_it(tenant: Any) -> None:
    run_id = (await tenant.create())["run_id"]
    answer = await tenant.as_role("VIEWER").get(f"/api/workspaces/{tenant.workspace_id}/quotas/")
    page = answer.json()
    assert answer.status_code == 200
    assert (page["workspace_id"], page["quota_class"], page["revision"]) == (str(tenant.workspace_id), "default", 1)
    limits = by_limit(page)
    rate, parents = limits["run_creation"], limits["live_parent_runs"]
    assert (rate["kind"], rate["value"], rate["burst"]) == ("rate", 10.29, 11)
    assert rate["used"] + rate["remaining"] == 11
    assert (parents["kind"], parents["value"], parents["used"], parents["remaining"]) == ("cap", 5, 1, 4)
    assert [holder["run_id"] for holder in parents["holders"]] == [run_id]
    assert (parents["retry_after_s"], parents["retry_when"]) == (0.0, None)


async def test_a_refused_create_finds_on_the_page_what_refused_it_and_who_has_to_end(tenant: Any) -> None:
    runs = [(await tenant.create())["run_id"] for _ in range(5)]
    body = {"workspace_id": str(tenant.workspace_id), "agent_id": str(tenant.agent_id)}
    answer = await tenant.operator.post("/api/runs/", json=body)
    assert (answer.status_code, answer.json()["violated-policies"]) == (429, ["live_parent_runs"])
    page = by_limit((await tenant.operator.get(f"/api/workspaces/{tenant.workspace_id}/quotas/")).json())
    cap = page["live_parent_runs"]
    assert (cap["used"], cap["remaining"], cap["retry_after_s"]) == (5, 0, None)
    assert cap["retry_when"] == "when one of the holders ends"
    assert {holder["run_id"] for holder in cap["holders"]} == set(runs)
    await tenant.operator.post(f"/api/runs/{runs[0]}/cancel/", json={})
    page = by_limit((await tenant.operator.get(f"/api/workspaces/{tenant.workspace_id}/quotas/")).json())
    assert (page["live_parent_runs"]["used"], page["live_parent_runs"]["retry_after_s"]) == (4, 0.0)


async def test_a_calibration_workspace_is_under_no_limit(new_tenant: Any) -> None:
    tenant = await new_tenant("calibration")
    page = (await tenant.operator.get(f"/api/workspaces/{tenant.workspace_id}/quotas/")).json()
    assert {each["value"] for each in page["limits"]} == {None}
    assert {each["retry_after_s"] for each in page["limits"]} == {0.0}


async def test_a_foreign_workspace_is_as_absent_as_one_that_never_was(new_tenant: Any) -> None:
    mine, other = await new_tenant(), await new_tenant()
    answers = []
    for workspace_id in (other.workspace_id, uuid.uuid4(), "nonsense"):
        answer = await mine.as_role("OWNER").get(f"/api/workspaces/{workspace_id}/quotas/")
        answers.append((answer.status_code, answer.content.replace(str(workspace_id).encode(), b"ID")))
    assert len(set(answers)) == 1
    assert answers[0][0] == 404


async def test_every_caller_sees_the_revision_in_force(tenant: Any) -> None:
    view = (await tenant.as_role("VIEWER").get("/api/quota-revisions/1/")).json()
    assert (view["revision"], view["state"]) == (1, "active")
    assert view["limits"]["default"]["run_creation"] == {"per_s": 10.29, "burst": 11}
    assert view["limits"]["calibration"]["run_creation"] is None
    assert [each["change"] for each in view["changes"]] == ["install"]


async def test_a_tenant_sees_values_and_samples_and_not_who_or_why(tenant: Any, refused: int) -> None:
    view = (await tenant.as_role("OWNER").get(f"/api/quota-revisions/{refused}/")).json()
    assert (view["state"], view["limits"]["default"]["live_runs"]) == ("proposed", 200)
    assert view["provenance"] == {"samples": {"m-1": DIGEST}, "commit": "c0ffee"}
    assert [(each["change"], each["by"], each["reason"], each["findings"]) for each in view["changes"]] == [
        ("propose", None, None, None),
        ("refuse", None, None, None),
    ]
    assert view["shadow"] is None


async def test_the_installation_sees_everything(installation: httpx.AsyncClient, refused: int) -> None:
    view = (await installation.get(f"/api/quota-revisions/{refused}/")).json()
    assert view["provenance"] == {
        "author": "ada",
        "note": "for acme",
        "samples": {"m-1": DIGEST},
        "commit": "c0ffee",
        "machine": {"cpu_count": 2},
    }
    proposed, refusal = view["changes"]
    assert (proposed["by"], refusal["by"], refusal["reason"]) == ("ada", "bob", "hurry")
    assert [each["guardrail"] for each in refusal["findings"]] == ["step limit", "stale input"]
    assert view["shadow"] == []


async def test_the_history_is_paged_newest_first(installation: httpx.AsyncClient, refused: int) -> None:
    seen: list[int] = []
    query: dict[str, int] = {"limit": 1}
    while True:
        page = (await installation.get("/api/quota-revisions/", params=query)).json()
        seen += [each["revision"] for each in page["revisions"]]
        if page["next_before"] is None:
            break
        query["before"] = page["next_before"]
    assert seen == list(range(seen[0], 0, -1))
    assert seen[0] >= refused


@pytest.mark.parametrize("named", ["0", "999999", "-1", "1.0", "one", "99999999999999999999", "%C2%B2", str(2**31)])
async def test_a_revision_that_is_none_is_absent(tenant: Any, named: str) -> None:
    answer = await tenant.operator.get(f"/api/quota-revisions/{named}/")
    assert (answer.status_code, answer.json()["error"]) == (404, "no such quota revision")


@pytest.mark.parametrize("before", ["", "x", "0", "-1", "nan", "inf", "2147483648"])
async def test_a_place_in_the_history_that_is_none_is_named(tenant: Any, before: str) -> None:
    answer = await tenant.operator.get("/api/quota-revisions/", params={"before": before})
    assert (answer.status_code, answer.json()["field"]) == (422, "before")


async def test_nobody_reads_quotas_without_a_token(tenant: Any) -> None:
    async with httpx.AsyncClient(base_url=tenant.url) as client:
        for path in (
            f"/api/workspaces/{tenant.workspace_id}/quotas/",
            "/api/quota-revisions/",
            "/api/quota-revisions/1/",
        ):
            assert (await client.get(path)).status_code == 401


async def test_metrics_name_the_revision_in_force(tenant: Any) -> None:
    metrics = (await tenant.operator.get("/metrics")).text
    assert 'plimsoll_quota_revision{state="active"} 1\n' in metrics
