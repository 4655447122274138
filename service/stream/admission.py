"""Who may open a socket, and on what: origin, token or ticket, run or workspace. Each refusal is a close code.

A socket is accepted before it is refused: a client never sees the close code of a socket that was not (it would see the
handshake fail with HTTP 403, whatever the reason).
"""

from __future__ import annotations

import enum
import uuid
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import urlsplit

from starlette.websockets import WebSocket

from service.auth import Caller, Callers, Role
from service.db import is_outage
from service.errors import ApiError, Invalid, NotFound, QuotaExceeded, Unauthenticated, Unavailable
from service.quota.inforce import Quotas
from service.tickets import Tickets

MOST_SEQ = 2**31 - 1


class Code(enum.IntEnum):
    """Why the service closes a socket. 1009 is sent by the server below."""

    FAULT = 1011  # a bug of ours, which is logged
    RESTART = 1012  # the process is told to stop
    TOO_SLOW = 1013  # the client does not take what it is sent
    BAD_REQUEST = 4400  # the address is wrong: a parameter that means nothing
    NO_TOKEN = 4401  # no token or ticket, or none that is in force (any more)
    FORBIDDEN = 4403  # not a member of the workspace, or a page of a foreign origin
    NOT_FOUND = 4404  # no such run, or another workspace's
    COMPACTED = 4410  # what the client has not seen is in an archive only
    TOO_MANY = 4429  # a cap on open sockets
    UNAVAILABLE = 4503  # a dependency is away; try again


class Refused(Exception):
    """A socket is to be closed; the reason is for a person, at most 123 bytes."""

    def __init__(self, code: Code, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


def refusal_of(fault: Exception, absent: Code = Code.NOT_FOUND) -> Refused | None:
    """Return the refusal that an error means, or None for a bug; `absent` is the code for NotFound."""
    if isinstance(fault, Refused):
        return fault
    if isinstance(fault, ApiError):
        codes: dict[type[ApiError], Code] = {
            Unauthenticated: Code.NO_TOKEN,
            NotFound: absent,
            Invalid: Code.BAD_REQUEST,
            QuotaExceeded: Code.TOO_MANY,
            Unavailable: Code.UNAVAILABLE,
        }
        return Refused(codes[type(fault)], fault.detail)
    return Refused(Code.UNAVAILABLE, "a dependency does not answer; try again") if is_outage(fault) else None


class Place(NamedTuple):
    """What a socket follows."""

    workspace_id: uuid.UUID
    run_id: uuid.UUID | None = None  # null: the workspace
    since_seq: int = 0


class Admission:
    """Checks those who open sockets, for one process."""

    def __init__(self, callers: Callers, tickets: Tickets, quotas: Quotas, allowed_origins: Iterable[str]) -> None:
        self._callers = callers
        self._tickets = tickets
        self._quotas = quotas
        self._allowed_origins = frozenset(allowed_origins)

    async def caller(self, websocket: WebSocket) -> Caller:
        """Return who opens a socket; raises Refused, Unauthenticated or Unavailable."""
        origin, host = websocket.headers.get("origin"), websocket.headers.get("host", "")
        if origin is not None and not may_open(origin, host, self._allowed_origins):
            raise Refused(Code.FORBIDDEN, "pages of this origin may not open sockets here")
        header = websocket.headers.get("authorization")
        if header is not None:
            name = header.encode("latin-1")
            caller = self._callers.remembered(name) or await self._callers.identify(name)
        elif "ticket" in websocket.query_params:
            caller = await self._callers.again(await self._tickets.redeem(websocket.query_params["ticket"]))
        else:
            raise Unauthenticated("send an Authorization header, or a ticket from POST /api/ws-tickets/")
        caller.require(Role.VIEWER)
        return caller

    async def workspace(self, websocket: WebSocket, caller: Caller) -> Place:
        """Return the workspace that the address names; raises NotFound when there is none for this caller."""
        workspace_id = path_id(websocket, "workspace_id")
        if not caller.may_see(workspace_id):
            raise NotFound("no such workspace")
        await self._quotas.of(workspace_id)
        return Place(workspace_id)


def path_id(websocket: WebSocket, name: str) -> uuid.UUID:
    """Return an id from the path; one that is no UUID is as absent as any other unknown id."""
    try:
        return uuid.UUID(websocket.path_params[name])
    except ValueError:
        raise NotFound(f"no such {name.removesuffix('_id')}") from None


def since_seq(websocket: WebSocket) -> int:
    """Return the last event that the client has; raises Invalid."""
    text = websocket.query_params.get("since_seq", "0")
    if not (text.isascii() and text.isdigit() and len(text) <= 10) or int(text) > MOST_SEQ:
        raise Invalid("since_seq", f"give a whole number from 0 to {MOST_SEQ}")
    return int(text)


DEFAULT_PORTS = {"http": 80, "https": 443}


def may_open(origin: str, host: str, allowed: frozenset[str]) -> bool:
    """Tell whether a page may open sockets: it is one of ours (same host and port), or its origin is on the list.

    A proxy may have ended TLS before the service, so the scheme is not compared and a default port may be left out.
    """
    if origin.lower() in allowed:
        return True
    try:
        page = urlsplit(origin)
        asked = urlsplit(f"{page.scheme}://{host}")
        default = DEFAULT_PORTS[page.scheme]
        return bool(page.hostname) and (page.hostname, page.port or default) == (asked.hostname, asked.port or default)
    except (KeyError, ValueError):  # `null`, or something that is no origin
        return False
