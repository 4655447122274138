"""What follows a commit never undoes it, repeats it or piles up."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy import text
from structlog.typing import EventDict

import service.announce
from service.announce import MOST_RINGS, Announcer
from service.doorbell import Doorbell
from service.guarded import connect_redis
from tests.tenants import Tenant

NOW = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)


class Faulty(Redis):
    """A client with a bug."""

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Any:
        raise ZeroDivisionError("a bug of ours")


async def test_rings_that_nobody_hears_do_not_pile_up(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.announce, "RING_EVERY_S", 0.0)
    client, doorbell = connect_redis(redis_url), Doorbell(redis_url)
    announcer = Announcer(client, doorbell)
    for _ in range(MOST_RINGS + 10):
        await announcer.announce([], NOW, due=True)
    assert await client.llen(doorbell.message()[0]) == MOST_RINGS
    await client.aclose()


async def test_a_ring_that_comes_after_the_end_of_its_client_opens_no_connection(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.announce, "RING_EVERY_S", 0.25)
    client = connect_redis(redis_url)
    announcer = Announcer(client, Doorbell(redis_url))
    # The second one has to wait for its turn: both come before either has been sent.
    await asyncio.gather(*(announcer.announce([], NOW, due=True) for _ in range(2)))
    late = announcer._late_ring
    assert late is not None
    await client.aclose()
    await late
    assert not any(each.is_connected for each in client.connection_pool._available_connections)


async def test_a_bug_after_the_commit_does_not_write_the_group_again(
    tenant: Tenant, redis_url: str, logged: list[EventDict]
) -> None:
    faulty = Tenant(tenant.database, Announcer(Faulty(), Doorbell(redis_url)), tenant.workspace_id, tenant.agent_id)
    run_ids = await asyncio.gather(faulty.run(), faulty.run())
    async with tenant.database.read() as connection:
        written = set((await connection.execute(text("SELECT run_id FROM runs"))).scalars())
    assert written == set(run_ids)
    assert [(entry["log_level"], entry["event"]) for entry in logged] == [
        ("error", "announcement lost; the sweeper will find what is due")
    ]


async def test_an_announcer_whose_redis_is_away_says_that_nobody_is_heard(logged: list[EventDict]) -> None:
    client = connect_redis("redis://127.0.0.1:1")
    announcer = Announcer(client, Doorbell("redis://127.0.0.1:1"))
    heard = [announcer.is_unheard()]
    for _ in range(3):
        await announcer.announce([], NOW, due=True)
        heard.append(announcer.is_unheard())
    await client.aclose()
    assert heard == [False, True, True, True]
    assert [entry["event"] for entry in logged] == [
        "redis is away; going on without it", "announcement lost; the sweeper will find what is due"
    ]  # fmt: skip
