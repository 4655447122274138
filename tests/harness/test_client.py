"""The client against a real socket: what it sends and reuses, what waits, and what cannot be reached."""

import asyncio
import socket

import pytest

from harness.client import Client
from harness.sample import Outcome
from harness.samplebuffer import UNKNOWN
from tests.harness.asking import ask
from tests.harness.fake_service import Asked, always, http, serving


async def test_a_request_carries_token_length_and_body() -> None:
    seen: list[Asked] = []

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        seen.append(asked)
        writer.write(http(200, {}))

    async with serving(answer) as url:
        client = Client(f"{url}/prefix/")
        await client.exchange(client.wire("POST", "/api/runs/", "secret", b'{"x":1}'))
        await client.close()
    host = url.removeprefix("http://")
    assert seen == [
        Asked(
            "POST",
            "/prefix/api/runs/",
            {
                "host": host,
                "authorization": "Bearer secret",
                "content-type": "application/json",
                "content-length": "7",
                "accept": "application/json",
                "user-agent": "plimsoll-harness",
            },
            b'{"x":1}',
            1,
        )
    ]


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_a_refused_connection_is_told_from_other_faults() -> None:
    port = unused_port()
    exchange = await ask(f"http://127.0.0.1:{port}")
    assert exchange.outcome is Outcome.REFUSED
    assert exchange.error == f"cannot connect to 127.0.0.1:{port}: Connection refused"
    assert (exchange.sent_at_ns, exchange.first_byte_at_ns, exchange.status) == (UNKNOWN, UNKNOWN, UNKNOWN)


async def test_a_host_without_an_address_is_a_connection_error() -> None:
    exchange = await ask("http://no-such-host.invalid")
    assert exchange.outcome is Outcome.CONNECTION_ERROR
    assert exchange.error is not None
    assert exchange.error.startswith("cannot connect to no-such-host.invalid: ")


async def test_patience_ends_each_request_on_its_own_and_the_late_answer_is_nobody_elses() -> None:
    late = asyncio.Event()

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        if asked.path == "/slow":
            await late.wait()
        writer.write(http(200, asked.path.encode()))

    async with serving(answer) as url:
        client = Client(url, timeout_s=0.1)
        slow = await client.exchange(client.wire("GET", "/slow"))
        late.set()
        quick = await client.exchange(client.wire("GET", "/quick"))
        await client.close()
    assert (slow.outcome, slow.error) == (Outcome.TIMEOUT, "no complete answer within 0.1 s")
    assert slow.done_at_ns - slow.sent_at_ns >= 0.05e9
    assert (quick.outcome, quick.body, quick.connection_id) == (Outcome.OK, b"/quick", 2)


async def test_connections_are_reused_one_after_another_and_opened_side_by_side() -> None:
    gate = asyncio.Barrier(3)

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        if asked.path == "/together":
            await gate.wait()
        writer.write(http(200, {}))

    async with serving(answer) as url:
        client = Client(url)
        alone = [(await client.exchange(client.wire("GET", "/"))).connection_id for _ in range(3)]
        together = await asyncio.gather(*(client.exchange(client.wire("GET", "/together")) for _ in range(3)))
        await client.close()
    assert alone == [1, 1, 1]
    assert sorted(exchange.connection_id for exchange in together) == [1, 2, 3]


@pytest.mark.parametrize("announced", [True, False])
async def test_a_connection_that_the_server_closed_between_requests_is_replaced_unseen(announced: bool) -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(http(200, {}, *(["Connection: close"] if announced else [])))
        await writer.drain()
        writer.close()

    async with serving(answer) as url:
        client = Client(url)
        first = await client.exchange(client.wire("GET", "/"))
        connection = client._idle[0] if client._idle else None
        if connection is not None:
            closed = asyncio.get_running_loop().create_future()
            connection.connection_lost = lambda exc: closed.set_result(None)  # type: ignore[method-assign]
            await closed  # the end of file has come in
        second = await client.exchange(client.wire("GET", "/"))
        await client.close()
    assert (first.outcome, second.outcome) == (Outcome.OK, Outcome.OK)
    assert (first.connection_id, second.connection_id) == (1, 2)


async def test_closing_the_client_concludes_what_is_under_way() -> None:
    asked_for = asyncio.Event()

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        asked_for.set()
        await asyncio.Event().wait()

    async with serving(answer) as url:
        client = Client(url)
        waiting = asyncio.create_task(client.exchange(client.wire("GET", "/")))
        await asked_for.wait()
        await client.close()
        exchange = await waiting
    assert (exchange.outcome, exchange.error) == (Outcome.CONNECTION_ERROR, "the harness closed the connection")


async def test_answered_requests_are_not_kept() -> None:
    async with serving(always(http(200, {}))) as url:
        client = Client(url)
        for _ in range(20):
            await client.exchange(client.wire("GET", "/"))
        assert len(client._waiting) == 1
        await client.close()
