"""A model's agent against a local server that speaks the chat-completions protocol, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from starlette.responses import JSONResponse, Response
from structlog.typing import EventDict

from service.agents import ATTEMPTS, Models, PastStep, conversation, next_tool_call
from service.errors import Invalid
from service.settings import Settings
from service.toolcalls import DEFAULTS
from service.turns import Answered, AskedTool, CannotHaveTool, GaveUp, WantsTool
from service.workspaces import ModelSpec, create_agent
from tests.modelendpoint import KEY, Endpoint, Pauses, completion
from tests.tenants import Tenant

SAYS_HELLO = {"message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}


SPEC = ModelSpec("tiny")
MESSAGES = [{"role": "user", "content": "hi"}]


@asynccontextmanager
async def asking(settings: Settings, pauses: Pauses | None = None) -> AsyncIterator[Models]:
    """A worker's models, closed in the end."""
    models = Models(settings, pauses if pauses is not None else Pauses())
    yield models
    await models.close()


async def test_an_answer_is_read_with_its_token_counts(endpoint: Endpoint) -> None:
    endpoint.answers = [completion("hello")]
    async with asking(endpoint.settings()) as models:
        answer = await models.ask(ModelSpec("tiny", temperature=0.5, tools=("echo",)), MESSAGES, DEFAULTS)

    assert isinstance(answer, Answered)
    assert msgspec.structs.replace(answer, duration_ms=0) == Answered(
        "tiny-2026",
        "hello",
        [],
        "stop",
        {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
        1,
        0,
    )
    assert endpoint.asked == [
        {
            "model": "tiny",
            "messages": MESSAGES,
            "temperature": 0.5,
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "echo",
                        "description": "Returns its arguments.",
                        "parameters": {"type": "object"},
                    },
                }
            ],
        }
    ]


async def test_an_endpoint_that_is_busy_is_asked_again_when_it_wants(endpoint: Endpoint) -> None:
    busy = JSONResponse({"error": {"message": "slow down"}}, 429, {"retry-after": "7"})
    endpoint.answers = [busy, Response(status_code=500), Response(status_code=503), completion("hello")]
    pauses = Pauses()
    async with asking(endpoint.settings(), pauses) as models:
        answer = await models.ask(SPEC, MESSAGES, {})

    assert isinstance(answer, Answered)
    assert (answer.attempts, pauses) == (4, [7.0, 1.0, 2.0])


async def test_the_attempts_are_bounded(endpoint: Endpoint) -> None:
    endpoint.answers = [Response(status_code=500) for _ in range(ATTEMPTS)]
    async with asking(endpoint.settings()) as models:
        assert await models.ask(SPEC, MESSAGES, {}) == GaveUp("the model's endpoint answered 500 (4 of 4 attempts)")
    assert len(endpoint.asked) == ATTEMPTS


async def test_nobody_waits_for_ever_because_an_endpoint_asks_for_it(endpoint: Endpoint) -> None:
    endpoint.answers = [Response(status_code=429, headers={"retry-after": "3600"})]
    pauses = Pauses()
    async with asking(endpoint.settings(), pauses) as models:
        assert await models.ask(SPEC, MESSAGES, {}) == GaveUp(
            "the model's endpoint answered 429 and asks to wait 3600 s (1 of 4 attempts)"
        )
    assert pauses == []


async def test_a_year_that_nobody_can_count_to_asks_for_nothing(endpoint: Endpoint) -> None:
    date = f"Mon, 01 Jan {'9' * 30} 00:00:00 GMT"
    endpoint.answers = [Response(status_code=429, headers={"retry-after": date}) for _ in range(ATTEMPTS)]
    pauses = Pauses()
    async with asking(endpoint.settings(), pauses) as models:
        assert await models.ask(SPEC, MESSAGES, {}) == GaveUp("the model's endpoint answered 429 (4 of 4 attempts)")
    assert pauses == [0.5, 1.0, 2.0]


async def test_an_answer_in_another_encoding_than_it_names_is_not_asked_for_again(endpoint: Endpoint) -> None:
    endpoint.answers = [Response(b"no gzip at all", headers={"content-encoding": "gzip"})]
    async with asking(endpoint.settings()) as models:
        assert await models.ask(SPEC, MESSAGES, {}) == GaveUp(
            "the model's endpoint answered what does not have the encoding that it names"
        )
    assert len(endpoint.asked) == 1


async def test_a_slow_endpoint_is_asked_again(endpoint: Endpoint) -> None:
    endpoint.hold = asyncio.Event()  # never set: it does not answer
    async with asking(endpoint.settings(model_timeout_s=0.05)) as models:
        answer = await models.ask(SPEC, MESSAGES, {})
    endpoint.hold.set()
    endpoint.answers = [completion("too late") for _ in range(ATTEMPTS)]
    assert answer == GaveUp("the model's endpoint did not answer within 0.05 s (4 of 4 attempts)")


async def test_nobody_listening_is_asked_again() -> None:
    pauses = Pauses()
    async with asking(Settings("", "", model_base_url="http://127.0.0.1:1/v1"), pauses) as models:
        answer = await models.ask(SPEC, MESSAGES, {})
    assert answer == GaveUp("the model's endpoint cannot be reached (ConnectError) (4 of 4 attempts)")
    assert pauses == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Response(b"<html>", 200), "the model's endpoint answered no chat completion: "),
        (JSONResponse({"choices": []}), "the model's endpoint answered without any choice"),
        (
            JSONResponse({"choices": [{"message": {"content": 7}}]}),
            "the model's endpoint answered no chat completion: ",
        ),
        (
            JSONResponse({"error": {"message": "no such model"}}, 404),
            "the model's endpoint answered 404: no such model",
        ),
        (Response(b"oops", 400), "the model's endpoint answered 400: no message"),
        (Response(status_code=302, headers={"location": "http://evil.net/"}), "the model's endpoint answered 302: "),
    ],
)
async def test_what_would_be_the_same_again_is_not_tried_again(endpoint: Endpoint, answer: Response, told: str) -> None:
    endpoint.answers = [answer]
    async with asking(endpoint.settings()) as models:
        gave_up = await models.ask(SPEC, MESSAGES, {})
    assert isinstance(gave_up, GaveUp)
    assert gave_up.error.startswith(told)
    assert len(endpoint.asked) == 1


async def test_a_wrong_key_is_told_without_the_key(endpoint: Endpoint, logged: list[EventDict]) -> None:
    async with asking(endpoint.settings(model_key="sk-wrong-key-of-mine")) as models:
        gave_up = await models.ask(SPEC, MESSAGES, {})
    assert gave_up == GaveUp("the model's endpoint answered 401: Incorrect API key provided: [key].")
    assert logged == []
    assert "sk-wrong-key-of-mine" not in repr(endpoint.settings(model_key="sk-wrong-key-of-mine"))


async def test_an_endpoint_that_is_not_allowed_is_not_asked(endpoint: Endpoint) -> None:
    elsewhere = Settings("", "", model_base_url="http://models.example/v1", model_key=KEY)
    async with asking(elsewhere) as models:
        gave_up = await models.ask(ModelSpec("tiny", base_url=f"{endpoint.url}/v1"), MESSAGES, {})
    assert isinstance(gave_up, GaveUp)
    assert "PLIMSOLL_MODEL_ALLOW" in gave_up.error
    assert endpoint.asked == []


def test_the_conversation_is_rebuilt_from_the_steps() -> None:
    steps = [
        PastStep("SUBRUN_SPAWN", {}),
        PastStep("MODEL_CALL", {"content": "", "tool_calls": [{"id": "c1", "name": "echo", "arguments": '{"a":1}'}]}),
        PastStep("TOOL_CALL", {"tool": "echo"}),
        PastStep("OBSERVATION", {"model_call_id": "c1", "status": "COMPLETED", "result": {"a": 1}}),
    ]
    assert conversation(ModelSpec("tiny", system_prompt="be brief"), "hi", steps) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "echo", "arguments": '{"a":1}'}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": '{"status":"COMPLETED","result":{"a":1}}'},
    ]


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (("c", "echo", '{"a":1}'), WantsTool("c", "echo", {"a": 1})),
        (("c", "echo", ""), WantsTool("c", "echo", {})),
        (
            ("c", "hammer", "{}"),
            CannotHaveTool("c", "hammer", "{}", "there is no tool 'hammer'; there are: echo, sleep"),
        ),
        (("c", "sleep", "{}"), CannotHaveTool("c", "sleep", "{}", "arguments: 'seconds' is a required property")),
        (("c", "echo", "[1]"), CannotHaveTool("c", "echo", "[1]", "arguments: [1] is not of type 'object'")),
        (
            ("c", "echo", '{"a":"\\u0000"}'),
            CannotHaveTool("c", "echo", '{"a":"\\u0000"}', "arguments: must not contain the character U+0000"),
        ),
    ],
)
def test_the_next_tool_call_is_checked(call: tuple[str, str, str], wanted: WantsTool | CannotHaveTool) -> None:
    asked = msgspec.to_builtins(AskedTool(*call))
    steps = [PastStep("MODEL_CALL", {"content": "", "tool_calls": [asked]})]
    assert next_tool_call(steps, {name: DEFAULTS[name] for name in ("echo", "sleep")}) == wanted


def test_tool_calls_are_made_in_the_models_order_and_then_it_is_asked_again() -> None:
    asked = [msgspec.to_builtins(AskedTool(id_, "echo", "{}")) for id_ in ("a", "b")]
    steps = [PastStep("MODEL_CALL", {"content": "", "tool_calls": asked})]
    seen = []
    for _ in range(3):
        wanted = next_tool_call(steps, DEFAULTS)
        seen.append(wanted.model_call_id if wanted is not None else None)
        steps += [PastStep("TOOL_CALL", {}), PastStep("OBSERVATION", {})]
    assert seen == ["a", "b", None]


@pytest.mark.parametrize(
    ("model", "settings", "field"),
    [
        ({}, Settings("", "", model_base_url="http://m/v1"), "model"),
        ({"model": "m", "colour": "red"}, Settings("", "", model_base_url="http://m/v1"), "model"),
        ({"model": "m"}, Settings("", ""), "model.base_url"),
        ({"model": "m", "base_url": "http://evil.net/v1"}, Settings("", "", model_allow=("m",)), "model.base_url"),
        ({"model": "m", "base_url": "http://m/v1?x=1"}, Settings("", "", model_allow=("m",)), "model.base_url"),
        ({"model": "m", "tools": ["hammer"]}, Settings("", "", model_base_url="http://m/v1"), "model.tools[0]"),
    ],
)
async def test_a_model_that_cannot_be_asked_is_refused(
    tenant: Tenant, model: dict[str, Any], settings: Settings, field: str
) -> None:
    with pytest.raises(Invalid) as refused:
        async with tenant.database.begin() as connection:
            await create_agent(connection, tenant.workspace_id, "model", model=model, settings=settings)
    assert refused.value.extensions["field"] == field
