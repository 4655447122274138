"""A local server that speaks the chat-completions protocol, and answers as a test tells it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.settings import Settings

KEY = "sk-only-the-endpoint-may-see-this"


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


class Pauses(list[float]):
    """Stands in for sleep and keeps how long it would have taken."""

    async def __call__(self, pause_s: float) -> None:
        self.append(pause_s)
