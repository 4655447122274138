"""The client against a real socket: what it stamps, what it reuses, and how it names each fault."""

import asyncio
import math
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.client import Client, Exchange, parse_server_timing
from harness.sample import Outcome
from harness.samplebuffer import UNKNOWN
from tests.harness.fake_service import TIMING, Answer, Asked, always, http, reset, serving

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


async def ask(url: str, timeout_s: float = 5.0) -> Exchange:
    client = Client(url, timeout_s)
    try:
        return await client.exchange(client.wire("GET", "/x", "secret"))
    finally:
        await client.close()


async def test_an_answer_is_stamped_in_order_and_read_whole() -> None:
    reply = http(200, {"a": 1})
    async with serving(always(reply)) as url:
        before_ns = time.monotonic_ns()
        exchange = await ask(url)
    assert before_ns <= exchange.sent_at_ns <= exchange.first_byte_at_ns <= exchange.done_at_ns <= time.monotonic_ns()
    assert (exchange.outcome, exchange.status, exchange.error) == (Outcome.OK, 200, None)
    assert (exchange.body, exchange.response_bytes, exchange.connection_id) == (b'{"a": 1}', len(reply), 1)
    assert parse_server_timing(exchange.server_timing) == (2.5, 1.5, 3.5, 9.0)


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


@pytest.mark.parametrize(
    ("pieces", "body"),
    [
        # chunked, cut within the size, the data and the end
        ((CHUNKED, b"5", b"\r\nhel", b"lo\r\n3\r\nyou\r\n0", b"\r\n\r\n"), b"helloyou"),
        # the head arrives byte by byte
        (tuple(bytes([byte]) for byte in http(200, b"slow")), b"slow"),
        # an informational answer comes first
        ((b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", http(200, b"late")), b"late"),
        # no body at all
        ((b"HTTP/1.1 204 No Content\r\n\r\n",), b""),
        ((b'HTTP/1.1 304 Not Modified\r\nETag: "1"\r\n\r\n',), b""),
    ],
)  # fmt: skip
async def test_an_answer_in_any_framing_is_ok(pieces: tuple[bytes, ...], body: bytes) -> None:
    async with serving(always(*pieces)) as url:
        client = Client(url)
        first = await client.exchange(client.wire("GET", "/"))
        second = await client.exchange(client.wire("GET", "/"))
        await client.close()
    assert (first.outcome, first.body) == (Outcome.OK, body)
    assert (second.outcome, second.body, second.connection_id) == (Outcome.OK, body, 1)


async def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.0 200 OK\r\n\r\nall of it")
        writer.close()

    async with serving(answer) as url:
        exchange = await ask(url)
    assert (exchange.outcome, exchange.body) == (Outcome.OK, b"all of it")


@pytest.mark.parametrize("status", [301, 400, 401, 404, 409, 422, 429, 500, 503])
async def test_any_other_status_is_an_http_error_with_its_body(status: int) -> None:
    async with serving(always(http(status, {"error": "no"}, "Retry-After: 7"))) as url:
        exchange = await ask(url)
    assert (exchange.outcome, exchange.status, exchange.body) == (Outcome.HTTP_ERROR, status, b'{"error": "no"}')
    assert exchange.retry_after_s == 7.0


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


async def ends(asked: Asked, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def resets(asked: Asked, writer: asyncio.StreamWriter) -> None:
    reset(writer)


async def ends_within(asked: Asked, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
    await writer.drain()
    writer.close()


@pytest.mark.parametrize(
    ("answer", "status", "error"),
    [
        (ends, UNKNOWN, "connection closed before an answer (end of file)"),
        (resets, UNKNOWN, "connection closed before an answer (Connection reset by peer)"),
        (ends_within, 200, "connection closed within the answer (end of file)"),
        (always(b"SSH-2.0-OpenSSH\r\n"), UNKNOWN, "unreadable answer: "),
        (always(http(200, b"") + http(200, b"again")), 200, "unreadable answer: more than one for one request"),
    ],
)
async def test_a_broken_answer_is_a_connection_error_that_says_how(answer: Answer, status: int, error: str) -> None:
    async with serving(answer) as url:
        exchange = await ask(url)
    assert exchange.outcome is Outcome.CONNECTION_ERROR
    assert exchange.error is not None
    assert exchange.error.startswith(error)
    assert exchange.status == status


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


async def test_an_idle_connection_is_not_used_when_it_is_too_old_or_its_peer_has_left() -> None:
    async with serving(always(http(200, {}))) as url:
        client = Client(url)
        await client.exchange(client.wire("GET", "/"))
        connection = client._idle[0]
        now = connection.idle_since
        assert connection.usable(now)
        assert connection.usable(now + 3.9)
        assert not connection.usable(now + 4.1)
        await client.close()
        assert not connection.usable(now)


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


@pytest.mark.parametrize(
    ("header", "read"),
    [
        (TIMING, (2.5, 1.5, 3.5, 9.0)),  # everything is told; auth has no column
        ("", (math.nan,) * 4),  # nothing is told
        ("db;desc=sql;dur=4", (4.0, math.nan, math.nan, math.nan)),  # another parameter comes first
        ('db;dur="4"', (4.0, math.nan, math.nan, math.nan)),  # quoted, as the W3C grammar allows
        ("cache, db;dur=x, app;dur=1", (math.nan, math.nan, math.nan, 1.0)),  # no duration; no number
    ],
)
def test_server_timing_is_read_as_milliseconds(header: str, read: tuple[float, ...]) -> None:
    assert parse_server_timing(header.encode()) == pytest.approx(read, nan_ok=True)


@given(st.binary(max_size=200))
def test_no_server_timing_header_is_too_strange_to_read(header: bytes) -> None:
    assert len(parse_server_timing(header)) == 4
