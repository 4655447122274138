"""A model behind an OpenAI-compatible chat-completions endpoint: the conversation so far, the question, the answer.

The conversation is not kept anywhere: it is rebuilt from the run's steps each time (`conversation`), so whichever
worker asks next asks the same. A model's tool calls are made one after another, in the order of its answer
(`next_tool_call`); when all were observed, it is asked again. An answer without tool calls is the run's last word.

One question is tried several times: after 429, 5xx, a timeout or a broken connection, with a doubling pause, or with
the pause that Retry-After asks for. Anything else that is no answer would be the same the next time: it gives up at
once. The key is sent only to endpoints that the installation allows, and appears in no error, step or log line.

Source: OpenAI API reference, "Create chat completion"; RFC 9110, section 10.2.3 (Retry-After).
"""

from __future__ import annotations

import asyncio
import email.utils
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

import httpx
import msgspec

from service.settings import Settings
from service.toolcalls import Definition
from service.tools import registry, storable_text
from service.turns import Answered, AskedTool, CannotHaveTool, GaveUp, WantsTool
from service.workspaces import ModelSpec, endpoint_of

ATTEMPTS = 4
"""How often one question is sent at most."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""Pause before the second attempt, doubled for each further one; and the longest Retry-After that is waited for."""

CONNECT_TIMEOUT_S = 10.0

MAX_ANSWER_BYTES = 4 << 20
"""Largest answer that is read: 4 MiB."""

MAX_ERROR_CHARACTERS = 300
"""How much of an endpoint's own error message is told."""


class PastStep(NamedTuple):
    """A step that the run has taken."""

    kind: str
    payload: Mapping[str, Any]


class _Function(msgspec.Struct):
    name: str
    arguments: str = "{}"


class _ToolCall(msgspec.Struct):
    id: str
    function: _Function


class _Message(msgspec.Struct):
    content: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class _Completion(msgspec.Struct):
    """What is read of an answer; other fields are passed over."""

    choices: list[_Choice]
    model: str | None = None
    usage: _Usage | None = None


class _Transient(Exception):
    """An attempt failed in a way that may pass; `pause_s` is what the endpoint asks for."""

    def __init__(self, what: str, pause_s: float | None = None) -> None:
        super().__init__(what)
        self.pause_s = pause_s


def conversation(spec: ModelSpec, input_text: str, steps: Sequence[PastStep]) -> list[dict[str, Any]]:
    """Return the messages of the run so far, in the endpoint's form."""
    messages: list[dict[str, Any]] = []
    if spec.system_prompt is not None:
        messages.append({"role": "system", "content": spec.system_prompt})
    messages.append({"role": "user", "content": input_text})
    for step in steps:
        if step.kind == "MODEL_CALL":
            said: dict[str, Any] = {"role": "assistant", "content": step.payload["content"]}
            if step.payload["tool_calls"]:
                said["tool_calls"] = [
                    {
                        "id": call["id"],
                        "type": "function",
                        "function": {"name": call["name"], "arguments": call["arguments"]},
                    }
                    for call in step.payload["tool_calls"]
                ]
            messages.append(said)
        elif step.kind == "OBSERVATION":
            seen = {name: step.payload[name] for name in ("status", "result", "error") if name in step.payload}
            messages.append(
                {
                    "role": "tool",
                    "tool_call_id": step.payload["model_call_id"],
                    "content": msgspec.json.encode(seen).decode(),
                }
            )
    return messages


def next_tool_call(steps: Sequence[PastStep], tools: Mapping[str, Definition]) -> WantsTool | CannotHaveTool | None:
    """Return the first tool call of the model's last answer that was not observed yet; None when there is none."""
    asked: list[Mapping[str, Any]] = []
    observed = 0
    for step in steps:
        if step.kind == "MODEL_CALL":
            asked, observed = step.payload["tool_calls"], 0
        elif step.kind == "OBSERVATION":
            observed += 1
    if observed >= len(asked):
        return None
    call = asked[observed]
    id_, name, written = call["id"], call["name"], call["arguments"]
    if name not in tools:
        return CannotHaveTool(id_, name, written, f"there is no tool {name!r}; there are: {', '.join(sorted(tools))}")
    try:
        arguments = msgspec.json.decode(written or "{}")
        wrong = tools[name].explain_arguments(arguments)
    except (msgspec.DecodeError, RecursionError) as error:
        wrong = f"arguments: no valid JSON: {error}"
    if wrong is None and not isinstance(arguments, dict):
        wrong = "arguments: give a JSON object"
    if wrong is None and "\\u0000" in msgspec.json.encode(arguments).decode():
        wrong = "arguments: must not contain the character U+0000"
    if wrong is not None:
        return CannotHaveTool(id_, name, written, wrong)
    return WantsTool(id_, name, arguments)


class Models:
    """Asks models, for one worker process."""

    def __init__(self, settings: Settings, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        self._settings = settings
        self._sleep = sleep
        self._client: httpx.AsyncClient | None = None

    async def ask(
        self, spec: ModelSpec, messages: Sequence[Mapping[str, Any]], tools: Mapping[str, Definition]
    ) -> Answered | GaveUp:
        """Ask for the next message of a conversation."""
        base_url = endpoint_of(spec, self._settings)
        if base_url is None:
            return GaveUp("the model's endpoint is not allowed by this installation (PLIMSOLL_MODEL_ALLOW)")
        question: dict[str, Any] = {"model": spec.model, "messages": messages}
        if spec.temperature is not None:
            question["temperature"] = spec.temperature
        if tools:
            question["tools"] = [_described(tools[name]) for name in spec.tools if name in tools]
        body, pause_s = msgspec.json.encode(question), FIRST_PAUSE_S
        for attempt in range(1, ATTEMPTS + 1):
            started = time.perf_counter()
            try:
                answer = await self._attempt(f"{base_url}/chat/completions", body)
            except _Transient as fault:
                wait_s = pause_s if fault.pause_s is None else fault.pause_s
                if attempt == ATTEMPTS or wait_s > LONGEST_PAUSE_S:
                    asks = f" and asks to wait {wait_s:g} s" if wait_s > LONGEST_PAUSE_S else ""
                    return GaveUp(f"the model's endpoint {fault}{asks} ({attempt} of {ATTEMPTS} attempts)")
                await self._sleep(wait_s)
                pause_s *= 2
                continue
            if isinstance(answer, GaveUp):
                return answer
            return self._answered(spec, answer, attempt, (time.perf_counter() - started) * 1e3)
        raise AssertionError("unreachable: the last attempt returns")

    async def close(self) -> None:
        """Close the connections to endpoints."""
        if self._client is not None:
            await self._client.aclose()

    async def _attempt(self, url: str, body: bytes) -> _Completion | GaveUp:
        """Send the question once; raises _Transient."""
        try:
            async with asyncio.timeout(self._settings.model_timeout_s):
                status, headers, content = await self._post(url, body)
        except (TimeoutError, httpx.TimeoutException):
            raise _Transient(f"did not answer within {self._settings.model_timeout_s:g} s") from None
        except httpx.TransportError as fault:
            raise _Transient(f"cannot be reached ({type(fault).__name__})") from None
        except httpx.DecodingError:
            return GaveUp("the model's endpoint answered what does not have the encoding that it names")
        if status == 429 or status >= 500:
            raise _Transient(f"answered {status}", _retry_after_s(headers))
        if status != 200:
            message = self._without_key(_message_of(content))[:MAX_ERROR_CHARACTERS]
            return GaveUp(f"the model's endpoint answered {status}: {message}")
        if content is None:
            return GaveUp(f"the model's endpoint answered more than {MAX_ANSWER_BYTES} bytes")
        try:
            completion = msgspec.json.decode(content, type=_Completion)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as wrong:
            return GaveUp(f"the model's endpoint answered no chat completion: {self._without_key(str(wrong))[:200]}")
        return completion if completion.choices else GaveUp("the model's endpoint answered without any choice")

    async def _post(self, url: str, body: bytes) -> tuple[int, httpx.Headers, bytes | None]:
        """Return status, headers and body of an answer; None for a body that is too large."""
        if self._client is None:
            self._client = httpx.AsyncClient(
                timeout=httpx.Timeout(self._settings.model_timeout_s, connect=CONNECT_TIMEOUT_S),
                limits=httpx.Limits(max_connections=None),
                follow_redirects=False,
                trust_env=False,
            )
        headers = {"content-type": "application/json", "accept": "application/json"}
        if self._settings.model_key is not None:
            headers["authorization"] = f"Bearer {self._settings.model_key}"
        async with self._client.stream("POST", url, content=body, headers=headers) as response:
            content = b""
            async for part in response.aiter_bytes():
                content += part
                if len(content) > MAX_ANSWER_BYTES:
                    return response.status_code, response.headers, None
            return response.status_code, response.headers, content

    def _answered(self, spec: ModelSpec, completion: _Completion, attempts: int, duration_ms: float) -> Answered:
        message = completion.choices[0].message
        return Answered(
            model=self._kept(completion.model or spec.model),
            content=self._kept(message.content or ""),
            tool_calls=[
                AskedTool(self._kept(call.id), self._kept(call.function.name), self._kept(call.function.arguments))
                for call in message.tool_calls or ()
            ],
            finish_reason=None
            if completion.choices[0].finish_reason is None
            else self._kept(completion.choices[0].finish_reason),
            usage={} if completion.usage is None else msgspec.structs.asdict(completion.usage),
            attempts=attempts,
            duration_ms=round(duration_ms, 3),
        )

    def _kept(self, text: str) -> str:
        """Return a text of the endpoint's as it may be stored."""
        return storable_text(self._without_key(text))

    def _without_key(self, text: str) -> str:
        key = self._settings.model_key
        return text if key is None else text.replace(key, "[key]")


def _described(definition: Definition) -> dict[str, Any]:
    """Return a definition as the endpoint wants to know it."""
    tool = registry().get(definition.tool)
    schema = definition.arguments_schema
    if tool is not None and schema in ({}, {"type": "object"}):
        schema = dict(tool.schema)
    described = {"name": definition.name, "parameters": schema}
    if tool is not None:
        described["description"] = tool.description
    return {"type": "function", "function": described}


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that Retry-After asks for, given as a number or as a date; None when it asks for nothing."""
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.replace(".", "", 1).isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):  # no date, or one in a year that nobody can count to
        return None


def _message_of(content: bytes | None) -> str:
    """Return an endpoint's own error message, in one line."""
    try:
        told = msgspec.json.decode(content or b"")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "no message"
    error = told.get("error") if isinstance(told, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    if not isinstance(message, str):
        return "no message"
    return storable_text(" ".join(message.split()))
