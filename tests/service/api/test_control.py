"""Pausing, resuming and joining by group, as a client sees it."""

from __future__ import annotations

from typing import Any


async def post(tenant: Any, run_id: str, verb: str, **body: Any) -> tuple[int, dict[str, Any]]:
    """Ask for something to be done with a run; returns the status and the JSON."""
    answer = await tenant.operator.post(f"/api/runs/{run_id}/{verb}/", json=body)
    return answer.status_code, answer.json()


async def test_a_paused_run_says_what_it_was_and_is_that_again_when_resumed(tenant: Any) -> None:
    run_id = (await tenant.create())["run_id"]

    paused = await post(tenant, run_id, "pause", reason="lunch")
    resumed = await post(tenant, run_id, "resume")

    assert (paused[0], paused[1]["run_id"], paused[1]["status"], paused[1]["paused_from"]) == (
        200,
        run_id,
        "PAUSED",
        "PENDING",
    )
    assert (resumed[0], resumed[1]["status"], resumed[1]["paused_from"]) == (200, "PENDING", None)
    assert [event["payload"] for event in (await tenant.snapshot(run_id, since_seq=1))["events_since_seq"]] == [
        {"from": "PENDING", "to": "PAUSED", "reason": "lunch"},
        {"from": "PAUSED", "to": "PENDING", "reason": "resumed by a caller"},
    ]


async def test_a_control_that_the_state_does_not_allow_is_409_and_changes_nothing(tenant: Any) -> None:
    run_id = (await tenant.create())["run_id"]
    assert (await post(tenant, run_id, "resume"))[0] == 409
    await post(tenant, run_id, "pause")
    status, problem = await post(tenant, run_id, "pause")
    assert (status, problem["error"]) == (
        409,
        "the run is PAUSED: only a run that has not ended and is not paused can be paused",
    )
    await post(tenant, run_id, "cancel")
    before = await tenant.snapshot(run_id)
    for verb in ("pause", "resume", "cancel"):
        assert (await post(tenant, run_id, verb))[0] == 409, verb
    assert await tenant.snapshot(run_id) == before


async def test_a_paused_run_may_spawn_and_be_cancelled(tenant: Any) -> None:
    run_id = (await tenant.create())["run_id"]
    await post(tenant, run_id, "pause")
    status, child = await post(tenant, run_id, "spawn_subrun")
    assert status == 200

    status, run = await post(tenant, run_id, "cancel")

    assert (status, run["status"], run["paused_from"], run["pending_subruns"]) == (200, "CANCELED", None, 0)
    ended = (await tenant.operator.get(f"/api/runs/{child['child_run_id']}/")).json()
    assert ended["status"] == "CANCELED"


async def test_the_snapshot_shows_the_groups_with_their_options_and_counts(tenant: Any) -> None:
    run_id = (await tenant.create())["run_id"]
    votes = {"join_policy": "QUORUM", "quorum": 2, "failure_policy": "CANCEL_SIBLINGS", "group_id": "votes"}
    for options in (votes, {"group_id": "votes"}):
        assert (await post(tenant, run_id, "spawn_subrun", options=options))[0] == 200
    status, alone = await post(tenant, run_id, "spawn_subrun")
    assert (status, alone["group_id"]) == (200, f"group-{alone['child_run_id']}")
    await post(tenant, alone["child_run_id"], "cancel")

    seen = await tenant.snapshot(run_id)

    groups = {group.pop("group_id"): group for group in seen["groups"]}
    assert groups[alone["group_id"]].pop("decided_at") is not None
    assert groups == {
        "votes": {
            "join_policy": "QUORUM",
            "failure_policy": "CANCEL_SIBLINGS",
            "quorum": 2,
            "timeout_seconds": None,
            "deadline_at": None,
            "spawned": 2,
            "pending": 2,
            "failed": 0,
            "state": "WAITING",
            "decided_at": None,
        },
        alone["group_id"]: {
            "join_policy": "WAIT_ALL",
            "failure_policy": "FAIL_FAST",
            "quorum": None,
            "timeout_seconds": None,
            "deadline_at": None,
            "spawned": 1,
            "pending": 0,
            "failed": 1,
            "state": "FAILED",
        },
    }


async def test_another_option_for_a_group_is_refused_by_name(tenant: Any) -> None:
    run_id = (await tenant.create())["run_id"]
    await post(tenant, run_id, "spawn_subrun", options={"group_id": "g", "join_policy": "WAIT_ANY"})

    status, problem = await post(tenant, run_id, "spawn_subrun", options={"group_id": "g", "join_policy": "WAIT_ALL"})

    assert (status, problem["field"]) == (422, "options.join_policy")
    assert len((await tenant.snapshot(run_id))["child_runs"]) == 1
