"""Commands on a socket: each is an operation of the HTTP interface, done for the socket's caller.

One table says which. An operation that the route table does not hold (yet) is answered with `not-supported`, and its
command works from the day on which the route is there; role, body, quota and errors are the operation's own.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlencode

import msgspec

from service.auth import Caller
from service.errors import ApiError, Invalid, Malformed, NotSupported, problem
from service.exchange import Operation
from service.stream.frames import ack, error
from service.telemetry import SOCKET_COMMANDS


class Command(NamedTuple):
    """What a command does."""

    method: str
    path: str  # as in the route table; the parameter is named as in frames
    target: str  # the field that says on what
    query: tuple[str, ...] = ()  # fields that go into the query; all others make the body


COMMANDS = {
    "cancel_run": Command("POST", "/api/runs/{run_id}/cancel/", "run_id"),
    "pause_run": Command("POST", "/api/runs/{run_id}/pause/", "run_id"),
    "resume_run": Command("POST", "/api/runs/{run_id}/resume/", "run_id"),
    "spawn_subrun": Command("POST", "/api/runs/{run_id}/spawn_subrun/", "run_id"),
    "request_snapshot": Command("GET", "/api/runs/{run_id}/snapshot/", "run_id", ("since_seq",)),
    "approve_tool_call": Command("POST", "/api/toolcalls/{tool_call_id}/approve/", "tool_call_id"),
    "reject_tool_call": Command("POST", "/api/toolcalls/{tool_call_id}/reject/", "tool_call_id"),
}
"""Every command that is an operation."""

LOCAL = ("ping", "subscribe_approvals", "unsubscribe_approvals")
"""Commands that the socket answers by itself."""

ENVELOPE = ("type", "cmd", "id", "data")
"""Fields of a frame that say what it is; the others are the command's own, in the frame or in its `data`."""


class Request(NamedTuple):
    """A well-formed command frame."""

    cmd: str
    request_id: Any  # the client's own, repeated in the answer
    fields: dict[str, Any]


class Commands:
    """Does commands for one process."""

    def __init__(self, operations: Mapping[tuple[str, str], Operation]) -> None:
        """`operations` is the route table: (method, path) -> operation."""
        known = {(method, _shape(path)): operation for (method, path), operation in operations.items()}
        self._operations = {cmd: known.get((each.method, _shape(each.path))) for cmd, each in COMMANDS.items()}

    async def perform(self, caller: Caller, request: Request, run_id: uuid.UUID | None) -> str:
        """Do what a frame asks for and return the frame that answers; `run_id` is the run that the socket follows."""
        try:
            operation, command = self._find(request.cmd)
            fields = dict(request.fields)
            if command.target == "run_id" and run_id is not None:
                fields.setdefault("run_id", str(run_id))
            target = fields.pop(command.target, None)
            if not isinstance(target, str):
                raise Invalid(command.target, "say on what the command is to be done")
            names = re.findall(r"{(\w+)}", operation.route)
            query = {name: fields.pop(name) for name in command.query if name in fields}
            if command.query and fields:
                raise Invalid(next(iter(fields)), f"{request.cmd} has no such field")
        except ApiError as refusal:
            return refused(request, refusal)
        answer = await operation.command(
            caller, dict.fromkeys(names, target), urlencode(query), msgspec.json.encode(fields)
        )
        SOCKET_COMMANDS.labels(request.cmd, answer.status).inc()
        if answer.status == 200:
            return ack(request.cmd, request.request_id, msgspec.Raw(answer.body))
        retry_after = dict(answer.headers).get(b"retry-after")
        told: dict[str, Any] = msgspec.json.decode(answer.body)
        return error(request.cmd, request.request_id, told, int(retry_after) if retry_after else None)

    def _find(self, cmd: str) -> tuple[Operation, Command]:
        if cmd not in COMMANDS:
            raise Invalid("cmd", f"give one of {', '.join([*LOCAL, *COMMANDS])}, not {cmd[:100]!r}")
        operation = self._operations[cmd]
        if operation is None:
            raise NotSupported(f"{cmd} is not supported by this version")
        return operation, COMMANDS[cmd]


def parse(text: str | None) -> Request:
    """Return a frame's command; raises Malformed or Invalid."""
    if text is None:
        raise Malformed("send text frames: a command is a JSON object")
    try:
        frame = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as wrong:
        raise Malformed(f"the frame is not valid JSON: {wrong}") from None
    if not isinstance(frame, dict):
        raise Malformed("the frame must be a JSON object")
    if frame.get("type") != "cmd":
        raise Invalid("type", 'a client sends frames of type "cmd" only')
    if not isinstance(frame.get("cmd"), str):
        raise Invalid("cmd", "name the command")
    data = frame.get("data")
    if data is not None and not isinstance(data, dict):
        raise Invalid("data", "expected an object")
    own = {name: value for name, value in frame.items() if name not in ENVELOPE}
    return Request(frame["cmd"], frame.get("id"), {**(data or {}), **own})


def refused(request: Request | None, why: ApiError) -> str:
    """Return the error frame of a command that was not even tried; `request` is None when it could not be read."""
    cmd, request_id = (request.cmd[:100], request.request_id) if request else (None, None)
    retry_after = why.headers().get("retry-after")
    told: dict[str, Any] = msgspec.json.decode(problem(why, ""))
    SOCKET_COMMANDS.labels(cmd if cmd in COMMANDS or cmd in LOCAL else "unknown", why.status).inc()
    return error(cmd, request_id, told, int(retry_after) if retry_after else None)


def _shape(path: str) -> str:
    """Return a path without the names of its parameters."""
    return re.sub(r"{\w+}", "{}", path)
