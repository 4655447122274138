"""The stream of a run: replayed, then followed; nothing missing, nothing twice, whatever Redis does."""

from __future__ import annotations

import asyncio
import datetime as dt
import random
import uuid
from typing import Any

import pytest
import redis.asyncio
from sqlalchemy import text

from service.announce import Announcer
from service.db import Database
from service.doorbell import Doorbell
from service.events import EventType, NewEvent, channel
from service.stream.history import PAGE
from tests.sockets import Writer, cut_subscriptions, faults_of, open_socket


async def test_what_happened_is_replayed_and_what_happens_is_pushed(tenant: Any, url: str, writer: Writer) -> None:
    run_id = await tenant.create()
    await writer.append(run_id, payload={"step_index": 1, "kind": "PLAN"})
    async with open_socket(url, f"/ws/runs/{run_id}/", tenant.token) as client:
        created, step = await client.frames(2)
        await writer.append(run_id, payload={"step_index": 2, "kind": "PLAN"})
        live = await client.frame()
    snapshot = (await tenant.http.get(f"/api/runs/{run_id}/snapshot/")).json()
    assert [created, step, live] == [
        {
            "type": "push",
            "topic": "run.event",
            "event": event["event_type"],
            "data": event["payload"],
            "seq": event["seq"],
            "run_id": run_id,
            "workspace_id": str(tenant.workspace_id),
            "ts": event["created_at"],
        }
        for event in snapshot["events_since_seq"]
    ]


@pytest.mark.parametrize("path", ["/ws/runs/{run_id}/?since_seq=2", "/ws/runs/{run_id}?since_seq=2"])
async def test_what_the_client_has_is_left_out(tenant: Any, url: str, writer: Writer, path: str) -> None:
    run_id = await tenant.create()
    await writer.append(run_id, 3)
    async with open_socket(url, path.format(run_id=run_id), tenant.token) as client:
        assert await client.until_seq(4) == [3, 4]


async def test_a_long_history_is_replayed_page_by_page(tenant: Any, url: str, writer: Writer) -> None:
    run_id = await tenant.create()
    last = await writer.append(run_id, 2 * PAGE + 7)
    async with open_socket(url, f"/ws/runs/{run_id}/", tenant.token) as client:
        assert await client.until_seq(last) == list(range(1, last + 1))


async def test_clients_that_come_while_writers_write_see_each_event_once(tenant: Any, url: str, writer: Writer) -> None:
    run_id = await tenant.create()
    last = 1 + 4 * 50 * 2

    async def write() -> None:
        for _ in range(50):
            await writer.append(run_id, 2)

    async def follow(since_seq: int) -> list[str]:
        async with open_socket(url, f"/ws/runs/{run_id}/?since_seq={since_seq}", tenant.token) as client:
            return faults_of(await client.until_seq(last), since_seq + 1, last)

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(write())
        following = [group.create_task(follow(since_seq)) for since_seq in (0, 0, 1, 1, 0)]
    assert [task.result() for task in following] == [[]] * 5


async def test_a_client_that_reconnects_with_its_last_seq_misses_nothing_and_sees_nothing_twice(
    tenant: Any, url: str, writer: Writer
) -> None:
    run_id = await tenant.create()
    seen: list[int] = []
    last, chance = 301, random.Random(7)  # noqa: S311 - a test's own dice

    async def write() -> None:
        for _ in range(100):
            await writer.append(run_id, 3)

    writing = asyncio.create_task(write())
    while not seen or seen[-1] < last:
        since_seq = seen[-1] if seen else 0
        async with open_socket(url, f"/ws/runs/{run_id}/?since_seq={since_seq}", tenant.token) as client:
            for _ in range(chance.randint(1, 20)):
                seen.append((await client.frame())["seq"])
                if seen[-1] == last:
                    break
            if chance.random() < 0.5:
                client.connection.transport.abort()
    await writing
    assert faults_of(seen, 1, last) == []


async def test_an_event_whose_publication_was_lost_is_found_in_the_database(
    tenant: Any, url: str, writer: Writer
) -> None:
    run_id = await tenant.create()
    async with open_socket(url, f"/ws/runs/{run_id}/?since_seq=1", tenant.token) as client:
        await writer.append(run_id, publish=False)
        assert (await client.frame())["seq"] == 2


async def test_a_gap_in_what_redis_brought_is_filled_in_order(tenant: Any, url: str, writer: Writer) -> None:
    run_id = await tenant.create()
    async with open_socket(url, f"/ws/runs/{run_id}/", tenant.token) as client:
        assert (await client.frame())["seq"] == 1
        await writer.append(run_id, 5, publish=False)
        await writer.append(run_id)
        assert await client.until_seq(7) == [2, 3, 4, 5, 6, 7]


async def test_what_redis_repeats_or_garbles_is_not_pushed(
    tenant: Any, url: str, writer: Writer, redis_url: str
) -> None:
    run_id = await tenant.create()
    async with (
        open_socket(url, f"/ws/runs/{run_id}/", tenant.token) as client,
        redis.asyncio.from_url(redis_url) as other,
    ):
        assert (await client.frame())["seq"] == 1
        found = await client.answer("request_snapshot")
        event = found["data"]["events_since_seq"][0]
        again = NewEvent(
            uuid.UUID(run_id), 1, EventType.RUN_CREATED, {}, uuid.UUID(event["correlation_id"]), tenant.workspace_id
        )
        created_at = dt.datetime.fromisoformat(event["created_at"])
        await Announcer(other, Doorbell(redis_url)).announce([again, again], created_at, due=False)
        await other.publish(channel(tenant.workspace_id), b"no message of ours")
        await writer.append(run_id)
        assert (await client.frame())["seq"] == 2


async def test_a_cut_subscription_is_made_anew_and_its_gap_filled(
    tenant: Any, url: str, writer: Writer, redis_url: str
) -> None:
    run_id = await tenant.create()
    seen: list[int] = []
    async with (
        open_socket(url, f"/ws/runs/{run_id}/", tenant.token) as client,
        redis.asyncio.from_url(redis_url) as other,
    ):
        for _ in range(5):
            await cut_subscriptions(other)
            last = await writer.append(run_id, 2)
            seen += await client.until_seq(last)
    assert faults_of(seen, 1, last) == []


async def test_events_in_an_archive_only_close_the_socket_with_4410_and_say_where(
    tenant: Any, url: str, writer: Writer, database: Database
) -> None:
    run_id = await tenant.create()
    await writer.append(run_id, 5)
    async with (
        open_socket(url, f"/ws/runs/{run_id}/", tenant.token) as there_before,
        open_socket(url, f"/ws/workspaces/{tenant.workspace_id}/", tenant.token) as watcher,
    ):
        assert await there_before.until_seq(6) == [1, 2, 3, 4, 5, 6]
        assert [(await watcher.frame())["event"] for _ in range(2)] == ["run_listed", "runs_listed"]
        await compact(database, run_id, [2, 3, 6])
        for since_seq in (0, 1, 5):
            async with open_socket(url, f"/ws/runs/{run_id}/?since_seq={since_seq}", tenant.token) as client:
                assert await client.closed() == (
                    4410,
                    f"events up to 6 are archived: /api/runs/{run_id}/archives/",
                )
        async with open_socket(url, f"/ws/runs/{run_id}/?since_seq=6", tenant.token) as client:
            last = await writer.append(run_id)
            assert [await each.until_seq(last) for each in (client, there_before, watcher)] == [[7]] * 3


async def compact(database: Database, run_id: str, seqs: list[int]) -> None:
    """Delete events as a compaction does."""
    async with database.begin() as connection:
        parameters = {"run_id": run_id, "seqs": seqs, "through": max(seqs)}
        await connection.execute(text("DELETE FROM events WHERE run_id = :run_id AND seq = ANY(:seqs)"), parameters)
        await connection.execute(
            text("UPDATE runs SET compacted_through_seq = :through WHERE run_id = :run_id"), parameters
        )


async def test_a_compaction_that_overtakes_a_workspaces_stream_is_passed_over(
    tenant: Any, url: str, writer: Writer, database: Database
) -> None:
    run_id = await tenant.create()
    async with open_socket(url, f"/ws/workspaces/{tenant.workspace_id}/", tenant.token) as watcher:
        assert [(await watcher.frame())["event"] for _ in range(2)] == ["run_listed", "runs_listed"]
        async with database.begin() as connection:
            await connection.execute(
                text("UPDATE runs SET last_seq = 4, compacted_through_seq = 4 WHERE run_id = :r"), {"r": run_id}
            )
        last = await writer.append(run_id)
        pushed = await watcher.frame()
    assert (pushed["seq"], pushed["data"]["last_seq"]) == (last, last)


async def test_a_client_ahead_of_the_run_hears_nothing_until_the_run_is_ahead(
    tenant: Any, url: str, writer: Writer
) -> None:
    run_id = await tenant.create()
    async with open_socket(url, f"/ws/runs/{run_id}/?since_seq=3", tenant.token) as client:
        assert (await client.answer("ping"))["type"] == "ping_ack"
        for _ in range(3):
            await writer.append(run_id)
        assert (await client.frame())["seq"] == 4
