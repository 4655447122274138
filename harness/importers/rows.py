"""One imported request as a `Sample`: which endpoint it asked for, what became of it, which instants are known.

The axis of the instants is the tool's own wall clock in nanoseconds since 1970, taken as if it never stepped: it is the
only clock that the file has. `latency_ms` stays null, because no tool here records when a request was *due*.
Next: the module of each tool.
"""

from __future__ import annotations

import dataclasses
import functools
import re

from harness.connection import ERROR_CHARS_MAX
from harness.sample import Endpoint, Mode, Outcome, Sample

SCENARIO = "imported"  # where the tool names none

_REFUSED = re.compile(
    r"connection refused|connectionrefused|econnrefused|actively refused|httphostconnect", re.IGNORECASE
)
_TIMEOUT = re.compile(r"time[d ]?-?\s?out|deadline exceeded", re.IGNORECASE)

_SECRETS = (
    (re.compile(r"(?<=\?)[^\s\"'<>]+"), "…"),  # the query of an address
    (re.compile(r"(?<=://)[^\s/@\"']+@"), "…@"),  # its user and password
    (re.compile(r"(?i)\b(bearer|basic|token)(\s+|=|:\s*)[^\s\"',;]+"), r"\1 …"),
    (re.compile(r"\bplim_[\w-]+"), "plim_…"),
)

_PATH = re.compile(r"(?:https?://[^/?#]*)?([^?#]*)", re.IGNORECASE)
_RUN = r"/api/runs/([^/]+)/"
_ROUTES = (
    ("POST", re.compile(r".*/api/runs/"), Endpoint.CREATE),
    ("POST", re.compile(rf".*{_RUN}spawn_subrun/"), Endpoint.SPAWN),
    ("GET", re.compile(rf".*{_RUN}snapshot/"), Endpoint.SNAPSHOT),
    ("POST", re.compile(rf".*{_RUN}cancel/"), Endpoint.CANCEL),
)
_NAMED = {endpoint.value: endpoint for endpoint in Endpoint}
_RUN_ID = re.compile(r"[A-Za-z0-9_.~-]{8,100}")  # a placeholder such as "[id]", "{run}" or ":id" is none


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """What a request asked for."""

    endpoint: Endpoint
    run_id: str | None  # the agent run in its path, where it names one


@functools.lru_cache(maxsize=4096)
def target_of(method: str | None, *addresses: str | None) -> Target:
    """Return which endpoint of ours a request asked for, by the first of its addresses or names that tells.

    Without a method, an address of ours is taken for the request that load tests make of it. A name such as "spawn"
    tells as well; whatever is none of ours is OTHER.
    """
    for text in addresses:
        if not text:
            continue
        verb, _, rest = text.strip().partition(" ")
        known, address = (verb.upper(), rest.strip()) if verb.isupper() and rest else (method, text.strip())
        found = _PATH.match(address)
        path = (found[1] if found else address).rstrip("/") + "/"
        for wanted, route, endpoint in _ROUTES:
            hit = route.fullmatch(path)
            if hit and (known is None or not known or known.upper() == wanted):
                run_id = hit[1] if route.groups and _RUN_ID.fullmatch(hit[1]) else None
                return Target(endpoint, run_id)
        if address.lower() in _NAMED:
            return Target(_NAMED[address.lower()], None)
    return Target(Endpoint.OTHER, None)


def outcome_of(status: int | None, fault: str, *, accepted: bool) -> Outcome:
    """Return what became of a request, as `sample.Outcome` defines it.

    `status` is null where no answer came. `fault` is the tool's error text, `accepted` its own judgement: an answer
    that it rejected is an error whatever its status, and an answer with a bad status is one whatever it thought.
    """
    if status is not None:
        return Outcome.OK if accepted and (200 <= status <= 299 or status == 304) else Outcome.HTTP_ERROR
    if accepted:
        return Outcome.OK
    return unanswered(fault)


def unanswered(fault: str) -> Outcome:
    """Return what an error text says of a request that got no whole answer."""
    if _REFUSED.search(fault):
        return Outcome.REFUSED
    return Outcome.TIMEOUT if _TIMEOUT.search(fault) else Outcome.CONNECTION_ERROR


def one_line(text: str | None) -> str | None:
    """Return an error as one line without secrets: no query, password or token; null when there is nothing in it."""
    if not text:
        return None
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return " ".join(text.split())[:ERROR_CHARS_MAX] or None


def request_row(
    *,
    ordinal: int,  # from 1, in the file
    target: Target,
    scenario: str | None,
    service_ns: int | None,
    outcome: Outcome,
    status: int | None,
    error: str | None,
    sent_at_ns: int | None = None,
    first_byte_at_ns: int | None = None,
    done_at_ns: int | None = None,
    intended_at_ns: int | None = None,
    response_bytes: int | None = None,
    run_key: str | None = None,
) -> Sample:
    """Return one imported request. Its run is that of its address, or itself where none is named."""
    return Sample(
        run_key=run_key or target.run_id or f"row-{ordinal}",
        scenario=scenario or SCENARIO,
        endpoint=target.endpoint,
        mode=Mode.IMPORT,
        level=None,
        trial=0,
        worker=0,
        intended_at_ns=intended_at_ns,
        sent_at_ns=sent_at_ns,
        first_byte_at_ns=first_byte_at_ns,
        done_at_ns=done_at_ns,
        latency_ms=None,
        service_ms=None if service_ns is None else service_ns / 1e6,
        status=status,
        outcome=outcome,
        error=one_line(error),
        server_db_ms=None,
        server_quota_ms=None,
        server_publish_ms=None,
        server_app_ms=None,
        response_bytes=response_bytes,
        connection_id=None,
    )


def not_sent_row(ordinal: int, endpoint: Endpoint, scenario: str | None, due_at_ns: int, why: str) -> Sample:
    """Return an arrival that the tool says it dropped: due, and never put on the wire."""
    return request_row(
        ordinal=ordinal, target=Target(endpoint, None), scenario=scenario, service_ns=None, outcome=Outcome.NOT_SENT,
        status=None, error=why, intended_at_ns=due_at_ns,
    )  # fmt: skip
