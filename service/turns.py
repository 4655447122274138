"""A turn: what was found out, outside of any transaction, about what a claimed run does next.

Pure data, made by `tick` and `outside`, read by `advance`. A scripted agent's turn is its script and the definitions of
the tools that it names. A model's turn holds one move: the model's answer, the next tool call of its last answer, or the
reason why there is none. What a turn says counts only if the run's epoch still is the one that was claimed.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import msgspec

from service.toolcalls import Definition
from service.workspaces import KnownAgent


class AskedTool(msgspec.Struct, frozen=True):
    """A tool call that a model's answer asks for."""

    id: str  # the model's own name for it
    name: str
    arguments: str  # a JSON text, as the model wrote it


class Answered(msgspec.Struct, frozen=True):
    """The model answered."""

    model: str  # as the endpoint names it
    content: str
    tool_calls: list[AskedTool]
    finish_reason: str | None
    usage: dict[str, int]  # prompt_tokens, completion_tokens, total_tokens; empty when the endpoint does not tell
    attempts: int
    duration_ms: float  # of the attempt that was answered


class WantsTool(msgspec.Struct, frozen=True):
    """The next tool call of the model's last answer, which nothing forbids."""

    model_call_id: str  # the model's own name for it
    tool: str
    arguments: dict[str, Any]


class CannotHaveTool(msgspec.Struct, frozen=True):
    """The next tool call of the model's last answer names no tool of the agent, or its arguments do not fit."""

    model_call_id: str
    tool: str
    arguments: str
    error: str


class GaveUp(msgspec.Struct, frozen=True):
    """The model could not be asked, and asking again would not help."""

    error: str


Move = Answered | WantsTool | CannotHaveTool | GaveUp


class Turn(msgspec.Struct, frozen=True):
    """What one claimed run does next."""

    agent: KnownAgent
    new_tool_call_id: uuid.UUID  # for the tool call that this turn may request
    tools: Mapping[str, Definition] = {}
    """The definitions of the tools that the agent names."""
    move: Move | None = None
    """What a model's agent does; null for a script, and for a turn that is no step of the agent."""
    pending_cap: int | None = None
    """How many tool calls of the workspace may wait for approval at once; null: any number."""
    pending_cap_per_run: int | None = None
    """The same for one run."""
