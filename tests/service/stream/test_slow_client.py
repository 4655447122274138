"""A client that does not read is closed with 1013, and costs nobody else a frame."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from service.telemetry import SLOW_CLIENTS_EVICTED
from tests.service.stream.conftest import Tenant
from tests.sockets import Client, Writer, faults_of, open_socket

Evicted = Callable[[], Coroutine[Any, Any, None]]

FILLER = {"filler": "x" * 1000}


@pytest.fixture
def evicted() -> Evicted:
    """Return a function that waits until the service has evicted one more client than before the test."""
    before = SLOW_CLIENTS_EVICTED._value.get()

    async def wait() -> None:
        while SLOW_CLIENTS_EVICTED._value.get() == before:
            await asyncio.to_thread(lambda: None)  # lets the service's own thread have its turn

    return wait


async def read_to_the_end(client: Client) -> tuple[list[int], int]:
    """Let a stalled client read again; returns the numbers of the pushes before the close, and its code."""
    seen: list[int] = []
    client.connection.transport.resume_reading()
    try:
        while True:
            seen.append((await client.frame())["seq"])
    except ConnectionClosed as end:
        return seen, end.rcvd.code if end.rcvd else 0


async def test_a_client_that_stalls_is_evicted_and_the_others_see_every_event(
    tenant: Tenant, url: str, writer: Writer, evicted: Evicted
) -> None:
    run_id = await tenant.create()
    path = f"/ws/runs/{run_id}/"
    async with (
        open_socket(url, path, tenant.token) as stalled,
        open_socket(url, path, tenant.token) as first,
        open_socket(url, path, tenant.token) as second,
    ):
        stalled.connection.transport.pause_reading()
        reading = [asyncio.create_task(client.until_seq(5001)) for client in (first, second)]
        for _ in range(50):
            last = await writer.append(run_id, 100, payload=FILLER)
        assert [faults_of(await each, 1, last) for each in reading] == [[], []]
        await evicted()
        seen, code = await read_to_the_end(stalled)
        assert (code, faults_of(seen, 1, len(seen))) == (1013, [])
        assert len(seen) < last
        assert (await first.answer("ping"))["type"] == "ping_ack"
    async with open_socket(url, f"{path}?since_seq={len(seen)}", tenant.token) as again:
        assert faults_of(await again.until_seq(last), len(seen) + 1, last) == []


async def test_a_commit_larger_than_any_outbox_reaches_every_client_that_reads(
    tenant: Tenant, url: str, writer: Writer
) -> None:
    run_id = await tenant.create()
    async with (
        open_socket(url, f"/ws/runs/{run_id}/", tenant.token) as follower,
        open_socket(url, f"/ws/workspaces/{tenant.workspace_id}/", tenant.token) as watcher,
    ):
        assert [(await follower.frame())["seq"]] == [1]
        assert [(await watcher.frame())["event"] for _ in range(2)] == ["run_listed", "runs_listed"]
        last = await writer.append(run_id, 3000, payload=FILLER)
        followed, watched = await asyncio.gather(follower.until_seq(last), watcher.until_seq(last))
    assert (faults_of(followed, 2, last), faults_of(watched, 2, last)) == ([], [])


async def test_a_client_that_reads_more_slowly_than_events_come_is_evicted(
    tenant: Tenant, url: str, writer: Writer, evicted: Evicted
) -> None:
    run_id = await tenant.create()
    async with open_socket(url, f"/ws/runs/{run_id}/", tenant.token) as slow:
        gone = asyncio.create_task(evicted())
        seen: list[int] = []
        while not gone.done():
            last = await writer.append(run_id, 200, payload=FILLER)
            with suppress(ConnectionClosed):
                seen.append((await slow.frame())["seq"])
        more, code = await read_to_the_end(slow)
    assert (code, faults_of(seen + more, 1, len(seen + more))) == (1013, [])
    assert len(seen + more) < last


async def test_a_client_that_stalls_in_the_middle_of_its_replay_is_evicted_too(
    tenant: Tenant, url: str, writer: Writer, evicted: Evicted
) -> None:
    run_id = await tenant.create()
    last = await writer.append(run_id, 5000, payload=FILLER)
    async with open_socket(url, f"/ws/runs/{run_id}/", tenant.token) as stalled:
        stalled.connection.transport.pause_reading()
        async with open_socket(url, f"/ws/runs/{run_id}/", tenant.token) as other:
            assert faults_of(await other.until_seq(last), 1, last) == []
        await evicted()
        seen, code = await read_to_the_end(stalled)
    assert (code, faults_of(seen, 1, len(seen))) == (1013, [])
    assert len(seen) < last


async def test_a_client_that_asks_and_does_not_read_the_answers_is_evicted(
    tenant: Tenant, url: str, evicted: Evicted
) -> None:
    async with open_socket(url, f"/ws/workspaces/{tenant.workspace_id}/", tenant.token) as client:
        client.connection.transport.pause_reading()

        async def ask() -> None:
            while True:
                await client.send({"type": "cmd", "cmd": "ping", "filler": "x" * 60_000})

        asking = asyncio.create_task(ask())
        await evicted()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        client.connection.transport.resume_reading()
        assert (await client.closed())[0] == 1013
