"""The guarded client on a real Redis that hangs, ends, and comes back."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from structlog.typing import EventDict

from service.breaker import State
from service.embedded.place import find_place
from service.embedded.redis import Redis
from service.guarded import LATE_S, Away, Guard, Guarded, connect_redis
from service.telemetry import REDIS_AWAY

PATIENCE_S = 0.1


@pytest.fixture
def server() -> Iterator[Redis]:
    """A Redis of the test's own, to be stopped and started."""
    with tempfile.TemporaryDirectory(prefix="plimsoll-guarded-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        started = Redis(find_place(folder))
        started.start()
        started.wait_until_ready()
        yield started
        signal_to(started, signal.SIGCONT)
        started.stop()


@pytest.fixture
async def client(server: Redis) -> AsyncIterator[Guarded]:
    """A client that is quick to give up and quick to look again."""
    opened = connect_redis(server.url)
    assert isinstance(opened, Guarded)
    opened.guard = Guard(opened.guard._ping, PATIENCE_S)
    opened.guard.breaker._first_pause_s = 0.0
    opened.guard.breaker._longest_pause_s = 0.0
    yield opened
    await opened.aclose()


def signal_to(server: Redis, signum: signal.Signals) -> None:
    """Send a signal to a server that is still ours."""
    assert server.process is not None
    if server.process.poll() is None:
        os.kill(server.process.pid, signum)


async def _get_by_pipeline(client: Guarded) -> None:
    async with client.pipeline(transaction=False) as pipe:
        pipe.get("x")
        await pipe.execute()


def open_connections(client: Guarded) -> list[AbstractConnection]:
    """Return the connections of a client's pool that are still open."""
    pool = client.connection_pool
    return [each for each in (*pool._available_connections, *pool._in_use_connections) if each.is_connected]


async def until_back(client: Guarded) -> int:
    """Return how many calls were turned away until Redis was asked again; the test's own timeout bounds it."""
    turned_away = 0
    while True:
        try:
            await client.get("x")
        except Away:
            turned_away += 1
            await asyncio.sleep(0.01)
        else:
            return turned_away


async def test_a_redis_that_hangs_is_waited_for_once_and_found_again(
    server: Redis, client: Guarded, logged: list[EventDict]
) -> None:
    await client.set("x", "before")
    signal_to(server, signal.SIGSTOP)

    with pytest.raises(RedisTimeoutError, match=r"no answer within 0\.1 s"):
        await client.get("x")
    for _ in range(3):
        with pytest.raises(Away):
            await client.get("x")
    with pytest.raises(Away):
        await _get_by_pipeline(client)
    assert REDIS_AWAY._value.get() == 1

    signal_to(server, signal.SIGCONT)
    assert await until_back(client) > 0
    assert await client.get("x") == b"before"  # and not the answer to a call that was given up
    assert REDIS_AWAY._value.get() == 0
    assert [entry["event"] for entry in logged if entry["log_level"] != "debug"] == [
        "redis is away; going on without it", "redis answers again"
    ]  # fmt: skip


async def test_calls_under_way_when_it_begins_to_hang_wait_side_by_side(server: Redis, client: Guarded) -> None:
    await asyncio.gather(*(client.get("x") for _ in range(8)))
    signal_to(server, signal.SIGSTOP)
    outcomes = await asyncio.gather(*(client.get("x") for _ in range(8)), return_exceptions=True)
    assert [type(each) for each in outcomes] == [RedisTimeoutError] * 8


async def test_a_redis_that_ends_and_is_started_again_is_found_again(server: Redis, client: Guarded) -> None:
    await client.set("x", "before")
    server.stop()
    with pytest.raises(RedisConnectionError):
        await client.get("x")
    with pytest.raises(Away):
        await client.get("x")
    server.start()
    server.wait_until_ready()
    await until_back(client)
    assert await client.get("x") is None


async def test_an_idle_process_finds_a_redis_again_that_nobody_asks(
    server: Redis, client: Guarded, logged: list[EventDict]
) -> None:
    client.guard._look_every_s = 0.01
    server.stop()
    with pytest.raises(RedisConnectionError):
        await client.get("x")
    assert REDIS_AWAY._value.get() == 1
    server.start()
    server.wait_until_ready()

    while client.guard._probe is None or not client.guard.breaker.admits:  # noqa: ASYNC110 - it makes no call to wait on
        await asyncio.sleep(0.01)

    assert REDIS_AWAY._value.get() == 0
    assert "redis answers again" in [entry["event"] for entry in logged]


async def test_connections_that_died_with_a_restart_are_no_outage(server: Redis, client: Guarded) -> None:
    await asyncio.gather(*(client.get("x") for _ in range(8)))
    server.stop()
    server.start()
    server.wait_until_ready()
    assert await asyncio.gather(*(client.get("x") for _ in range(8))) == [None] * 8
    assert client.guard.breaker.state is State.CLOSED


async def test_a_process_that_stood_still_itself_looks_for_the_answer_before_it_blames_redis() -> None:
    async def ping() -> None:
        raise AssertionError("nobody has to look for Redis")

    async def call() -> str:
        time.sleep(PATIENCE_S + 2 * LATE_S)  # noqa: ASYNC251 - the fault that is meant
        for _ in range(10):  # the answer is there, and takes some turns of the loop to be read
            await asyncio.sleep(0)
        return "answer"

    guard = Guard(ping, PATIENCE_S)
    assert await guard.run(call) == "answer"
    assert guard.breaker.admits


async def test_an_error_that_redis_answers_with_is_no_outage(client: Guarded) -> None:
    with pytest.raises(ResponseError):
        await client.execute_command("NO SUCH COMMAND")
    assert client.guard.breaker.admits


async def test_a_client_closed_while_redis_is_away_leaves_no_alarm_and_no_probe(server: Redis, client: Guarded) -> None:
    signal_to(server, signal.SIGSTOP)
    for _ in range(2):
        with pytest.raises((RedisTimeoutError, Away)):
            await client.get("x")
    assert (client.guard.breaker.state, REDIS_AWAY._value.get()) == (State.PROBING, 1)
    await client.aclose()
    assert REDIS_AWAY._value.get() == 0


async def test_a_client_that_closes_waits_for_the_call_under_way_and_opens_no_connection_again(client: Guarded) -> None:
    asked = asyncio.ensure_future(client.set("x", "said"))
    await asyncio.sleep(0)  # the call is about to connect
    await client.aclose()
    with pytest.raises(Away, match="closed"):
        await client.get("x")
    assert (asked.done(), await asked, open_connections(client)) == (True, True, [])
