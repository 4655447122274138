"""One execution of a tool: its result, its error, its bounds; and the registry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint
from typing import Any

import pytest
from structlog.typing import EventDict

from service import tools
from service.errors import ConfigurationError
from service.tools import BUILT_IN, MAX_RESULT_BYTES, Executed, Tool, ToolContext, ToolFailed, execute, registry

CONTEXT = ToolContext("call", "run")


def tool(returned: Any = None, raised: Exception | None = None) -> Tool:
    """Return a tool that returns or raises."""

    async def run(arguments: Mapping[str, Any], context: ToolContext) -> Any:
        if raised is not None:
            raise raised
        return returned

    return Tool("made", "Does as told.", {"type": "object"}, run)


@pytest.mark.parametrize(
    ("made", "ended"),
    [
        (tool({"a": [1, None, "b"]}), Executed({"a": [1, None, "b"]})),
        (tool("a\x00b\ud800"), Executed("a\ufffdb?")),
        (tool(raised=ToolFailed("out of tea")), Executed(error="out of tea")),
        (tool(raised=TimeoutError()), Executed(error="TimeoutError")),
        (
            tool("x" * MAX_RESULT_BYTES),
            Executed(error=f"its result has {MAX_RESULT_BYTES + 2} bytes; at most {MAX_RESULT_BYTES} are kept"),
        ),
    ],
)
async def test_an_execution_ends_with_a_result_or_an_error(made: Tool, ended: Executed) -> None:
    assert await execute(made, {}, CONTEXT, 5) == ended


async def test_a_tool_that_raises_tells_the_kind_and_logs_the_rest(logged: list[EventDict]) -> None:
    ended = await execute(tool(raised=KeyError("secret")), {}, CONTEXT, 5)

    assert ended == Executed(error="the tool raised KeyError")
    assert [(line["event"], line["tool"]) for line in logged] == [("a tool raised", "made")]


async def test_a_result_that_json_cannot_say_is_an_error() -> None:
    ended = await execute(tool(object()), {}, CONTEXT, 5)
    assert ended.error is not None
    assert ended.error.startswith("its result is nothing that JSON can say")


async def test_what_is_built_in_does_what_it_says() -> None:
    assert await execute(BUILT_IN["echo"], {"a": 1}, CONTEXT, 5) == Executed({"a": 1})
    assert await execute(BUILT_IN["sleep"], {"seconds": 0}, CONTEXT, 5) == Executed({"slept_s": 0})
    assert await execute(BUILT_IN["sleep"], {"seconds": 60}, CONTEXT, 0.001) == Executed(
        error="timed out after 0.001 s"
    )
    assert await execute(BUILT_IN["fail"], {}, CONTEXT, 5) == Executed(error="failed as asked")
    refused = await execute(BUILT_IN["http_get"], {"url": "http://example.invalid/"}, CONTEXT, 5)
    assert "PLIMSOLL_HTTP_GET_ALLOW" in (refused.error or "")


installed = tool("from elsewhere")


@pytest.fixture
def fresh_registry() -> Iterator[None]:
    """Let the registry be read anew, in the test and after it."""
    registry.cache_clear()
    yield
    registry.cache_clear()


@pytest.mark.usefixtures("fresh_registry")
def test_entry_points_add_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("made", f"{__name__}:installed", tools.GROUP)
    monkeypatch.setattr(tools, "entry_points", lambda group: [entry] if group == tools.GROUP else [])
    monkeypatch.setattr(EntryPoint, "load", lambda self: installed)
    assert registry() == {**BUILT_IN, "made": installed}


@pytest.mark.usefixtures("fresh_registry")
@pytest.mark.parametrize("loaded", ["no tool", BUILT_IN["echo"]], ids=["no tool", "a taken name"])
def test_an_entry_point_that_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch, loaded: object) -> None:
    entry = EntryPoint("wrong", "somewhere:wrong", tools.GROUP)
    monkeypatch.setattr(tools, "entry_points", lambda group: [entry])
    monkeypatch.setattr(EntryPoint, "load", lambda self: loaded)
    with pytest.raises(ConfigurationError, match="somewhere:wrong"):
        registry()
