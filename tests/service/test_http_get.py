"""The tool http_get against a real socket: what it returns, what it refuses."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from service.http_get import MAX_BODY_BYTES, GetRefused, _text, get
from tests.localserver import serving


async def hello(request: Request) -> Response:
    return PlainTextResponse("hello")


async def away(request: Request) -> Response:
    return RedirectResponse("http://169.254.169.254/latest/")


async def large(request: Request) -> Response:
    return PlainTextResponse("x" * (MAX_BODY_BYTES + 1))


async def strange(request: Request) -> Response:
    return Response(b"\xff\x00", media_type="text/plain; charset=martian")


@pytest.mark.parametrize(
    "charset", ["undefined", "idna", "punycode", "unicode_escape", "hex", "utf\0-8", "martian", ""]
)
def test_a_character_set_that_no_page_has_is_taken_for_utf_8(charset: str) -> None:
    assert _text(b"a-\\x\xff\xc3\xa4", charset) == "a-\\x\ufffd\xe4"


@pytest.mark.parametrize("charset", ["latin-1", "ISO-8859-15", "windows-1252", "cp1250"])
def test_a_character_set_that_pages_have_is_used(charset: str) -> None:
    assert _text(b"\xe4", charset) == "\xe4"


@pytest.fixture
async def url() -> AsyncIterator[str]:
    """A server with a page of each kind."""
    pages = {"/hello": hello, "/away": away, "/large": large, "/strange": strange}
    async with serving(Starlette(routes=[Route(path, page) for path, page in pages.items()])) as base_url:
        yield base_url


async def test_an_allowed_page_is_fetched(url: str) -> None:
    assert await get(f"{url}/hello", [urlsplit(url).netloc]) == {
        "status": 200,
        "content_type": "text/plain; charset=utf-8",
        "location": None,
        "body": "hello",
        "truncated": False,
    }


async def test_a_redirect_is_told_and_not_followed(url: str) -> None:
    answer = await get(f"{url}/away", [urlsplit(url).netloc])
    assert (answer["status"], answer["location"]) == (307, "http://169.254.169.254/latest/")


async def test_of_a_large_page_the_beginning_is_read(url: str) -> None:
    answer = await get(f"{url}/large", [urlsplit(url).netloc])
    assert (len(answer["body"]), answer["truncated"]) == (MAX_BODY_BYTES, True)


async def test_an_unknown_character_set_is_taken_for_utf_8(url: str) -> None:
    assert (await get(f"{url}/strange", [urlsplit(url).netloc]))["body"] == "\ufffd\x00"


async def test_a_host_that_is_not_listed_is_never_asked(url: str) -> None:
    with pytest.raises(GetRefused, match="PLIMSOLL_HTTP_GET_ALLOW"):
        await get(f"{url}/hello", ["example.org"])


async def test_a_proxy_of_the_environment_is_not_used(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    assert (await get(f"{url}/hello", [urlsplit(url).netloc]))["body"] == "hello"


async def test_nobody_listening_is_told_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(GetRefused, match="the request failed: ConnectError"):
        await get(f"http://127.0.0.1:{port}/", [f"127.0.0.1:{port}"])
