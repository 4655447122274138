"""One connection against a real socket: what it stamps, how it reads an answer, and how it names each fault."""

import asyncio
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.client import Client
from harness.connection import parse_server_timing
from harness.sample import Outcome
from harness.samplebuffer import UNKNOWN
from tests.harness.asking import ask
from tests.harness.fake_service import TIMING, Answer, Asked, always, http, reset, serving

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


async def test_an_answer_is_stamped_in_order_and_read_whole() -> None:
    reply = http(200, {"a": 1})
    async with serving(always(reply)) as url:
        before_ns = time.monotonic_ns()
        exchange = await ask(url)
    assert before_ns <= exchange.sent_at_ns <= exchange.first_byte_at_ns <= exchange.done_at_ns <= time.monotonic_ns()
    assert (exchange.outcome, exchange.status, exchange.error) == (Outcome.OK, 200, None)
    assert (exchange.body, exchange.response_bytes, exchange.connection_id) == (b'{"a": 1}', len(reply), 1)
    assert parse_server_timing(exchange.server_timing) == (2.5, 1.5, 3.5, 9.0)


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
