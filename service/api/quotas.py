"""Quotas: what a workspace may use and does use; the history of revisions.

Everybody with a token may read which values are and were in force. Who decided, why, on which machine, and what a
shadow counted over all workspaces is the installation's business: such fields are null for the token of a workspace.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from service.api.paging import DEFAULT_PAGE, LARGEST_PAGE
from service.auth import Caller
from service.db import Database
from service.errors import NotFound
from service.exchange import Answer, Exchange, answer_json
from service.quota.inforce import Quotas
from service.quota.revisions import Happened, Revision, State, changes, find, newest
from service.quota.shadow import ShadowCount, shadow_counts
from service.quota.tables import Provenance, Tables
from service.quota.usage import Usage, WorkspaceQuotas

MOST_REVISION = 2**31 - 1
"""Largest number that the column can hold; a path or a query with a larger one would be an error of PostgreSQL."""


class RevisionView(msgspec.Struct, frozen=True):
    """A revision with its history."""

    revision: int
    state: State
    limits: Tables
    provenance: Provenance  # of which a workspace's token sees neither author nor note nor machine
    proposed_at: dt.datetime
    changes: list[Happened]  # oldest first
    shadow: list[ShadowCount] | None  # what it would have refused while it was the shadow, by limit


class RevisionPage(msgspec.Struct, frozen=True):
    """Revisions, newest first."""

    revisions: list[RevisionView]
    next_before: int | None  # `before` of the page that follows; null on the last one


class QuotaPages:
    """The endpoints on quotas."""

    def __init__(self, database: Database, quotas: Quotas, usage: Usage) -> None:
        self._database = database
        self._quotas = quotas
        self._usage = usage

    async def workspace(self, exchange: Exchange[None]) -> Answer[WorkspaceQuotas]:
        """Return each limit of a workspace with its value, what is used and left, and who holds the caps."""
        workspace_id = exchange.path_id("workspace_id", "workspace")
        if not exchange.caller.may_see(workspace_id):
            raise NotFound("no such workspace")
        with exchange.timed("db_ms"):
            use = await self._usage.of(workspace_id, await self._quotas.of(workspace_id))
        return answer_json(use)

    async def list(self, exchange: Exchange[None]) -> Answer[RevisionPage]:
        """Return a page of quota revisions, newest first, with where the next one begins."""
        limit = int(exchange.query_number("limit", DEFAULT_PAGE, 1, LARGEST_PAGE))
        before = int(exchange.query_number("before", MOST_REVISION, 1, MOST_REVISION))
        with exchange.timed("db_ms"):
            async with self._database.read() as connection:
                found = await newest(connection, limit + 1, before)
                views = await revision_views(connection, found[:limit], exchange.caller)
        return answer_json(RevisionPage(views, views[-1].revision if len(found) > limit else None))

    async def revision(self, exchange: Exchange[None]) -> Answer[RevisionView]:
        """Return one quota revision: its values, where they come from, and what happened to it."""
        named = exchange.scope["path_params"]["revision"]
        if not (named.isascii() and named.isdigit() and len(named) <= 10) or int(named) > MOST_REVISION:
            raise NotFound("no such quota revision")
        with exchange.timed("db_ms"):
            async with self._database.read() as connection:
                try:
                    found = await find(connection, int(named))
                except NotFound:
                    raise NotFound("no such quota revision") from None
                (view,) = await revision_views(connection, [found], exchange.caller)
        return answer_json(view)


async def revision_views(
    connection: AsyncConnection, found: Sequence[Revision], caller: Caller | None
) -> list[RevisionView]:
    """Return revisions with their history as a caller may see them; without a caller, as the installation does."""
    in_full = caller is None or caller.workspace_id is None
    numbers = [each.revision for each in found]
    happened = await changes(connection, numbers)
    counted = await shadow_counts(connection, numbers) if in_full else {}
    return [
        RevisionView(
            each.revision,
            each.state,
            each.limits,
            each.provenance if in_full else _for_tenants(each.provenance),
            each.proposed_at,
            [one if in_full else _without_names(one) for one in happened[each.revision]],
            counted[each.revision] if in_full else None,
        )
        for each in found
    ]


def _without_names(happened: Happened) -> Happened:
    return msgspec.structs.replace(happened, by=None, reason=None, findings=None)


def _for_tenants(provenance: Provenance) -> Provenance:
    return msgspec.structs.replace(provenance, author=None, note=None, machine={})
