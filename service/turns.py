"""What was found out, outside of any transaction, for the next turn of a claimed run.

Pure data, made by `tick` and `outside`, read by `advance`. A scripted agent has its script and the definitions of the
tools that it names. A model's agent has one move: the model's answer, the next tool call of its last answer, or the
reason why there is none. All of it counts only if the run's epoch still is the one that was claimed.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from service.toolcalls import Definition
from service.workspaces import MOST_STEPS, MOST_TOOL_CALLS, ScriptStep


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


class Delay(NamedTuple):
    """What a turn is told whose workspace is over its tick rate."""

    by: dt.timedelta
    under: str  # the rate (`Rate.code`)


class Means(msgspec.Struct, frozen=True):
    """What a run has at hand for one turn, beside its agent's script."""

    tools: Mapping[str, Definition] = {}
    """The definitions of the tools that the agent names."""
    move: Move | None = None
    """What a model's agent does; null for a script, and for a turn that is no step of the agent."""
    is_model: bool = False
    """Whether the agent is a model: without a move it has nothing to do."""
    new_tool_call_id: uuid.UUID = uuid.UUID(int=0)
    """For the tool call that this turn may request."""
    max_steps: int = MOST_STEPS
    max_tool_calls: int = MOST_TOOL_CALLS
    room: bool = True
    """Whether the workspace may have one more tool call that waits for approval."""
    step: bool = True
    """Whether the step was due when the run was claimed: whoever comes for something else has not paid for it."""
    delay: Delay | None = None
    """The step is put off, because the workspace is over its tick rate."""

    def wants(self, script: Sequence[ScriptStep], position: int) -> Wanted | None:
        """Return the tool call that a step at this position of the script, or the model's move, asks for."""
        if isinstance(self.move, WantsTool):
            move = self.move
            return Wanted(self.tools[move.tool], move.arguments, move.model_call_id)
        if position >= len(script) or script[position].tool is None:
            return None
        step = script[position]
        return Wanted(self.tools[step.tool or ""], step.arguments, None)


class Wanted(NamedTuple):
    """A tool call that a turn is about to request."""

    definition: Definition
    arguments: dict[str, Any]
    model_call_id: str | None


PLAIN = Means()
"""Of a script without tools."""

NO_STEP = Means(step=False)
"""Of a turn that comes for something else than its step."""
