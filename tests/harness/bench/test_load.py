"""The closed-loop generator, as the process it is, against a small server that answers as a test tells it."""

from __future__ import annotations

import asyncio
from collections import Counter
from urllib.parse import urlsplit

import numpy as np
import pytest

from harness.bench.load import Load, LoadFailed, Measured, run_load
from tests.harness.fake_service import Answer, always, http, serving


def lowercase(status: int, body: bytes) -> bytes:
    """An answer whose length is announced as ASGI servers do."""
    return http(status, body).replace(b"Content-Length", b"content-length")


async def load(answer: Answer, seconds: float = 10.0, most: int | None = 20, status: int = 200) -> Measured:
    async with serving(answer) as url:
        parts = urlsplit(url)
        wanted = Load(
            host=parts.hostname or "",
            port=parts.port or 0,
            connections=4,
            seconds=seconds,
            requests=[b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /b HTTP/1.1\r\nHost: x\r\n\r\n"],
            most=most,
            status=status,
            keep_bodies=True,
        )
        return await asyncio.to_thread(run_load, "a test", wanted)


async def test_every_request_is_sent_in_turn_and_its_latency_kept() -> None:
    paths: Counter[str] = Counter()

    async def answer(asked, writer):  # type: ignore[no-untyped-def]
        paths[asked.path] += 1
        writer.write(lowercase(200, asked.path.encode()))

    measured = await load(answer)
    assert paths == {"/a": 10, "/b": 10}
    assert Counter(measured.bodies) == {b"/a": 10, b"/b": 10}
    latencies_ns = np.frombuffer(measured.latencies_ns, np.int64)
    assert len(latencies_ns) == 20
    assert 0 < latencies_ns.min() <= latencies_ns.max() <= measured.seconds * 1e9


async def test_an_answer_in_pieces_is_one_answer() -> None:
    whole = lowercase(200, b"0123456789")

    async def answer(asked, writer):  # type: ignore[no-untyped-def]
        for piece in (whole[:7], whole[7:-3], whole[-3:]):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)

    assert (await load(answer)).bodies == [b"0123456789"] * 20


async def test_it_ends_with_the_time_when_nothing_else_ends_it() -> None:
    measured = await load(always(lowercase(200, b"x")), seconds=0.2, most=None)
    assert len(measured.latencies_ns) > 0


async def test_a_304_has_no_body() -> None:
    assert (await load(always(b"HTTP/1.1 304 Not Modified\r\netag: x\r\n\r\n"), status=304)).bodies == [b""] * 20


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (lowercase(429, b'{"error": "too fast"}'), 'a test: answered 429 Whatever {"error": "too fast"}'),
        (lowercase(304, b""), "a test: answered 304 Whatever"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "a test: an answer without a content-length"),
        (lowercase(200, b"x") + b"y", "a test: an answer that is longer than it says"),
    ],
    ids=["a refusal", "a 304 that nobody asked for", "no length", "too much"],
)
async def test_the_first_wrong_answer_ends_it_in_one_line(answer: bytes, fault: str) -> None:
    with pytest.raises(LoadFailed) as caught:
        await load(always(answer))
    assert str(caught.value) == fault


async def test_a_server_that_leaves_ends_it() -> None:
    async def answer(asked, writer):  # type: ignore[no-untyped-def]
        writer.close()

    with pytest.raises(LoadFailed, match="a test: closed a connection"):
        await load(answer)
