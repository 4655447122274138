"""The tool `http_get`: one GET of an allowed host, with bounds, and nothing besides.

What it refuses: a host or port that the allow-list does not name exactly, another scheme than http and https, a URL
with a user in it, redirects (they are told, never followed), and more than `MAX_BODY_BYTES` of body. The environment's
proxies are not used: they would be a host that the list does not name.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any

import httpx

from service.allowlist import may_connect

MAX_BODY_BYTES = 64 * 1024
"""How much of a body is read: 64 KiB."""

CHARSETS = (
    "utf-8",
    "utf-16",
    "utf-32",
    "ascii",
    "iso8859",
    "cp",
    "koi8",
    "mac",
    "big5",
    "gb",
    "hz",
    "euc",
    "shift_jis",
    "iso2022",
)
"""What codecs of character sets begin with. Others transform, and some (`undefined`, `idna`) raise what they like."""

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5.0, 30.0
"""Longest wait for a connection and between two reads; the tool call's own timeout bounds the whole."""


class GetRefused(Exception):
    """The URL is not fetched, or could not be; the message says why."""


async def get(url: str, allow: Iterable[str]) -> dict[str, Any]:
    """Fetch a URL and return its status, type and the beginning of its body; raises GetRefused."""
    if not may_connect(url, allow):
        raise GetRefused("the URL's host is not on the installation's list for http_get (PLIMSOLL_HTTP_GET_ALLOW)")
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    try:
        async with (
            httpx.AsyncClient(timeout=timeout, follow_redirects=False, trust_env=False) as client,
            client.stream("GET", url, headers={"accept-encoding": "identity"}) as response,
        ):
            body, truncated = await _read(response)
            return {
                "status": response.status_code,
                "content_type": response.headers.get("content-type"),
                "location": response.headers.get("location"),
                "body": _text(body, response.charset_encoding),
                "truncated": truncated,
            }
    except httpx.HTTPError as fault:
        raise GetRefused(f"the request failed: {type(fault).__name__}") from None


def _text(body: bytes, charset: str | None) -> str:
    """Decode a body; what cannot be decoded is replaced, and a character set that no page has is taken for UTF-8."""
    try:
        name = codecs.lookup(charset or "utf-8").name
    except (LookupError, ValueError):
        name = ""
    return body.decode(name if name.startswith(CHARSETS) else "utf-8", "replace")


async def _read(response: httpx.Response) -> tuple[bytes, bool]:
    """Return the first MAX_BODY_BYTES of a body as it came over the wire, and whether there was more."""
    body = b""
    async for part in response.aiter_raw():
        body += part
        if len(body) > MAX_BODY_BYTES:
            return body[:MAX_BODY_BYTES], True
    return body, False
