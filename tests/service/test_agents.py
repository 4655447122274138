"""A model's agent against a local server that speaks the chat-completions protocol, over real sockets."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from structlog.typing import EventDict

from service.agents import ATTEMPTS, Models, PastStep, conversation, next_tool_call
from service.errors import Invalid
from service.joins import JoinPolicy
from service.outside import Outside
from service.settings import Settings
from service.tallies import Tallies
from service.tick import Ticker
from service.toolcalls import DEFAULTS, create_definition
from service.turns import Answered, AskedTool, CannotHaveTool, GaveUp, WantsTool
from service.worker import Worker
from service.workspaces import Agents, ModelSpec, create_agent
from tests.localserver import serving
from tests.tenants import Tenant, drain

KEY = "sk-only-the-endpoint-may-see-this"
SAYS_HELLO = {"message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}


def completion(content: str | None = None, *calls: tuple[str, str, str]) -> Response:
    """Return a chat completion as the protocol has it."""
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if calls:
        message["tool_calls"] = [
            {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
            for id_, name, arguments in calls
        ]
    return JSONResponse(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "tiny-2026",
            "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop"}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
        }
    )


@dataclass
class Endpoint:
    """A server that answers with what it was given, in turn, and keeps what it was asked."""

    url: str = ""
    answers: list[Response] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    hold: asyncio.Event | None = None

    async def answer(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {KEY}":
            message = f"Incorrect API key provided: {request.headers.get('authorization', '')[7:]}."
            return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, 401)
        self.asked.append(msgspec.json.decode(await request.body()))
        if self.hold is not None:
            await self.hold.wait()
        return self.answers.pop(0)

    def settings(self, **more: Any) -> Settings:
        """Return settings that allow this endpoint."""
        return Settings("", "", **{"model_base_url": f"{self.url}/v1", "model_key": KEY, **more})


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    """A local endpoint."""
    made = Endpoint()
    async with serving(Starlette(routes=[Route("/v1/chat/completions", made.answer, methods=["POST"])])) as url:
        made.url = url
        yield made


SPEC = ModelSpec("tiny")
MESSAGES = [{"role": "user", "content": "hi"}]


class Pauses(list[float]):
    """Stands in for sleep and keeps how long it would have taken."""

    async def __call__(self, pause_s: float) -> None:
        self.append(pause_s)


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


@asynccontextmanager
async def ticking(tenant: Tenant, settings: Settings) -> AsyncIterator[Ticker]:
    """A worker's hands that may ask models."""
    outside = Outside(tenant.database, Settings.lease_s, settings, Pauses())
    yield Ticker(tenant.database, tenant.announcer, Agents(), Tallies(), Settings.lease_s, outside)
    await outside.close()


async def model_agent(tenant: Tenant, endpoint: Endpoint, *tools: str, **more: Any) -> uuid.UUID:
    """Make an agent that asks the endpoint."""
    async with tenant.database.begin() as connection:
        model = {"model": "tiny", "system_prompt": "be brief", "tools": list(tools)}
        return await create_agent(
            connection, tenant.workspace_id, "model", model=model, settings=endpoint.settings(), **more
        )


async def test_a_model_calls_its_tools_and_has_the_last_word(tenant: Tenant, endpoint: Endpoint) -> None:
    endpoint.answers = [
        completion(None, ("c1", "echo", '{"a":1}'), ("c2", "hammer", "{}")),
        completion("done"),
    ]
    run_id = await tenant.run(await model_agent(tenant, endpoint, "echo"))

    async with ticking(tenant, endpoint.settings()) as ticker:
        await drain(ticker)

    steps = await tenant.rows("SELECT kind, payload FROM steps WHERE run_id = :id ORDER BY step_index", id=run_id)
    assert [step["kind"] for step in steps] == [
        "MODEL_CALL",
        "TOOL_CALL",
        "OBSERVATION",
        "TOOL_CALL",
        "OBSERVATION",
        "MODEL_CALL",
        "MESSAGE",
    ]
    assert steps[0]["payload"]["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    assert (steps[2]["payload"]["model_call_id"], steps[2]["payload"]["result"]) == ("c1", {"a": 1})
    assert steps[4]["payload"]["error"] == "there is no tool 'hammer'; there are: echo"
    assert steps[6]["payload"] == {"content": "done"}
    assert [message["role"] for message in endpoint.asked[1]["messages"]] == [
        "system",
        "user",
        "assistant",
        "tool",
        "tool",
    ]
    assert await tenant.status(run_id) == "COMPLETED"
    assert await tenant.faults() == []
    stored = await tenant.rows(
        "SELECT runs::text, steps::text, events::text, agents::text FROM runs, steps, events, agents"
    )
    assert KEY not in str(stored)


async def test_a_model_that_wants_a_guarded_tool_waits_for_a_person(tenant: Tenant, endpoint: Endpoint) -> None:
    async with tenant.database.begin() as connection:
        await create_definition(connection, tenant.workspace_id, "guarded", "echo", "DANGEROUS")
    endpoint.answers = [completion(None, ("c1", "guarded", "{}"))]
    run_id = await tenant.run(await model_agent(tenant, endpoint, "guarded"))

    async with ticking(tenant, endpoint.settings()) as ticker:
        await drain(ticker)

    assert await tenant.status(run_id) == "WAITING_FOR_APPROVAL"
    assert await tenant.rows("SELECT status, model_call_id FROM tool_calls") == [
        {"status": "PENDING", "model_call_id": "c1"}
    ]


async def test_a_model_that_cannot_be_asked_fails_its_run(tenant: Tenant, endpoint: Endpoint) -> None:
    run_id = await tenant.run(await model_agent(tenant, endpoint))

    async with ticking(tenant, endpoint.settings(model_key="wrong")) as ticker:
        await drain(ticker)

    row = await tenant.row(run_id)
    assert (row["status"], row["error_summary"]) == (
        "FAILED",
        "the model's endpoint answered 401: Incorrect API key provided: [key].",
    )
    assert await tenant.faults() == []


async def test_a_model_that_never_ends_is_ended(tenant: Tenant, endpoint: Endpoint) -> None:
    endpoint.answers = [completion(None, (f"c{n}", "echo", "{}")) for n in range(9)]
    bounds = ({"max_tool_calls": 2}, {"max_steps": 5})
    run_ids = [await tenant.run(await model_agent(tenant, endpoint, "echo", **bound)) for bound in bounds]

    async with ticking(tenant, endpoint.settings()) as ticker:
        await drain(ticker)

    assert [(await tenant.row(run_id))["error_summary"] for run_id in run_ids] == [
        "max_tool_calls: the run has requested 2 of 2 tool calls",
        "max_steps: the run has taken 4 of 5 steps and is not finished",
    ]
    assert await tenant.faults() == []


async def test_a_model_that_thinks_holds_up_nobody_and_nobody_else_asks_it(tenant: Tenant, endpoint: Endpoint) -> None:
    endpoint.hold, endpoint.answers = asyncio.Event(), [completion("at last")]
    outside = Outside(tenant.database, Settings.lease_s, endpoint.settings())
    ticker = Ticker(tenant.database, tenant.announcer, Agents(), Tallies(), Settings.lease_s, outside)
    worker = Worker(tenant.database, ticker, sweep_interval_s=0.05)
    thinking = await tenant.run(await model_agent(tenant, endpoint))
    scripted = await tenant.runs(20)

    working = asyncio.create_task(worker.work())
    await until(tenant, scripted, "COMPLETED")
    (first,) = await tenant.rows("SELECT epoch, next_tick_at FROM runs WHERE run_id = :id", id=thinking)
    for _ in itertools.count():  # its lease goes on, and so nobody claims it
        (later,) = await tenant.rows("SELECT epoch, next_tick_at FROM runs WHERE run_id = :id", id=thinking)
        if later["next_tick_at"] > first["next_tick_at"]:
            break
    endpoint.hold.set()
    await until(tenant, [thinking], "COMPLETED")
    worker.stop()
    await working
    await outside.close()

    assert (first["epoch"], later["epoch"], len(endpoint.asked)) == (1, 1, 1)
    assert await tenant.faults() == []


async def test_a_model_that_thinks_does_not_hold_up_the_deadline_of_a_group(tenant: Tenant, endpoint: Endpoint) -> None:
    endpoint.hold, endpoint.answers = asyncio.Event(), [completion("for nobody"), completion("at last")]
    outside = Outside(tenant.database, 5.0, endpoint.settings())
    ticker = Ticker(tenant.database, tenant.announcer, Agents(), Tallies(), 5.0, outside)
    worker = Worker(tenant.database, ticker, sweep_interval_s=0.05)
    hung = await tenant.agent({"kind": "MODEL_CALL", "latency_ms": 3_600_000})
    thinking = await tenant.run(await model_agent(tenant, endpoint))
    working = asyncio.create_task(worker.work())
    await until_asked(endpoint, 1)
    await tenant.spawn(thinking, hung, "g", join_policy=JoinPolicy.TIMEOUT, timeout_seconds=0.3)

    await until_asked(endpoint, 2)  # once more, after the turn that decided about the group
    groups = await tenant.rows("SELECT state FROM subrun_groups WHERE run_id = :run_id", run_id=thinking)
    endpoint.hold.set()
    await until(tenant, [thinking], "COMPLETED")
    worker.stop()
    await working
    await outside.close()

    assert groups == [{"state": "JOINED"}]
    assert await tenant.faults() == []


async def until_asked(endpoint: Endpoint, times: int) -> None:
    """Return when the endpoint was asked so often; the test's own timeout bounds it."""
    for _ in itertools.count():
        if len(endpoint.asked) >= times:
            return
        await asyncio.sleep(0)


async def test_a_cancelled_run_stops_waiting_for_its_model(tenant: Tenant, endpoint: Endpoint) -> None:
    endpoint.hold = asyncio.Event()
    outside = Outside(tenant.database, 0.05, endpoint.settings())
    ticker = Ticker(tenant.database, tenant.announcer, Agents(), Tallies(), 0.05, outside)
    run_id = await tenant.run(await model_agent(tenant, endpoint))
    claims = await ticker.claim()
    waiting = asyncio.create_task(ticker.outcomes(claims))
    for _ in itertools.count():
        if endpoint.asked:
            break
        await tenant.status(run_id)
    await tenant.write("UPDATE runs SET epoch = epoch + 1 WHERE run_id = :run_id", run_id=run_id)

    outcomes = await waiting
    await ticker.settle(claims, outcomes)
    endpoint.answers = [completion("nobody listens")]
    endpoint.hold.set()
    await outside.close()

    assert outcomes[run_id].means.move is None
    assert (await tenant.status(run_id), await tenant.steps(run_id)) == ("PENDING", [])


async def until(tenant: Tenant, run_ids: list[uuid.UUID], status: str) -> None:
    """Return when all runs have the status; the test's own timeout bounds it."""
    for _ in itertools.count():
        if set(await tenant.statuses(*run_ids)) == {status}:
            return


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
