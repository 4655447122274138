"""Tickets: how a browser, which cannot send an Authorization header with a WebSocket, says who opens it.

A page that holds a token asks for a ticket over HTTP and puts it into the socket's address. Addresses end up in logs
and histories; so a ticket opens one socket, within `TICKET_S`, and is worth nothing afterwards. It names the token by
its id, so it can do no more than the token at the moment of use. Redis keeps the ticket's SHA-256 only.
"""

from __future__ import annotations

import hashlib
import secrets
import uuid
from collections.abc import Sequence
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError

from service.errors import Unauthenticated, Unavailable
from service.grouping import Grouping

TICKET_S = 30
"""How long a ticket waits for its use, seconds."""


class Tickets:
    """Issues tickets and takes them back, once."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._client = client
        # A thousand clients that come at once are a few round trips, and need no thousand connections.
        self._calls: Grouping[tuple[str | int, ...], Any] = Grouping(self._call, lanes=2)

    async def issue(self, token_id: uuid.UUID) -> str:
        """Return a new ticket for the bearer of a token; raises Unavailable while Redis is away."""
        ticket = secrets.token_urlsafe(32)
        try:
            await self._calls.submit(("SET", _key(ticket), token_id.hex, "EX", TICKET_S))
        except (RedisError, OSError) as fault:
            raise Unavailable("tickets cannot be issued while Redis does not answer") from fault
        return ticket

    async def redeem(self, ticket: str) -> uuid.UUID:
        """Return the token's id and void the ticket, in one step; raises Unauthenticated, or Unavailable."""
        try:
            found = await self._calls.submit(("GETDEL", _key(ticket)))
        except (RedisError, OSError) as fault:
            raise Unavailable("tickets cannot be checked while Redis does not answer") from fault
        if found is None:
            raise Unauthenticated("the ticket is unknown, used or expired")
        return uuid.UUID(hex=found.decode() if isinstance(found, bytes) else found)

    async def _call(self, calls: Sequence[tuple[str | int, ...]]) -> Sequence[Any]:
        async with self._client.pipeline(transaction=False) as pipe:
            for call in calls:
                pipe.execute_command(*call)
            answers: list[Any] = await pipe.execute()
        return answers


def _key(ticket: str) -> str:
    return f"plimsoll:ticket:{hashlib.sha256(ticket.encode()).hexdigest()}"
