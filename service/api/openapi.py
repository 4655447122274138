"""The API's own description: OpenAPI 3.1 from the route table and the endpoints' types, and a page that shows it.

Paths, methods and roles come from the table in `app`, bodies and answers from the endpoints' annotations, sentences
from their docstrings; only the query parameters and what each status means are written here by hand. The page is plain
HTML made from the same description, without a script or anything from elsewhere, so it works offline.
"""

from __future__ import annotations

import enum
import functools
import html
import inspect
import re
import typing
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from starlette.routing import Route

from service.api.answers import Index, Problem
from service.api.paging import DEFAULT_PAGE, LARGEST_PAGE
from service.api.snapshot import LONGEST_WAIT_S
from service.exchange import Answer, Exchange, Operation, answer_json
from service.runs import RunStatus
from service.toolcalls import ToolCallStatus

VERSION = "1.0.0"
"""Version of the HTTP interface, not of the program."""

ERRORS = {
    "400": "malformed",
    "401": "no, unknown, expired or revoked token",
    "403": "role too low",
    "404": "absent, or another workspace's",
    "409": "illegal state, or Idempotency-Key in flight",
    "413": "body above 1 MiB",
    "422": "well-formed but invalid; `field` names it",
    "429": "a quota or a cap refuses; Retry-After says how long to wait",
    "503": "a dependency is down; Retry-After says how long to wait",
}

ID = {"type": "string", "format": "uuid"}
CURSOR = {"type": "string"}
PAGE = {"type": "integer", "minimum": 1, "maximum": LARGEST_PAGE, "default": DEFAULT_PAGE}
NUMBER = {"type": "integer", "minimum": 1}
NUMBERS = {"revision": NUMBER}
"""What stands in a path and is counted; all else there is an id."""


def one_of(kind: type[enum.StrEnum]) -> dict[str, Any]:
    """Return the schema of an enumeration's values."""
    return {"type": "string", "enum": [each.value for each in kind]}


QUERIES: dict[str, list[tuple[str, dict[str, Any], str]]] = {
    "list runs": [
        ("workspace_id", ID, "runs of this workspace"),
        ("status", one_of(RunStatus), "runs in this status"),
        ("parent_run_id", ID, "subruns of this run"),
        ("limit", PAGE, "most runs in a page, 1 to 200 (default 50); a page of large ones ends earlier"),
        ("cursor", CURSOR, "`next_cursor` of the page before"),
    ],
    "list tool calls": [
        ("workspace_id", ID, "tool calls of this workspace"),
        ("status", one_of(ToolCallStatus), "tool calls in this status"),
        ("run_id", ID, "tool calls of this run"),
        ("limit", PAGE, "most tool calls in a page, 1 to 200 (default 50); a page of large ones ends earlier"),
        ("cursor", CURSOR, "`next_cursor` of the page before"),
    ],
    "list quota revisions": [
        ("limit", PAGE, "revisions in a page, 1 to 200 (default 50)"),
        ("before", NUMBER, "revisions below this number: `next_before` of the page before"),
    ],
    "snapshot": [
        ("since_seq", {"type": "integer", "minimum": 0, "default": 0}, "events after this number only (default 0)"),
        (
            "wait",
            {"type": "number", "minimum": 0, "maximum": LONGEST_WAIT_S, "default": 0},
            "hold the answer until there is news, at most 30 seconds",
        ),
    ],
}
"""Query parameters with their schemas and meanings."""

LISTS = {
    ("Runs", "list"): "list runs",
    ("ToolCalls", "list"): "list tool calls",
    ("QuotaPages", "list"): "list quota revisions",
}
"""Endpoints whose answer is a page that a query narrows."""

GONE = {
    "/api/runs/{run_id}/snapshot/": "older events were compacted; `archive` is the bundle that has them",
    "/api/archives/{archive_id}/download/": "the bundle's file is missing or damaged",
}
"""What 410 means, by path."""


class Description:
    """The endpoints that describe the others."""

    def __init__(self, routes: Callable[[], Sequence[object]]) -> None:
        self._routes = routes

    @functools.cached_property
    def _document(self) -> dict[str, Any]:
        return describe([route for route in self._routes() if isinstance(route, Route)])

    async def index(self, exchange: Exchange[None]) -> Answer[Index]:
        """Say what answers here, and where it is described."""
        paths = {name: f"/{name}" for name in ("docs", "livez", "readyz", "metrics")}
        return answer_json(Index(service="plimsoll", version=VERSION, openapi="/openapi.json", **paths))

    async def openapi(self, exchange: Exchange[None]) -> Answer[dict[str, Any]]:
        """Return this description (OpenAPI 3.1)."""
        return answer_json(self._document)

    async def docs(self, exchange: Exchange[None]) -> Answer[str]:
        """Return this description as a page."""
        return Answer(page(self._document).encode(), content_type=b"text/html; charset=utf-8")


def describe(routes: Sequence[Route]) -> dict[str, Any]:
    """Make the OpenAPI document of the routes whose endpoint is an `Operation`."""
    operations = [(route, route.endpoint) for route in routes if isinstance(route.endpoint, Operation)]
    types = {answer_type(operation) for _, operation in operations} | {Problem}
    types |= {operation.body_type for _, operation in operations if operation.body_type is not None}
    structs = sorted((t for t in types if _is_struct(t)), key=lambda t: t.__name__)
    schemas, components = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    references = dict(zip(structs, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route, operation in operations:
        method = next(iter(sorted((route.methods or {"GET"}) - {"HEAD"}))).lower()
        paths.setdefault(route.path, {})[method] = _operation(route.path, operation, references)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Plimsoll",
            "version": VERSION,
            "description": "Accepts runs of AI agents, advances them, and guards itself.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def answer_type(operation: Operation) -> Any:
    """Return what the endpoint's `Answer` holds, from its annotation."""
    hints = typing.get_type_hints(operation.endpoint)
    arguments = typing.get_args(hints.get("return"))
    return arguments[0] if arguments else None


def _is_struct(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, msgspec.Struct)


def _operation(path: str, operation: Operation, references: dict[Any, Any]) -> dict[str, Any]:
    """Describe one method of one path."""
    name = operation.endpoint.__name__
    noun = type(getattr(operation.endpoint, "__self__", None)).__name__
    query: list[tuple[str, dict[str, Any], str]] = []
    if "snapshot" in path:
        query = QUERIES["snapshot"]
    elif (noun, name) in LISTS:
        query = QUERIES[LISTS[noun, name]]
    described: dict[str, Any] = {
        "operationId": f"{noun}.{name}",
        "summary": inspect.getdoc(operation.endpoint) or "",
        "parameters": [
            {"name": each, "in": "path", "required": True, "schema": NUMBERS.get(each, ID)}
            for each in re.findall(r"{(\w+)}", path)
        ]
        + [{"name": each, "in": "query", "schema": schema, "description": meaning} for each, schema, meaning in query],
        "responses": {"200": _success(answer_type(operation), references)},
    }
    if operation.body_type is not None:
        content = {"application/json": {"schema": references[operation.body_type]}}
        described["requestBody"] = {"required": True, "content": content}
    if operation.role is None:
        described["security"] = []
    else:
        described["security"] = [{"token": []}]
        described["x-role"] = operation.role.name
        described["x-installation-token"] = operation.installation
        described["responses"] |= {
            status: {
                "description": meaning,
                "content": {"application/problem+json": {"schema": references[Problem]}},
            }
            for status, meaning in (ERRORS | ({"410": GONE[path]} if path in GONE else {})).items()
            if operation.body_type is not None or status != "413"
        }
    if path in GONE:
        described["responses"]["304"] = {"description": "nothing new since the ETag in If-None-Match"}
    return described


def _success(kind: Any, references: dict[Any, Any]) -> dict[str, Any]:
    if kind in references:
        return {"description": "done", "content": {"application/json": {"schema": references[kind]}}}
    media_type = {str: "text/plain", bytes: "application/zip"}.get(kind, "application/json")
    return {"description": "done", "content": {media_type: {"schema": {}}}}


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin: 2.5rem 0 .25rem; font-size: 1.1rem } h2 code { font-size: 1rem }
.method { display: inline-block; min-width: 4.5rem; font-weight: 700 }
table { border-collapse: collapse; margin: .5rem 0 } td, th { text-align: left; padding: .15rem 1rem .15rem 0 }

td { vertical-align: top } td:nth-child(2) { white-space: nowrap }
th { font-weight: 600; color: #555 } small { color: #555 } code { font-family: ui-monospace, monospace }
"""


def page(document: dict[str, Any]) -> str:
    """Show the document as HTML: one section an operation, its fields as tables."""
    sections = [
        _section(path, method, operation, document)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    title = html.escape(document["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title} API</title>'
        f"<style>{STYLE}</style></head><body><h1>{title} API</h1>"
        f"<p>{html.escape(document['info']['description'])} Send <code>Authorization: Bearer &lt;token&gt;</code>. "
        'The same for programs: <a href="/openapi.json">openapi.json</a>.</p>' + "".join(sections) + "</body></html>"
    )


def _prose(text: str) -> str:
    """Escape a sentence and set what stands in backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _section(path: str, method: str, operation: dict[str, Any], document: dict[str, Any]) -> str:
    role = operation.get("x-role")
    who = "open to everybody" if role is None else f"role {role} or higher"
    if operation.get("x-installation-token"):
        who += ", installation token"
    parts = [
        f'<h2><span class="method">{method.upper()}</span> <code>{html.escape(path)}</code></h2>',
        f"<div>{_prose(operation['summary'])} <small>{who}</small></div>",
    ]
    rows = [(p["name"], f"in the {p['in']}", _meaning(p, document)) for p in operation["parameters"]]
    if "requestBody" in operation:
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        rows += [(each, "in the body", kind) for each, kind in _fields(schema, document)]
    if rows:
        cells = "".join(
            f"<tr><td><code>{html.escape(a)}</code></td><td>{html.escape(b)}</td><td>{_prose(c)}</td></tr>"
            for a, b, c in rows
        )
        parts.append(f"<table>{cells}</table>")
    content = operation["responses"]["200"].get("content", {}).get("application/json", {})
    answer = ", ".join(each for each, _ in _fields(content.get("schema", {}), document))
    if answer:
        parts.append(f"<div><small>answers</small> <code>{html.escape(answer)}</code></div>")
    return "".join(parts)


def _meaning(parameter: dict[str, Any], document: dict[str, Any]) -> str:
    """Say what a parameter is for, and which values it has when they are named."""
    meaning = str(parameter.get("description", ""))
    return f"{meaning}: {_kind(parameter['schema'], document)}" if "enum" in parameter["schema"] else meaning


def _fields(schema: dict[str, Any], document: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (name, what it may be) of an object's fields, with their defaults."""
    schema = _resolved(schema, document)
    required = set(schema.get("required", ()))
    described = []
    for name, field in schema.get("properties", {}).items():
        words = _kind(field, document)
        if name in required:
            words += ", required"
        elif field.get("default") is not None:
            words += f", default {field['default']}"
        described.append((name, words))
    return described


def _resolved(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """Follow a reference to the schema that it names."""
    if "$ref" not in schema:
        return schema
    named: dict[str, Any] = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return named


def _kind(field: dict[str, Any], document: dict[str, Any]) -> str:
    """Say in words what a field may be: its values, its inner fields, or its type and bounds."""
    if "anyOf" in field:
        return " or ".join(_kind(each, document) for each in field["anyOf"])
    field = _resolved(field, document)
    if "enum" in field:
        return " or ".join(map(str, field["enum"]))
    if "properties" in field:
        return "{" + "; ".join(f"{name}: {words}" for name, words in _fields(field, document)) + "}"
    words = str(field.get("format") or field.get("type") or "any")
    if words == "array" and "items" in field:
        return f"list of {_kind(field['items'], document)}"
    bounds = [
        f"{sign} {field[key]:g}"
        for key, sign in (("minimum", "at least"), ("exclusiveMinimum", "above"), ("maximum", "at most"))
        if key in field
    ]
    return " ".join([words, *bounds])
