"""Tickets for sockets: any caller may ask for one, to open one socket as itself."""

from __future__ import annotations

import msgspec

from service.api.answers import TicketView
from service.exchange import Answer, Exchange, answer_json
from service.tickets import TICKET_S, Tickets


class TicketBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /api/ws-tickets/: an empty object, or nothing."""


class TicketOffice:
    """The endpoint."""

    def __init__(self, tickets: Tickets) -> None:
        self._tickets = tickets

    async def issue(self, exchange: Exchange[TicketBody]) -> Answer[TicketView]:
        """Make a ticket that opens one socket with the caller's rights."""
        ticket = await self._tickets.issue(exchange.caller.token_id)
        return answer_json({"ticket": ticket, "expires_in_s": TICKET_S}, ((b"cache-control", b"no-store"),))
