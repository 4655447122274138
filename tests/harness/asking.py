"""One request of a client of its own, for tests of what becomes of it."""

from __future__ import annotations

from harness.client import Client
from harness.connection import Exchange


async def ask(url: str, timeout_s: float = 5.0) -> Exchange:
    """Ask for something with a token, and return what became of it."""
    client = Client(url, timeout_s)
    try:
        return await client.exchange(client.wire("GET", "/x", "secret"))
    finally:
        await client.close()
