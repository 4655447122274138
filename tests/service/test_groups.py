"""Groups of subruns on a real PostgreSQL: policies, deadlines, leftovers, races."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pytest

from service.errors import IllegalState, Invalid
from service.families import cancel_run
from service.joins import FailurePolicy, JoinPolicy
from service.tick import Ticker
from service.worker import Worker
from tests.tenants import Tenant, drain, expire_leases
from tests.workers import Watched, working

SLOW = {"kind": "MODEL_CALL", "latency_ms": 3_600_000}
FAILING = {"kind": "TOOL_CALL", "error": "out of tea"}

NEVER_S = 3600.0
"""A sweep that does not come during a test."""

ANY, QUORUM, TIMEOUT = JoinPolicy.WAIT_ANY, JoinPolicy.QUORUM, JoinPolicy.TIMEOUT
CANCEL, IGNORE = FailurePolicy.CANCEL_SIBLINGS, FailurePolicy.IGNORE_FAILURE


async def groups(tenant: Tenant, parent: uuid.UUID) -> dict[str, tuple[str, int, int, int]]:
    """Return (state, spawned, pending, failed) of each group."""
    found = await tenant.rows(
        "SELECT group_id, state, spawned, pending, failed FROM subrun_groups WHERE run_id = :id", id=parent
    )
    return {row["group_id"]: (row["state"], row["spawned"], row["pending"], row["failed"]) for row in found}


async def test_the_first_success_of_several_wins_and_the_losers_end_with_the_parent(
    tenant: Tenant, ticker: Ticker
) -> None:
    slow, failing = await tenant.agent(SLOW), await tenant.agent(FAILING)
    parent = await tenant.run(expected_subruns=3)
    race: dict[str, Any] = {"group_id": "race", "join_policy": ANY, "failure_policy": CANCEL}
    children = [await tenant.spawn(parent, agent, **race) for agent in (failing, slow, slow)]
    await drain(ticker)
    assert await tenant.statuses(parent, *children) == ["WAITING_FOR_SUBRUN", "FAILED", "RUNNING", "RUNNING"]

    await tenant.write("UPDATE runs SET next_tick_at = now(), step_due_at = now() WHERE run_id = :id", id=children[1])
    await drain(ticker)

    assert await tenant.statuses(parent, *children) == ["COMPLETED", "FAILED", "COMPLETED", "CANCELED"]
    assert await groups(tenant, parent) == {"race": ("JOINED", 3, 0, 2)}
    assert (await tenant.row(children[2]))["error_summary"] == "the run that spawned it completed without it"
    assert await tenant.faults() == []


async def test_siblings_are_cancelled_at_once_while_another_group_is_waited_for(tenant: Tenant, ticker: Ticker) -> None:
    slow = await tenant.agent(SLOW)
    parent = await tenant.run(expected_subruns=3)
    winner = await tenant.spawn(parent, None, "race", join_policy=ANY, failure_policy=CANCEL)
    loser = await tenant.spawn(parent, slow, "race")
    nephew = await tenant.spawn(loser, slow)
    other = await tenant.spawn(parent, slow, "other")

    await drain(ticker)

    assert await tenant.statuses(parent, winner, loser, nephew, other) == [
        "WAITING_FOR_SUBRUN",
        "COMPLETED",
        "CANCELED",
        "CANCELED",
        "RUNNING",
    ]
    assert (await tenant.row(loser))["error_summary"] == "its group was joined without it"
    assert await groups(tenant, parent) == {"race": ("JOINED", 2, 0, 1), "other": ("WAITING", 1, 1, 0)}
    assert await tenant.faults() == []


async def test_leftovers_of_other_policies_run_on_until_the_parent_ends(tenant: Tenant, ticker: Ticker) -> None:
    slow = await tenant.agent(SLOW)
    parent = await tenant.run(slow)
    await tenant.spawn(parent, None, "race", join_policy=ANY)
    left = await tenant.spawn(parent, slow, "race")
    await drain(ticker)
    assert await tenant.statuses(parent, left) == ["RUNNING", "RUNNING"]

    await tenant.write("UPDATE runs SET next_tick_at = now(), step_due_at = now() WHERE run_id = :id", id=parent)
    await drain(ticker)

    assert await tenant.statuses(parent, left) == ["COMPLETED", "CANCELED"]
    assert await tenant.faults() == []


async def test_a_quorum_that_can_no_longer_be_met_fails_the_parent_at_once(tenant: Tenant, ticker: Ticker) -> None:
    slow, failing = await tenant.agent(SLOW), await tenant.agent(FAILING)
    parent = await tenant.run(slow, expected_subruns=3)
    two_of_three: dict[str, Any] = {"group_id": "votes", "join_policy": QUORUM, "quorum": 2, "failure_policy": CANCEL}
    children = [await tenant.spawn(parent, agent, **two_of_three) for agent in (slow, failing, failing)]

    await drain(ticker)

    assert await tenant.statuses(parent, *children) == ["FAILED", "CANCELED", "FAILED", "FAILED"]
    assert (await tenant.row(parent))["error_summary"] == (
        "group votes: QUORUM of 2 was out of reach of 3 subruns: 0 completed, 1 pending"
    )
    assert await tenant.faults() == []


async def test_ignored_failures_count_towards_a_quorum(tenant: Tenant, ticker: Ticker) -> None:
    failing = await tenant.agent(FAILING)
    parent = await tenant.run(expected_subruns=2)
    for _ in range(2):
        await tenant.spawn(parent, failing, "votes", join_policy=QUORUM, quorum=2, failure_policy=IGNORE)

    await drain(ticker)

    assert await tenant.status(parent) == "COMPLETED"
    assert await tenant.faults() == []


@pytest.mark.parametrize("failure", FailurePolicy)
async def test_a_timeout_fires_with_every_child_hung(tenant: Tenant, failure: FailurePolicy) -> None:
    ticker = Watched(tenant)
    slow = await tenant.agent(SLOW)
    parent = await tenant.run(expected_subruns=2)
    hung: dict[str, Any] = {
        "group_id": "hung",
        "join_policy": TIMEOUT,
        "timeout_seconds": 0.2,
        "failure_policy": failure,
    }
    children = [await tenant.spawn(parent, slow, **hung) for _ in range(2)]

    async with working(Worker(tenant.database, ticker, NEVER_S)):
        await ticker.until_all_ended(tenant)

    assert await tenant.statuses(parent, *children) == ["COMPLETED", "CANCELED", "CANCELED"]
    late = await tenant.rows(
        "SELECT extract(epoch FROM r.ended_at - g.deadline_at) AS late_s FROM runs r"
        " JOIN subrun_groups g ON g.run_id = r.run_id"
    )
    assert late[0]["late_s"] >= 0
    assert await tenant.faults() == []


async def test_another_policy_fails_when_its_time_is_over(tenant: Tenant, ticker: Ticker) -> None:
    parent = await tenant.run(await tenant.agent(SLOW))
    child = await tenant.spawn(parent, await tenant.agent(SLOW), "bounded", timeout_seconds=0.001)

    await drain(ticker)
    await expire_leases(tenant)
    await drain(ticker)

    assert await tenant.statuses(parent, child) == ["FAILED", "CANCELED"]
    assert (await tenant.row(parent))["error_summary"] == (
        "group bounded: waited 0.001 s for WAIT_ALL of 1 subruns: 0 completed, 1 pending"
    )
    assert await tenant.faults() == []


async def test_the_deadline_of_a_parked_parent_is_its_due_time(tenant: Tenant, ticker: Ticker) -> None:
    slow = await tenant.agent(SLOW)
    parent = await tenant.run()
    await tenant.spawn(parent, slow, "unbounded")
    await drain(ticker)
    assert (await tenant.row(parent))["next_tick_at"] is None

    await tenant.spawn(parent, slow, "bounded", timeout_seconds=30.0)

    due = await tenant.rows(
        "SELECT r.next_tick_at = g.deadline_at AS is_deadline FROM runs r"
        " JOIN subrun_groups g ON g.run_id = r.run_id WHERE g.deadline_at IS NOT NULL"
    )
    assert due == [{"is_deadline": True}]


async def test_the_options_of_a_group_are_fixed_by_its_first_spawn(tenant: Tenant) -> None:
    parent = await tenant.run()
    await tenant.spawn(parent, None, "votes", join_policy=QUORUM, quorum=2)
    await tenant.spawn(parent, None, "votes")
    await tenant.spawn(parent, None, "votes", quorum=2)

    with pytest.raises(Invalid, match=r"options\.quorum: group votes was begun with 2"):
        await tenant.spawn(parent, None, "votes", quorum=3)
    assert await groups(tenant, parent) == {"votes": ("WAITING", 3, 3, 0)}
    assert await tenant.faults() == []


async def test_spawns_that_race_for_the_first_place_in_a_group_agree_on_its_options(tenant: Tenant) -> None:
    parent = await tenant.run(await tenant.agent(SLOW))
    wanted: list[dict[str, Any]] = [
        {"join_policy": ANY},
        {"join_policy": QUORUM, "quorum": 2},
        {"join_policy": TIMEOUT, "timeout_seconds": 9.0},
    ]

    answers = await asyncio.gather(
        *(tenant.spawn(parent, None, "contested", **options) for options in wanted * 4), return_exceptions=True
    )

    accepted = sum(isinstance(answer, uuid.UUID) for answer in answers)
    assert {type(answer) for answer in answers} == {uuid.UUID, Invalid}
    assert (accepted, (await groups(tenant, parent))["contested"]) == (4, ("WAITING", 4, 4, 0))
    assert await tenant.faults() == []


async def test_every_policy_at_once_with_cancels_and_spawns_leaves_whole_families(
    tenant: Tenant, ticker: Ticker
) -> None:
    async def turn() -> None:
        while claims := await ticker.claim(most=7):
            await ticker.settle(claims, await ticker.outcomes(claims))

    agents = [tenant.agent_id, await tenant.agent(FAILING), await tenant.agent({"kind": "PLAN", "latency_ms": 5})]
    parents = await tenant.runs(12)
    spawns = []
    for number, parent in enumerate(parents):
        policy, failure = list(JoinPolicy)[number % 4], list(FailurePolicy)[number % 3]
        quorum = 2 if policy is QUORUM else None
        timeout_s = 0.01 if policy is TIMEOUT else None
        spawns += [
            tenant.spawn(
                parent,
                agent,
                "all",
                join_policy=policy,
                failure_policy=failure,
                quorum=quorum,
                timeout_seconds=timeout_s,
            )
            for agent in agents
        ]

    async def cancel(run_id: uuid.UUID) -> None:
        async with tenant.database.begin() as connection:
            await cancel_run(connection, run_id)

    answers = await asyncio.gather(
        *spawns, *(turn() for _ in range(3)), *map(cancel, parents[::5]), return_exceptions=True
    )
    await expire_leases(tenant)
    await tenant.write("UPDATE runs SET step_due_at = now() - interval '1 ms' WHERE step_due_at > now()")
    await turn()

    assert {type(answer) for answer in answers} <= {type(None), uuid.UUID, IllegalState}
    assert await tenant.rows("SELECT run_id FROM runs WHERE ended_at IS NULL") == []
    assert await tenant.faults() == []
