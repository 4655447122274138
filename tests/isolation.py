"""What one tenant may be told of another, by the contract, for each route of the table; and what an answer says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import httpx

from service.app import create_app
from service.auth import Role
from service.settings import Settings
from tests.neighbours import Caller
from tests.surface import Entry, Filling, Place, State, entries, streams

NOWHERE = create_app(Settings("postgresql://nowhere/none", "redis://nowhere"))
"""The application, never started: for its route table."""

ENTRIES, STREAMS = entries(NOWHERE), streams(NOWHERE)

Told: TypeAlias = tuple[int, list[tuple[str, str]], str]
"""All that an answer says: status, header fields, body."""


def expected(entry: Entry, caller: Caller, filling: Filling) -> int:
    """Return the status that a request must get, by the contract."""
    if entry.operation.role is not None and caller.role is None:
        return 401
    if not caller.may(entry):
        return 403
    states = dict(zip(entry.places, filling, strict=True))
    about = {place: state for place, state in states.items() if not place.is_filter}
    unseen = {State.ABSENT, State.MALFORMED} | (set() if caller.is_installation else {State.FOREIGN})
    if unseen & set(about.values()):
        return 404
    if len({state is State.FOREIGN for state in about.values()}) > 1:  # an agent of one tenant, a run for the other
        return 404
    if State.GUARDED in about.values() and caller.role is not None and caller.role < Role.ADMIN:
        return 403
    return 200


def masked(answer: httpx.Response, ids: Mapping[Place, str]) -> Told:
    """Return all that an answer says, apart from the ids that were asked for, the date and durations."""
    headers = sorted((name, value) for name, value in answer.headers.items() if name not in ("date", "server-timing"))
    body = answer.text
    for id_ in ids.values():
        body = body.replace(id_, "ID")
        headers = [(name, value.replace(id_, "ID")) for name, value in headers]
    return answer.status_code, headers, body


def leaks(answer: httpx.Response, marks: set[str], ids: Mapping[Place, str]) -> list[str]:
    """Return what of the neighbour's stands in an answer, apart from the ids that were sent."""
    said = answer.text + repr(answer.headers.multi_items())
    return [mark for mark in marks - set(ids.values()) if mark in said]
