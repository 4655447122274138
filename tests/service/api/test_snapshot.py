"""What pollers see: only what is new, only when it is new."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import redis.asyncio
from sqlalchemy import text

from service.announce import Announcer
from service.db import Database
from service.doorbell import Doorbell
from service.events import EventType, NewEvent


async def append_event(database: Database, redis_url: str, tenant: Any, run_id: str, *, publish: bool = True) -> None:
    """Append one event to a run as the engine does, and publish it after the commit."""
    async with database.begin() as connection:
        bumped = await connection.execute(
            text("UPDATE runs SET last_seq = last_seq + 1 WHERE run_id = :r RETURNING last_seq, now(), correlation_id"),
            {"r": run_id},
        )
        seq, now, correlation_id = bumped.one()
        await connection.execute(
            text("INSERT INTO events VALUES (:r, :seq, 'step_created', '{}', :c, now())"),
            {"r": run_id, "seq": seq, "c": correlation_id},
        )
    if publish:
        event = NewEvent(uuid.UUID(run_id), seq, EventType.STEP_CREATED, {}, correlation_id, tenant.workspace_id)
        async with redis.asyncio.from_url(redis_url) as client:
            await Announcer(client, Doorbell(redis_url)).announce([event], now, due=False)


async def test_since_seq_leaves_out_what_was_seen(tenant: Any, database: Database, redis_url: str) -> None:
    run_id = (await tenant.create())["run_id"]
    await append_event(database, redis_url, tenant, run_id)
    seen = [[e["seq"] for e in (await tenant.snapshot(run_id, since_seq=n))["events_since_seq"]] for n in (0, 1, 2, 9)]
    assert seen == [[1, 2], [2], [], []]


async def test_an_unchanged_snapshot_is_304_and_a_changed_one_is_not(
    tenant: Any, database: Database, redis_url: str
) -> None:
    run_id = (await tenant.create())["run_id"]
    path = f"/api/runs/{run_id}/snapshot/"
    first = await tenant.operator.get(path)
    etag = first.headers["etag"]
    for sent in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        again = await tenant.operator.get(path, headers={"if-none-match": sent})
        assert (again.status_code, again.content) == (304, b""), sent
    await append_event(database, redis_url, tenant, run_id)
    changed = await tenant.operator.get(path, headers={"if-none-match": etag})
    assert (changed.status_code, changed.json()["last_seq"]) == (200, 2)


async def test_a_childs_change_changes_the_parents_snapshot(tenant: Any, database: Database) -> None:
    parent = (await tenant.create())["run_id"]
    child = (await tenant.operator.post(f"/api/runs/{parent}/spawn_subrun/", json={})).json()["child_run_id"]
    path = f"/api/runs/{parent}/snapshot/"
    etag = (await tenant.operator.get(path)).headers["etag"]
    async with database.begin() as connection:
        await connection.execute(
            text("UPDATE runs SET status = 'RUNNING', last_seq = last_seq + 1 WHERE run_id = :r"), {"r": child}
        )
    changed = await tenant.operator.get(path, headers={"if-none-match": etag})
    assert (changed.status_code, changed.json()["child_runs"][0]["status"]) == (200, "RUNNING")


async def test_a_long_poll_returns_as_soon_as_an_event_is_published(
    tenant: Any, database: Database, redis_url: str
) -> None:
    run_id = (await tenant.create())["run_id"]
    polling = asyncio.create_task(tenant.snapshot(run_id, since_seq=1, wait=20))
    await asyncio.sleep(0)
    await append_event(database, redis_url, tenant, run_id)
    seen = await asyncio.wait_for(polling, timeout=10)
    assert [event["seq"] for event in seen["events_since_seq"]] == [2]


async def test_a_long_poll_finds_an_event_whose_publication_was_lost(
    tenant: Any, database: Database, redis_url: str
) -> None:
    run_id = (await tenant.create())["run_id"]
    polling = asyncio.create_task(tenant.snapshot(run_id, since_seq=1, wait=20))
    await asyncio.sleep(0)
    await append_event(database, redis_url, tenant, run_id, publish=False)
    assert (await asyncio.wait_for(polling, timeout=15))["last_seq"] == 2


async def test_a_long_poll_without_news_returns_the_unchanged_snapshot(tenant: Any) -> None:
    run_id = (await tenant.create())["run_id"]
    seen = await tenant.snapshot(run_id, since_seq=1, wait=0.05)
    assert (seen["events_since_seq"], seen["last_seq"]) == ([], 1)


async def test_a_long_poll_on_a_final_run_does_not_wait(tenant: Any) -> None:
    run_id = (await tenant.create())["run_id"]
    await tenant.operator.post(f"/api/runs/{run_id}/cancel/", json={})
    last_seq = (await tenant.snapshot(run_id))["last_seq"]
    seen = await asyncio.wait_for(tenant.snapshot(run_id, since_seq=last_seq, wait=30), timeout=10)
    assert seen["run"]["status"] == "CANCELED"


async def test_polls_above_the_rate_are_refused_with_the_time_to_wait(tenant: Any) -> None:
    run_id = (await tenant.create())["run_id"]
    path = f"/api/runs/{run_id}/snapshot/"
    answers = await asyncio.gather(*(tenant.operator.get(path) for _ in range(60)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert refused[0].json()["violated-policies"] == ["snapshot_poll"]
    assert int(refused[0].headers["retry-after"]) >= 1
    assert refused[0].headers["ratelimit-policy"] == '"snapshot_poll";q=19;w=2'
    assert json.loads(refused[0].content)["error"].startswith("Workspace quota exceeded for snapshot_poll ")
