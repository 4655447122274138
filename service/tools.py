"""Tools: what a tool call may execute, by name, and how one execution is bounded.

A tool is a name, a JSON Schema of its arguments, and a coroutine. Three are defined here and one in `http_get`; others
are installed as entry points of the group `plimsoll.tools`, each an object of type `Tool`. A tool knows nothing of
runs: who may have it executed is said by a definition (`toolcalls`), when it is executed by `outside`.

A tool must be a coroutine that lets itself be cancelled: it shares its worker's thread with all others.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import msgspec
import structlog

from service.errors import ConfigurationError
from service.http_get import GetRefused, get

log = structlog.get_logger()

GROUP = "plimsoll.tools"
"""The group of entry points that holds further tools."""

MAX_RESULT_BYTES = 256 * 1024
"""Largest result, as JSON: it is kept on the tool call's row, in a step and in every snapshot of the run."""


class ToolFailed(Exception):
    """A tool could not do what it was asked; the message is told to the agent."""


@dataclass(frozen=True)
class ToolContext:
    """What a tool may know beside its arguments."""

    tool_call_id: str  # the same for the one start that a call ever has: a key for sinks that take one
    run_id: str
    http_get_allow: tuple[str, ...] = ()  # the hosts that `http_get` may ask


@dataclass(frozen=True)
class Tool:
    """Something that a tool call may execute."""

    name: str
    description: str  # one sentence, told to models
    schema: Mapping[str, Any]  # JSON Schema (2020-12) of the arguments object
    run: Callable[[Mapping[str, Any], ToolContext], Awaitable[Any]]
    """Returns anything that JSON can say; raises ToolFailed."""


class Executed(msgspec.Struct, frozen=True):
    """How one execution ended: with a result, or with an error."""

    result: Any = None
    error: str | None = None


async def execute(tool: Tool, arguments: Mapping[str, Any], context: ToolContext, timeout_s: float) -> Executed:
    """Run a tool once, for at most `timeout_s` seconds; whatever happens is told as an Executed."""
    try:
        async with asyncio.timeout(timeout_s) as limit:
            result = await tool.run(arguments, context)
    except TimeoutError:
        own = f"timed out after {timeout_s:g} s" if limit.expired() else "TimeoutError"
        return Executed(error=own)
    except ToolFailed as failed:
        return Executed(error=storable_text(str(failed)))
    except Exception as fault:
        log.warning("a tool raised", tool=tool.name, tool_call_id=context.tool_call_id, exc_info=fault)
        return Executed(error=f"the tool raised {type(fault).__name__}")
    try:
        kept = storable(msgspec.to_builtins(result, str_keys=True))
        size = len(msgspec.json.encode(kept))
    except (TypeError, ValueError, RecursionError) as wrong:
        return Executed(error=f"its result is nothing that JSON can say: {storable_text(str(wrong))}")
    if size > MAX_RESULT_BYTES:
        return Executed(error=f"its result has {size} bytes; at most {MAX_RESULT_BYTES} are kept")
    return Executed(kept)


def storable_text(text: str) -> str:
    """Return a text without what PostgreSQL cannot store: U+0000 and lone surrogates become U+FFFD."""
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode()


def storable(value: Any) -> Any:
    """Return a JSON value whose texts can be stored."""
    if isinstance(value, str):
        return storable_text(value)
    if isinstance(value, dict):
        return {storable_text(key): storable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [storable(inner) for inner in value]
    return value


async def _echo(arguments: Mapping[str, Any], context: ToolContext) -> Any:
    return dict(arguments)


async def _sleep(arguments: Mapping[str, Any], context: ToolContext) -> Any:
    await asyncio.sleep(arguments["seconds"])
    return {"slept_s": arguments["seconds"]}


async def _fail(arguments: Mapping[str, Any], context: ToolContext) -> Any:
    raise ToolFailed(arguments.get("message", "failed as asked"))


async def _http_get(arguments: Mapping[str, Any], context: ToolContext) -> Any:
    try:
        return await get(arguments["url"], context.http_get_allow)
    except GetRefused as refused:
        raise ToolFailed(str(refused)) from None


def _object(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    """Return the schema of an object with these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": required or [],
        "additionalProperties": False,
    }


BUILT_IN = {
    tool.name: tool
    for tool in (
        Tool("echo", "Returns its arguments.", {"type": "object"}, _echo),
        Tool(
            "sleep",
            "Waits for some seconds.",
            _object(["seconds"], seconds={"type": "number", "minimum": 0, "maximum": 3600}),
            _sleep,
        ),
        Tool(
            "fail",
            "Fails, with a message.",
            _object(message={"type": "string", "maxLength": 2000}),
            _fail,
        ),
        Tool(
            "http_get",
            "Fetches a URL of a host that the installation allows, without following redirects.",
            _object(["url"], url={"type": "string", "minLength": 1, "maxLength": 2000}),
            _http_get,
        ),
    )
}


@functools.cache
def registry() -> Mapping[str, Tool]:
    """Return every tool that is installed, by name; raises ConfigurationError naming an entry point that is wrong."""
    tools = dict(BUILT_IN)
    for entry in entry_points(group=GROUP):
        tool = entry.load()
        if not isinstance(tool, Tool):
            raise ConfigurationError(f"the entry point {entry.value!r} of {GROUP} is no service.tools.Tool")
        if tool.name in tools:
            raise ConfigurationError(
                f"the entry point {entry.value!r} of {GROUP}: there is a tool {tool.name!r} already"
            )
        tools[tool.name] = tool
    return tools
