"""Pages of lists: newest first, bounded in rows and in bytes, with an opaque cursor; the same for every kind of row.

An id is of version 7, so its order is the order of creation.
"""

from __future__ import annotations

import base64
import binascii
import enum
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import TextClause, text

from service.api.sight import require_workspace
from service.db import Database
from service.errors import Invalid
from service.exchange import Answer, Exchange
from service.quota.inforce import Quotas

DEFAULT_PAGE, LARGEST_PAGE = 50, 200
"""Rows in one page of a list."""

MOST_PAGE_BYTES = 4 << 20
"""What callers wrote into the rows of one page, its first row apart: 200 of the largest runs would be 200 MiB."""


class Listing(NamedTuple):
    """One kind of row that is listed."""

    name: str  # of the list in the answer
    statuses: type[enum.StrEnum]
    narrowed_by: str  # an id in the query, besides the workspace's
    statement: TextClause  # from `page_of`


def page_of(table: str, alias: str, key: str, narrowed_by: str, view_json: str, heavy: Sequence[str]) -> TextClause:
    """Return the statement that reads a page; `view_json` shows a row `alias`, `heavy` are its unbounded columns.

    What a row weighs is looked at before its JSON is built: what is not given costs no more than that.
    """
    weight = " + ".join(f"coalesce(octet_length(CAST({alias}.{column} AS text)), 0)" for column in heavy)
    return text(f"""
        WITH page AS (
            SELECT {alias}.{key} AS id, {weight} AS bytes FROM {table} {alias}
            WHERE (CAST(:workspace_id AS uuid) IS NULL OR {alias}.workspace_id = :workspace_id)
              AND (CAST(:status AS text) IS NULL OR {alias}.status = :status)
              AND (CAST(:narrowed_by AS uuid) IS NULL OR {alias}.{narrowed_by} = :narrowed_by)
              AND (CAST(:before AS uuid) IS NULL OR {alias}.{key} < :before)
            ORDER BY {alias}.{key} DESC LIMIT :limit + 1
        ), weighed AS (
            SELECT id, row_number() OVER newest AS place, sum(bytes) OVER newest AS bytes
            FROM page WINDOW newest AS (ORDER BY id DESC)
        )
        SELECT {view_json}::text AS view, weighed.id, (SELECT count(*) FROM page) AS found
        FROM weighed JOIN {table} {alias} ON {alias}.{key} = weighed.id
        WHERE place = 1 OR (place <= :limit AND weighed.bytes <= :most_bytes)
        ORDER BY weighed.id DESC
    """)  # noqa: S608 - constants


class Lists:
    """Answers for pages."""

    def __init__(self, database: Database, quotas: Quotas) -> None:
        self._database = database
        self._quotas = quotas

    async def page(self, exchange: Exchange[None], listing: Listing) -> Answer[Any]:
        """Return the page that a query asks for; raises NotFound for the workspace, and Invalid."""
        query = exchange.query()
        workspace_id = query_id(query, "workspace_id") or exchange.caller.workspace_id
        status = query.get("status")
        with exchange.timed("db_ms"):
            if workspace_id is not None:
                await require_workspace(self._quotas, exchange.caller, workspace_id)
            if status is not None and status not in listing.statuses.__members__:
                raise Invalid("status", f"give one of {', '.join(listing.statuses)}")
            parameters = {
                "workspace_id": workspace_id,
                "status": status,
                "narrowed_by": query_id(query, listing.narrowed_by),
                "before": decode_cursor(query["cursor"]) if "cursor" in query else None,
                "limit": int(exchange.query_number("limit", DEFAULT_PAGE, 1, LARGEST_PAGE)),
                "most_bytes": MOST_PAGE_BYTES,
            }
            async with self._database.read() as connection:
                page = (await connection.execute(listing.statement, parameters)).all()
        more = bool(page) and page[0].found > len(page)
        cursor = msgspec.json.encode(encode_cursor(page[-1].id) if more else None).decode()
        views = ",".join(row.view for row in page)
        return Answer(f'{{"{listing.name}":[{views}],"next_cursor":{cursor}}}'.encode())


def query_id(query: dict[str, str], name: str) -> uuid.UUID | None:
    """Return an id from the query; raises Invalid naming it."""
    if name not in query:
        return None
    try:
        return uuid.UUID(query[name])
    except ValueError:
        raise Invalid(name, "give a UUID") from None


def encode_cursor(last_id: uuid.UUID) -> str:
    """Return the cursor of the page that follows this id."""
    return base64.urlsafe_b64encode(last_id.bytes).rstrip(b"=").decode()


def decode_cursor(cursor: str) -> uuid.UUID:
    """Return the id after which a page begins; raises Invalid."""
    try:
        return uuid.UUID(bytes=base64.urlsafe_b64decode(cursor + "=="))
    except (ValueError, binascii.Error):
        raise Invalid("cursor", "is not one that this service gave; start without it") from None
