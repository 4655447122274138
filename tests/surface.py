"""Every request that the interface takes, made from its route table, with every id that a caller can put into it.

Nothing here names a route: paths, bodies and roles come from the table, query parameters from the API's description.
What the table holds and these lists do not raises `Unknown`: whoever adds a route, a parameter or a field says here
what it is, and every test that goes through the surface covers it from then on.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

import msgspec.inspect
from starlette.applications import Starlette
from starlette.routing import Route, WebSocketRoute

from service.api.openapi import describe
from service.exchange import Operation


class Unknown(Exception):
    """The interface has something that this module was not told about."""


class Kind(enum.Enum):
    """What an id names."""

    RUN = "run"
    WORKSPACE = "workspace"
    AGENT = "agent"
    TOOL_CALL = "tool call"
    ARCHIVE = "archive"


KINDS = {
    "run_id": Kind.RUN,
    "parent_run_id": Kind.RUN,
    "cursor": Kind.RUN,  # holds the id after which a page begins
    "workspace_id": Kind.WORKSPACE,
    "agent_id": Kind.AGENT,
    "tool_call_id": Kind.TOOL_CALL,
    "archive_id": Kind.ARCHIVE,
}
"""What an id of this name names, wherever it stands in a request."""

QUERY: Mapping[str, str] = {"status": "PENDING", "limit": "200", "since_seq": "0", "wait": "0", "before": "2"}
"""A harmless value of each query parameter that is no id."""


SHARED: Mapping[str, str] = {"revision": "1"}
"""What stands in a path and names something that belongs to no tenant: a quota revision is the installation's."""


def _fresh_name() -> str:
    return f"name-{uuid.uuid4().hex[:12]}"


BODY: Mapping[tuple[str, str], Callable[[], Any]] = {
    ("CreateBody", "input_text"): lambda: "hello",
    ("CreateBody", "channel"): lambda: "test",
    ("CreateBody", "metadata"): lambda: {"a": 1},
    ("CreateBody", "expected_subruns"): lambda: 0,
    ("CreateBody", "max_wait_seconds"): lambda: 60,
    ("SpawnBody", "input_text"): lambda: "hello",
    ("SpawnOptions", "join_policy"): lambda: "WAIT_ALL",
    ("SpawnOptions", "quorum"): lambda: None,
    ("SpawnOptions", "timeout_seconds"): lambda: 60,
    ("SpawnOptions", "failure_policy"): lambda: "FAIL_FAST",
    ("SpawnOptions", "group_id"): lambda: "group",  # a name inside its run
    ("SpawnOptions", "metadata"): dict,
    ("ReasonBody", "reason"): lambda: "as asked",
    ("ToolBody", "name"): _fresh_name,
    ("ToolBody", "tool"): lambda: "echo",
    ("ToolBody", "risk"): lambda: "SAFE",
    ("ToolBody", "schema"): lambda: {"type": "object"},
    ("ToolBody", "needs_approval"): lambda: False,
    ("ToolBody", "timeout_seconds"): lambda: 1,
    ("WorkspaceBody", "name"): _fresh_name,
    ("WorkspaceBody", "quota_class"): lambda: "calibration",
    ("WorkspacePatch", "quota_class"): lambda: "calibration",
    ("AgentBody", "name"): _fresh_name,
    ("AgentBody", "script"): lambda: [{"kind": "OBSERVATION"}],
    ("AgentBody", "model"): lambda: None,
    ("AgentBody", "max_steps"): lambda: 5,
    ("AgentBody", "max_tool_calls"): lambda: 5,
    ("TokenBody", "role"): lambda: "VIEWER",
    ("TokenBody", "expires_days"): lambda: 1,
}
"""A harmless value of each field of a body that is no id."""

HEADERS = frozenset({b"authorization", b"idempotency-key", b"if-none-match"})
"""Every header field that an endpoint reads; what the last two may tell has tests of its own."""


class State(enum.Enum):
    """Whose object an id names."""

    LEFT_OUT = "left out"
    OWN = "own"
    GUARDED = "own, and dangerous"  # a tool call that only an ADMIN may decide on
    FOREIGN = "foreign"
    ABSENT = "absent"  # well-formed, and nobody's
    MALFORMED = "malformed"  # no UUID, and as long as one


class Place(NamedTuple):
    """Somewhere in a request where an id stands."""

    where: str  # path, query or body
    name: str

    @property
    def kind(self) -> Kind:
        """What the id names."""
        try:
            return KINDS[self.name]
        except KeyError:
            raise Unknown(f"{self.name} in the {self.where}: say in tests/surface.py what it names") from None

    @property
    def is_filter(self) -> bool:
        """Whether the id narrows a list, instead of saying what the request is about."""
        return self.where == "query" and self.kind is not Kind.WORKSPACE

    @property
    def states(self) -> Iterable[State]:
        """What the id may be."""
        states = [State.OWN, State.FOREIGN, State.ABSENT]
        if self.where == "query":
            states.append(State.LEFT_OUT)
        if self.where == "path":
            states.append(State.MALFORMED)
            if self.kind is Kind.TOOL_CALL:
                states.append(State.GUARDED)
        return states


Filling = tuple[State, ...]
"""A state for each place of an entry."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One operation of the table, and where ids stand in its requests."""

    method: str
    path: str
    operation: Operation
    places: tuple[Place, ...]
    query_names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def fillings(self) -> list[Filling]:
        """Every combination of states."""
        return list(product(*(place.states for place in self.places)))

    @property
    def is_read(self) -> bool:
        """Whether the operation changes nothing."""
        return self.method == "GET"

    def request(self, ids: Mapping[Place, str]) -> dict[str, Any]:
        """Return the request with these ids, as arguments for an HTTP client."""
        path = self.path.format_map({**SHARED, **{p.name: id_ for p, id_ in ids.items() if p.where == "path"}})
        params = {name: QUERY[name] for name in self.query_names if name in QUERY}
        for place, id_ in ids.items():
            if place.where == "query":
                params[place.name] = cursor_of(id_) if place.name == "cursor" else id_
        request: dict[str, Any] = {"method": self.method, "url": path, "params": params}
        if self.operation.body_type is not None:
            request["json"] = _filled(self.operation.body_type, ids)
        return request


def entries(app: Starlette) -> list[Entry]:
    """Return every operation of the route table; raises Unknown."""
    table = [route for route in app.routes if isinstance(route, Route)]
    document = describe(table)
    return [_entry(route, document) for route in table]


def streams(app: Starlette) -> list[tuple[str, Place]]:
    """Return every WebSocket route, and where its id stands; raises Unknown."""
    others = [route for route in app.routes if not isinstance(route, Route | WebSocketRoute)]
    if others:
        raise Unknown(f"{others[0]!r}: say in tests/surface.py how to call it")
    found = []
    for route in app.routes:
        if isinstance(route, WebSocketRoute):
            (name,) = re.findall(r"{(\w+)}", route.path)
            found.append((route.path, Place("path", name)))
    return found


def _entry(route: Route, document: Mapping[str, Any]) -> Entry:
    operation = route.endpoint
    if not isinstance(operation, Operation):
        raise Unknown(f"{route.path} is no Operation: say in tests/surface.py how to call it")
    (method,) = (route.methods or set()) - {"HEAD"}
    described = document["paths"][route.path][method.lower()]["parameters"]
    query = [parameter["name"] for parameter in described if parameter["in"] == "query"]
    if unknown := [name for name in query if name not in QUERY and name not in KINDS]:
        raise Unknown(f"{unknown[0]} in the query of {route.path}: say in tests/surface.py what it is")
    places = [Place("path", name) for name in re.findall(r"{(\w+)}", route.path) if name not in SHARED]
    places += [Place("query", name) for name in query if name in KINDS]
    if operation.body_type is not None:
        places += [Place("body", name) for name in _ids_in(operation.body_type)]
    assert all(place.kind for place in places)
    return Entry(method, route.path, operation, tuple(places), tuple(query))


def _fields(struct: type) -> Iterator[tuple[str, msgspec.inspect.StructType | None]]:
    """Yield the fields of a body, and for one that holds a struct, that struct."""
    info = msgspec.inspect.type_info(struct)
    assert isinstance(info, msgspec.inspect.StructType)
    for field in info.fields:
        types = field.type.types if isinstance(field.type, msgspec.inspect.UnionType) else (field.type,)
        inner = [each for each in types if isinstance(each, msgspec.inspect.StructType)]
        yield field.encode_name, inner[0] if inner else None


def _ids_in(struct: type) -> list[str]:
    found: list[str] = []
    for name, inner in _fields(struct):
        if inner is not None:
            found += _ids_in(inner.cls)
        elif name in KINDS:
            found.append(name)
        elif (struct.__name__, name) not in BODY:
            raise Unknown(f"{name} of {struct.__name__}: say in tests/surface.py what it is")
    return found


def _filled(struct: type, ids: Mapping[Place, str]) -> dict[str, Any]:
    body: dict[str, Any] = {}
    for name, inner in _fields(struct):
        if inner is not None:
            body[name] = _filled(inner.cls, ids)
        elif name in KINDS:
            body[name] = ids[Place("body", name)]
        else:
            body[name] = BODY[struct.__name__, name]()
    return {name: value for name, value in body.items() if value is not None}


def cursor_of(id_: str) -> str:
    """Return the cursor of the page behind an id."""
    return base64.urlsafe_b64encode(uuid.UUID(id_).bytes).rstrip(b"=").decode()
