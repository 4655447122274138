"""One request and its answer: the pure ASGI layer between the route table and the endpoints.

An `Operation` is a row of the route table: who may call, what the body must look like, which endpoint answers. It
names the caller, reads and checks the body, turns errors into RFC 9457 problems, and stamps every answer with
Server-Timing. Endpoints see an `Exchange` and return an `Answer`; they never touch ASGI. A command on a socket is the
same operation without HTTP around it (`stream/commands.py`).

The framework's Request and Response are not used here: on the hot path they cost more than the work
(docs/performance.md).
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, Generic, NamedTuple, TypeVar
from urllib.parse import parse_qsl

import msgspec
import structlog
from asyncpg.pgproto.pgproto import UUID  # a uuid.UUID that is parsed and hashed in C
from starlette.types import Receive, Scope, Send

from service.auth import Caller, Callers, Role
from service.db import is_outage
from service.errors import (
    PROBLEM_MEDIA_TYPE,
    ApiError,
    BodyTooLarge,
    Invalid,
    Malformed,
    NotFound,
    Unauthenticated,
    Unavailable,
    problem,
)
from service.telemetry import REQUEST_SECONDS

log = structlog.get_logger()

MAX_BODY_BYTES = 1 << 20
"""Largest request body that is read: 1 MiB."""

JSON: Final = b"application/json"

NO_TIME = "auth;dur=0, quota;dur=0, db;dur=0, publish;dur=0, app;dur=0"
"""Server-Timing of what is refused before it is an exchange."""

Body = TypeVar("Body")
Content = TypeVar("Content")


class Pieces(NamedTuple):
    """A body too large to hold in memory."""

    size_bytes: int  # of all of them together
    each: AsyncIterator[bytes]


class Answer(msgspec.Struct, Generic[Content], frozen=True):
    """What goes back: a status, a body, and header fields beyond the usual ones.

    `Content` is what a successful body holds; the API's description is made from it.
    """

    body: bytes = b""
    status: int = 200
    content_type: bytes = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()
    pieces: Pieces | None = None  # sent in place of `body`, one after the other


def answer_json(value: Any, headers: tuple[tuple[bytes, bytes], ...] = ()) -> Answer[Any]:
    """Return a 200 answer with a JSON body."""
    return Answer(msgspec.json.encode(value), headers=headers)


def field_headers(fields: dict[str, str]) -> tuple[tuple[bytes, bytes], ...]:
    """Turn header fields into ASGI's form."""
    return tuple((name.encode(), value.encode()) for name, value in fields.items())


class Timed:
    """A `with` block whose time is added to one of an exchange's parts, such as `db_ms`; a refusal's time too."""

    __slots__ = ("_exchange", "_part", "_started")

    def __init__(self, exchange: Exchange[Any], part: str) -> None:
        self._exchange = exchange
        self._part = part

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent_ms = (time.perf_counter() - self._started) * 1e3
        setattr(self._exchange, self._part, getattr(self._exchange, self._part) + spent_ms)


class Exchange(Generic[Body]):
    """One request on its way through an endpoint, and where its time goes (milliseconds)."""

    __slots__ = ("_query", "auth_ms", "body", "body_bytes", "caller", "db_ms", "publish_ms", "quota_ms", "scope")

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.auth_ms = 0.0
        self.quota_ms = 0.0
        self.db_ms = 0.0
        self.publish_ms = 0.0
        self.caller: Caller
        self.body: Body
        self.body_bytes = b""
        self._query: dict[str, str] | None = None  # read when it is first asked for

    def timed(self, part: str) -> Timed:
        """Book what happens inside a `with` block as one part of the request's time, whether it succeeds or raises."""
        return Timed(self, part)

    def header(self, name: bytes) -> bytes | None:
        """Return the first header field of that (lower-case) name."""
        for key, value in self.scope["headers"]:
            if key == name:
                return bytes(value)
        return None

    def has_representation(self, etag: bytes) -> bool:
        """Tell whether the caller has what bears this tag; compares weakly (RFC 9110, section 13.1.2)."""
        if_none_match = self.header(b"if-none-match")
        if if_none_match is None:
            return False
        if if_none_match in (etag, b"*"):
            return True
        return any(part.strip().removeprefix(b"W/") == etag for part in if_none_match.split(b","))

    def path_id(self, name: str, what: str) -> uuid.UUID:
        """Return an id from the path; one that is no UUID is as absent as any other unknown id."""
        try:
            found: uuid.UUID = UUID(self.scope["path_params"][name])
            return found
        except ValueError:
            raise NotFound(f"no such {what}") from None

    def query(self) -> dict[str, str]:
        """Return the query's parameters; the last of several wins."""
        if self._query is None:
            try:
                text = self.scope["query_string"].decode("ascii")
                self._query = dict(parse_qsl(text, keep_blank_values=True, errors="strict"))
            except (UnicodeDecodeError, ValueError):
                raise Malformed("the query string is not valid percent-encoded UTF-8") from None
        return self._query

    def query_number(self, name: str, default: float, least: float, most: float) -> float:
        """Return a number from the query; raises Invalid naming it."""
        text = self.query().get(name)
        if text is None:
            return default
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise Invalid(name, f"give a number from {least:g} to {most:g}")
        return value


Endpoint = Callable[[Any], Awaitable[Answer[Any]]]


class Operation:
    """One method of one path, as an ASGI application."""

    def __init__(
        self,
        route: str,
        endpoint: Endpoint,
        callers: Callers,
        role: Role | None,
        body_type: type | None = None,
        *,
        installation: bool = False,
    ) -> None:
        self.route = route
        self.endpoint = endpoint
        self.role = role  # null: open to everybody
        self.body_type = body_type
        self.installation = installation  # only installation tokens may ask
        self._callers = callers
        self._decoder: msgspec.json.Decoder[Any] | None = None if body_type is None else msgspec.json.Decoder(body_type)
        self._observers: dict[int, Callable[[float], None]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; whatever goes wrong becomes a problem with the right status."""
        started = time.perf_counter()
        exchange: Exchange[Any] = Exchange(scope)
        try:
            if self.role is not None:
                await self._authenticate(exchange)
                exchange.auth_ms = (time.perf_counter() - started) * 1e3
            body = b"" if self._decoder is None else await read_body(scope, receive)
            answer = await self._perform(exchange, body)
        except ApiError as error:
            answer = refusal(error, scope)
        except Exception as fault:
            answer = refusal(_translate(fault, scope), scope)
        elapsed = time.perf_counter() - started
        known_ms = exchange.auth_ms + exchange.quota_ms + exchange.db_ms + exchange.publish_ms
        timing = (
            f"auth;dur={exchange.auth_ms:.3f}, quota;dur={exchange.quota_ms:.3f}, db;dur={exchange.db_ms:.3f}, "
            f"publish;dur={exchange.publish_ms:.3f}, app;dur={max(0.0, elapsed * 1e3 - known_ms):.3f}"
        )
        await respond(send, answer, timing)
        observe = self._observers.get(answer.status)
        if observe is None:
            observe = REQUEST_SECONDS.labels(self.route, scope["method"], answer.status).observe
            self._observers[answer.status] = observe
        observe(time.perf_counter() - started)

    async def command(self, caller: Caller, path_params: dict[str, str], query: str, body: bytes) -> Answer[Any]:
        """Do for a caller who is known already what a request would do: a command on a socket.

        Role, body, quota and errors are those of the request. `query` is percent-encoded.
        """
        scope: Scope = {
            "type": "command",
            "path": self.route.format_map(path_params),
            "path_params": path_params,
            "query_string": query.encode("ascii"),
            "headers": [],
        }
        exchange: Exchange[Any] = Exchange(scope)
        exchange.caller = caller
        try:
            self._require(caller)
            return await self._perform(exchange, body)
        except ApiError as error:
            return refusal(error, scope)
        except Exception as fault:
            return refusal(_translate(fault, scope), scope)

    async def _perform(self, exchange: Exchange[Any], body: bytes) -> Answer[Any]:
        """Decode the body and call the endpoint."""
        if self._decoder is not None:
            exchange.body_bytes = body
            exchange.body = decode(self._decoder, body)
        return await self.endpoint(exchange)

    def _require(self, caller: Caller) -> None:
        """Raise RoleTooLow unless the caller may ask for this operation."""
        if self.installation:
            caller.require_installation()
        if self.role is not None:
            caller.require(self.role)

    async def _authenticate(self, exchange: Exchange[Any]) -> None:
        header = exchange.header(b"authorization")
        if header is None:
            raise Unauthenticated("send `Authorization: Bearer <token>`")
        caller = self._callers.remembered(header)
        exchange.caller = caller if caller is not None else await self._callers.identify(header)
        self._require(exchange.caller)


async def respond(send: Send, answer: Answer[Any], timing: str) -> None:
    """Send an answer; a 304 has neither body nor type (RFC 9110, section 15.4.5)."""
    headers = [(b"server-timing", timing.encode()), *answer.headers]
    if answer.status != 304:
        size = len(answer.body) if answer.pieces is None else answer.pieces.size_bytes
        headers += [(b"content-type", answer.content_type), (b"content-length", b"%d" % size)]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    if answer.pieces is not None:
        async for piece in answer.pieces.each:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": answer.body})


def refusal(error: ApiError, scope: Scope) -> Answer[Any]:
    """Turn an error into its answer."""
    instance = scope.get("path", "")
    return Answer(problem(error, instance), error.status, PROBLEM_MEDIA_TYPE.encode(), field_headers(error.headers()))


def _translate(fault: Exception, scope: Scope) -> ApiError:
    """Name the cause of an unexpected error: a dependency that is down, or a bug of ours, which is logged."""
    if is_outage(fault):
        log.warning("dependency down", path=scope.get("path"), fault=str(fault))
        return Unavailable("a dependency does not answer; try again")
    log.error("unexpected error", path=scope.get("path"), exc_info=fault)
    return Unavailable("the request could not be completed; the fault is logged", retry_after_s=5)


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """Read the whole body; raises BodyTooLarge as soon as it is known to be."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > MAX_BODY_BYTES:
            raise BodyTooLarge(f"the body has {int(value)} bytes; at most {MAX_BODY_BYTES} are read")
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":  # even as the first message: what was not sent is not an empty body
            raise Malformed("the connection closed before the body was complete")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY_BYTES:
            raise BodyTooLarge(f"at most {MAX_BODY_BYTES} bytes of body are read")
        more = message.get("more_body", False)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    """Turn a body into its typed struct; raises Malformed, or Invalid naming the field."""
    try:
        value = decoder.decode(body or b"{}")
        if b"\\u0000" in body:
            refuse_nul(_without_raw(value), "body")
    except msgspec.ValidationError as wrong:
        raise _explain(str(wrong)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as wrong:
        raise Malformed(f"the body is not valid JSON: {wrong}") from None
    except RecursionError:
        raise Malformed("the body is nested too deeply") from None
    return value


_PATH = re.compile(r" - at `(?:key in )?\$\.?(.*)`$")
_NAMED = re.compile(r"field `([^`]+)`")


def _explain(message: str) -> ApiError:
    """Turn msgspec's sentence into an error that names the field."""
    path = _PATH.search(message)
    reason = message[: path.start()] if path else message
    named = _NAMED.search(reason)
    where = [part for part in ((path.group(1) if path else ""), (named.group(1) if named else "")) if part]
    if not where:
        return Malformed(f"the body must be a JSON object: {reason}")
    return Invalid(".".join(where), reason[0].lower() + reason[1:])


def _without_raw(value: Any) -> Any:
    """Return a struct as plain values; what was left undecoded is its endpoint's to check."""
    return msgspec.to_builtins(value, enc_hook=lambda _: None)


def refuse_nul(value: Any, field: str) -> None:
    """Raise Invalid where a string holds U+0000, which PostgreSQL cannot store."""
    if isinstance(value, str) and "\x00" in value:
        raise Invalid(field, "must not contain the character U+0000")
    if isinstance(value, dict):
        for key, inner in value.items():
            refuse_nul(key, field)
            refuse_nul(inner, key if field == "body" else f"{field}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            refuse_nul(inner, f"{field}[{index}]")
