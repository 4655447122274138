"""Pages of lists: newest first, with an opaque cursor. An id is of version 7, so its order is the order of creation."""

from __future__ import annotations

import base64
import binascii
import uuid

from service.errors import Invalid

DEFAULT_PAGE, LARGEST_PAGE = 50, 200
"""Rows in one page of a list."""


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
