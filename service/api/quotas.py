"""Quotas: what a workspace may use and does use; the history of revisions."""

from __future__ import annotations

from service.api.paging import DEFAULT_PAGE, LARGEST_PAGE
from service.db import Database
from service.errors import NotFound
from service.exchange import Answer, Exchange, answer_json
from service.quota.history import RevisionPage, RevisionView, revision_views
from service.quota.inforce import Quotas
from service.quota.revisions import find, newest
from service.quota.usage import Usage, WorkspaceQuotas

MOST_REVISION = 2**31 - 1
"""Largest number that the column can hold; a path or a query with a larger one would be an error of PostgreSQL."""


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
