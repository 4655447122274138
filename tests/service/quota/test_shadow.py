"""The shadow: what it would refuse is counted, by all processes together, and nobody is refused by it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from fractions import Fraction

import msgspec
import pytest
import redis.asyncio

from service.announce import Announcer
from service.commits import Commits, Create, Spawn
from service.db import Database
from service.doorbell import Doorbell
from service.errors import QuotaExceeded
from service.guarded import connect_redis
from service.quota.gate import Gate
from service.quota.keeper import Keeper
from service.quota.limits import DEFAULT, LIFTED, Limit, Quota, Rate
from service.quota.rates import Rates
from service.quota.revisions import propose, shadow
from service.quota.shadow import Observation, ShadowTally, revision_figures, shadow_counts
from service.quota.socket_leases import Lease, Leases
from service.workspaces import create_agent, create_workspace
from tests.quotatables import BY, file_of

Counts = dict[str, tuple[int, int, int]]


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    """A client as the service has."""
    opened = connect_redis(redis_url)
    yield opened
    await opened.aclose()


@pytest.fixture
async def tally(database: Database) -> ShadowTally:
    """What one process counts; revision 2 is the shadow."""
    async with database.begin() as connection:
        await propose(connection, file_of(), BY)
        await shadow(connection, 2, BY)
    return ShadowTally(database)


async def counts(database: Database) -> Counts:
    """Return asked, refused and newly refused of each limit."""
    async with database.read() as connection:
        told = (await shadow_counts(connection, [2]))[2]
    return {each.limit.value: (each.asked, each.refused, each.newly_refused) for each in told}


def under(active: Quota, shadow: Quota) -> Quota:
    """Return a quota whose shadow is revision 2."""
    return replace(active, revision=1, shadow=replace(shadow, revision=2))


SLOW = replace(DEFAULT, rates={**DEFAULT.rates, Limit.RUN_CREATION: Rate(Fraction("0.001"), burst=3)})
FAST = replace(DEFAULT, rates={**DEFAULT.rates, Limit.RUN_CREATION: Rate(Fraction("0.001"), burst=8)})


async def take(gate: Gate, quota: Quota, times: int) -> int:
    """Ask so many times; returns how often it was admitted."""
    workspace_id, admitted = uuid.uuid4(), 0
    for _ in range(times):
        try:
            await gate.take(workspace_id, quota, Limit.RUN_CREATION)
        except QuotaExceeded:
            continue
        admitted += 1
    return admitted


async def test_a_slower_shadow_refuses_nobody_and_its_refusals_are_counted(
    database: Database, client: redis.asyncio.Redis, tally: ShadowTally
) -> None:
    gate = Gate(Rates(client), client, tally)
    assert await take(gate, under(FAST, SLOW), 10) == 8
    await gate.drain()
    await tally.close()
    assert await counts(database) == {"run_creation": (10, 7, 5)}


async def test_a_faster_shadow_admits_nobody_and_would_refuse_fewer(
    database: Database, client: redis.asyncio.Redis, tally: ShadowTally
) -> None:
    gate = Gate(Rates(client), client, tally)
    assert await take(gate, under(SLOW, FAST), 10) == 3
    await gate.drain()
    await tally.close()
    assert await counts(database) == {"run_creation": (10, 2, 0)}


async def test_a_limit_that_the_shadow_lifts_is_not_counted_and_one_that_it_sets_is(
    database: Database, client: redis.asyncio.Redis, tally: ShadowTally
) -> None:
    gate = Gate(Rates(client), client, tally)
    assert await take(gate, under(SLOW, LIFTED), 4) == 3
    assert await take(gate, under(LIFTED, SLOW), 4) == 4
    await gate.drain()
    await tally.close()
    assert await counts(database) == {"run_creation": (4, 1, 1)}


async def test_the_counts_of_all_processes_are_added_up(database: Database, tally: ShadowTally) -> None:
    processes = [tally, *(ShadowTally(database) for _ in range(3))]
    seen = [Observation(2, limit, True, limit is Limit.TICK) for limit in (Limit.TICK, Limit.LIVE_RUNS)]
    for each in processes:
        each.count(seen)
        each.count(seen[::-1])
    await asyncio.gather(*(each.close() for each in processes))
    assert await counts(database) == {"live_runs": (8, 8, 0), "tick": (8, 8, 8)}


async def test_counts_reach_the_database_while_the_process_goes_on(database: Database, tally: ShadowTally) -> None:
    soon = ShadowTally(database, add_every_s=0.01)
    for turn in (1, 2):
        soon.count([Observation(2, Limit.TICK, False, False)])
        assert soon._task is not None
        await soon._task
        assert await counts(database) == {"tick": (turn, 0, 0)}
    await soon.close()


async def test_what_cannot_be_added_while_the_database_is_away_is_added_later(
    database: Database, tally: ShadowTally
) -> None:
    nowhere = Database("postgresql://nobody@127.0.0.1:1/none", pool_size=1)
    tally._database = nowhere
    tally.count([Observation(2, Limit.TICK, True, True)])
    await tally.close()
    tally._database = database
    tally.count([Observation(2, Limit.TICK, False, False)])
    await tally.close()
    assert await counts(database) == {"tick": (2, 1, 1)}
    await nowhere.close()


async def test_while_redis_is_away_requests_pass_and_the_shadow_is_not_asked(
    database: Database, tally: ShadowTally
) -> None:
    nowhere = connect_redis("redis://127.0.0.1:1")
    gate = Gate(Rates(nowhere), nowhere, tally)
    assert await take(gate, under(FAST, SLOW), 2) == 2
    await gate.drain()
    await tally.close()
    assert await counts(database) == {}
    await nowhere.aclose()


async def test_caps_are_observed_in_the_transaction_that_counts_them(
    database: Database, redis_url: str, client: redis.asyncio.Redis, tally: ShadowTally
) -> None:
    async with database.begin() as connection:
        workspace_id = await create_workspace(connection, "tenant")
        agent_id = await create_agent(connection, workspace_id, "agent")
    quota = under(replace(DEFAULT, live_parent_runs=3), replace(LIFTED, live_parent_runs=2, live_runs=4))
    commits = Commits(database, Announcer(client, Doorbell(redis_url)), tally)
    none = msgspec.Raw(b"{}")
    create = Create(workspace_id, agent_id, "", "", none, 0, 60.0, quota)
    results = await asyncio.gather(*(commits.submit(create) for _ in range(5)), return_exceptions=True)
    accepted = [each for each in results if not isinstance(each, BaseException)]
    assert (len(accepted), len(results)) == (3, 5)
    for _ in range(2):
        await commits.submit(Spawn(accepted[0].run_id, workspace_id, agent_id, "", none, None, quota))
    await commits.drain()
    await tally.close()
    assert await counts(database) == {
        "live_parent_runs": (5, 3, 1),  # with 0, 1, 2, 3 and 3 live parents
        "live_runs": (7, 1, 1),  # with 0, 1, 2, 3 and 3, and the spawns with 3 and 4 live runs
    }


async def test_open_sockets_are_observed_when_they_open(
    database: Database, client: redis.asyncio.Redis, tally: ShadowTally
) -> None:
    quota, workspace_id, user_id = under(DEFAULT, replace(LIFTED, websockets=2)), uuid.uuid4(), uuid.uuid4()

    async def quota_of(_: uuid.UUID) -> Quota:
        return quota

    keeper = Keeper(Leases(client), quota_of, tally=tally)
    async with (
        keeper.hold(Lease("a", workspace_id, user_id), print),
        keeper.hold(Lease("b", workspace_id, user_id), print),
        keeper.hold(Lease("c", workspace_id, user_id), print),
    ):
        pass
    await keeper.close()
    await tally.close()
    assert await counts(database) == {"websockets": (3, 1, 1)}


async def test_metrics_name_the_revisions_in_use_and_the_shadows_sums(database: Database, tally: ShadowTally) -> None:
    tally.count([Observation(2, Limit.TICK, True, True), Observation(2, Limit.TICK, True, False)])
    await tally.close()
    async with database.read() as connection:
        lines = (await revision_figures(connection)).splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        'plimsoll_quota_revision{state="active"} 1',
        'plimsoll_quota_revision{state="shadow"} 2',
        'plimsoll_quota_shadow_requests_total{revision="2",limit="tick"} 2',
        'plimsoll_quota_shadow_refusals_total{revision="2",limit="tick"} 2',
        'plimsoll_quota_shadow_new_refusals_total{revision="2",limit="tick"} 1',
    ]
