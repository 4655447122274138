"""Who is calling: tokens, roles and the caller.

A token is 256 random bits, shown once. The database keeps its SHA-256 only: with that much randomness there is nothing
to guess, so a slow or keyed hash would add cost and no safety. The first characters are kept to name a token in lists.

Each process remembers a token it has met for one second, so a revocation or an expiry is in force everywhere within
that second.
"""

from __future__ import annotations

import datetime as dt
import enum
import hashlib
import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sqlalchemy import ForeignKey, LargeBinary, insert, or_, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import Mapped, mapped_column

from service.db import Base, Database
from service.errors import Invalid, NotFound, RoleTooLow, Unauthenticated
from service.grouping import Grouping
from service.runs import Instant, new_id
from service.workspaces import Workspace

REMEMBERED_S = 1.0
"""How long a process trusts what it read of a token, seconds."""

TOKEN_PREFIX = "plim_"  # noqa: S105 - what every token begins with, so that scanners find a leaked one
NAMED_BY = len(TOKEN_PREFIX) + 8
"""How many leading characters of a token are kept in clear to name it."""


LONGEST_HEADER = 256
"""Longest Authorization header that is looked at, bytes; ours have 55."""


class Role(enum.IntEnum):
    """What a token may do in its workspace; each role may do what the lower ones may."""

    VIEWER = 1  # read
    OPERATOR = 2  # create, spawn, control, approve
    ADMIN = 3  # approve what is dangerous; with an installation token: make workspaces, agents, tokens, tools
    OWNER = 4  # no more than ADMIN as yet; kept apart for who answers for the workspace


class Token(Base, kw_only=True):
    """A token, as far as the service knows it."""

    __tablename__ = "tokens"

    token_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    prefix: Mapped[str] = mapped_column(index=True)
    """The token's first characters, to name it by."""
    token_hash: Mapped[bytes] = mapped_column(LargeBinary, unique=True)
    """SHA-256 of the whole token."""
    workspace_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("workspaces.workspace_id"), default=None)
    """Null for an installation token, which may act in every workspace."""
    role: Mapped[str]
    """A Role's name."""
    created_at: Mapped[dt.datetime] = mapped_column(Instant)
    expires_at: Mapped[dt.datetime | None] = mapped_column(Instant, default=None)
    revoked_at: Mapped[dt.datetime | None] = mapped_column(Instant, default=None)


class IssuedToken(NamedTuple):
    """A new token: the only moment at which it is known in clear."""

    token: str
    role: Role
    expires_at: dt.datetime | None


class Caller(NamedTuple):
    """Who sends a request."""

    token_id: uuid.UUID
    workspace_id: uuid.UUID | None  # null: an installation token
    role: Role
    expires_at: dt.datetime | None

    def require(self, role: Role) -> None:
        """Raise RoleTooLow unless the caller has at least this role."""
        if self.role < role:
            raise RoleTooLow(f"this needs the role {role.name}; the token's role is {self.role.name}")

    def require_installation(self) -> None:
        """Raise RoleTooLow unless the token is an installation token."""
        if self.workspace_id is not None:
            raise RoleTooLow("this needs an installation token; the token belongs to one workspace")

    def may_see(self, workspace_id: uuid.UUID) -> bool:
        """Tell whether the workspace is the caller's."""
        return self.workspace_id is None or self.workspace_id == workspace_id


def parse_role(name: str) -> Role:
    """Return the role of that name; raises Invalid."""
    try:
        return Role[name]
    except KeyError:
        names = ", ".join(role.name for role in reversed(Role))
        raise Invalid("role", f"give one of {names}, not {name!r}") from None


async def issue_token(
    connection: AsyncConnection, workspace_id: uuid.UUID | None, role: str, expires_days: float | None = None
) -> IssuedToken:
    """Make a token for a workspace, or an installation token when `workspace_id` is None.

    Raises Invalid naming the field and NotFound for the workspace.
    """
    known = parse_role(role)
    now = dt.datetime.now(dt.UTC)
    expires_at = None
    if expires_days is not None:
        if not 0 < expires_days <= 3650:
            raise Invalid("expires_days", "give a number of days above 0, at most 3650")
        expires_at = now + dt.timedelta(days=expires_days)
    if workspace_id is not None:
        found = await connection.execute(select(Workspace.name).where(Workspace.workspace_id == workspace_id))
        if found.first() is None:
            raise NotFound("no such workspace")
    token = TOKEN_PREFIX + secrets.token_urlsafe(32)
    await connection.execute(
        insert(Token).values(
            token_id=new_id(),
            prefix=token[:NAMED_BY],
            token_hash=hash_token(token),
            workspace_id=workspace_id,
            role=known.name,
            created_at=now,
            expires_at=expires_at,
        )
    )
    return IssuedToken(token, known, expires_at)


async def revoke_token(connection: AsyncConnection, token_or_prefix: str) -> bool:
    """Revoke a token named in full or by its first characters; False when none matches.

    Raises Invalid when a prefix names several.
    """
    names_it = or_(Token.token_hash == hash_token(token_or_prefix), Token.prefix == token_or_prefix)
    found = (await connection.execute(select(Token.token_id).where(names_it, Token.revoked_at.is_(None)))).all()
    if len(found) > 1:
        raise Invalid("token", "several tokens begin like this: give the whole token")
    if not found:
        return False
    await connection.execute(
        update(Token).where(Token.token_id == found[0].token_id).values(revoked_at=dt.datetime.now(dt.UTC))
    )
    return True


async def is_known(connection: AsyncConnection, token: str) -> bool:
    """Tell whether a token was ever made here, revoked and expired ones included."""
    found = await connection.execute(select(Token.token_id).where(Token.token_hash == hash_token(token)))
    return found.first() is not None


def hash_token(token: str) -> bytes:
    """Return what the database keeps of a token."""
    return hashlib.sha256(token.encode()).digest()


READ_TOKENS = text("""
    SELECT token_hash, token_id, workspace_id, role, expires_at FROM tokens
    WHERE token_hash = ANY(:digests) AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > :now)
""")


class Callers:
    """Turns an Authorization header into a Caller, remembering each for a second."""

    MOST = 10_000
    """How many headers are remembered at most."""

    def __init__(
        self,
        database: Database,
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
    ) -> None:
        self._database = database
        self._monotonic = monotonic
        self._now = now
        self._known: dict[bytes, tuple[float, Caller]] = {}
        # One lane: when a busy token is due to be read again, all its requests wait for one answer.
        self._grouping: Grouping[bytes, Caller] = Grouping(self._read)
        self._by_id: dict[uuid.UUID, tuple[float, Caller]] = {}

    def remembered(self, header: bytes) -> Caller | None:
        """Return the caller if this very header was checked within the last second, and has not expired since."""
        entry = self._known.get(header)
        if entry is None or self._monotonic() >= entry[0]:
            return None
        caller = entry[1]
        return None if caller.expires_at is not None and caller.expires_at <= self._now() else caller

    async def identify(self, header: bytes) -> Caller:
        """Return the caller of `Authorization: Bearer <token>`; raises Unauthenticated without saying why."""
        if len(header) > LONGEST_HEADER:  # never one of ours, and must not be remembered
            raise Unauthenticated("the token is unknown, expired or revoked")
        scheme, _, token = header.partition(b" ")
        if scheme.lower() != b"bearer" or not token.strip():
            raise Unauthenticated("send `Authorization: Bearer <token>`")
        asked_at = self._monotonic()
        caller = await self._grouping.submit(hashlib.sha256(token.strip()).digest())
        if len(self._known) >= self.MOST:
            self._known.clear()
        self._known[header] = asked_at + REMEMBERED_S, caller
        return caller

    async def _read(self, digests: Sequence[bytes]) -> Sequence[Caller | Exception]:
        async with self._database.read() as connection:
            found = await connection.execute(READ_TOKENS, {"digests": list(set(digests)), "now": self._now()})
            callers = {
                row.token_hash: Caller(row.token_id, row.workspace_id, Role[row.role], row.expires_at) for row in found
            }
        return [callers.get(each) or Unauthenticated("the token is unknown, expired or revoked") for each in digests]

    async def again(self, token_id: uuid.UUID) -> Caller:
        """Return who bears the token of that id, as of the last second; raises Unauthenticated."""
        until, caller = self._by_id.get(token_id, (0.0, None))
        asked_at = self._monotonic()
        if caller is None or asked_at >= until:
            caller = await self._read_again(token_id)
            if caller is not None:
                if len(self._by_id) >= self.MOST:
                    self._by_id.clear()
                self._by_id[token_id] = asked_at + REMEMBERED_S, caller
        if caller is None or (caller.expires_at is not None and caller.expires_at <= self._now()):
            self._by_id.pop(token_id, None)
            raise Unauthenticated("the token is expired or revoked")
        return caller

    async def _read_again(self, token_id: uuid.UUID) -> Caller | None:
        """Return the bearer of a token that is in force, if there is one."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(Token.token_id, Token.workspace_id, Token.role, Token.expires_at).where(
                    Token.token_id == token_id,
                    Token.revoked_at.is_(None),
                    or_(Token.expires_at.is_(None), Token.expires_at > self._now()),
                )
            )
            row = found.first()
        return None if row is None else Caller(row.token_id, row.workspace_id, Role[row.role], row.expires_at)
