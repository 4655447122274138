"""Who the runs have to do with outside of the database: agents, their tools and models, and those who approve.

A tool takes simulated time, may fail, and may take longer than it may. A model answers with tool calls, some of which
it cannot have, and in the end with its last word. The lease of whoever waits is renewed by the engine's own code.
"""

from __future__ import annotations

import dataclasses
import random
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from service.auth import Caller, Role
from service.outside import Outside, Started
from service.quota.limits import LIFTED
from service.runs import StepKind
from service.toolcalls import Definition, Risk
from service.tools import Executed
from service.turns import Answered, AskedTool, GaveUp
from service.workspaces import KnownAgent, ModelSpec, ScriptStep
from tests.simulator.calls import ADMIN, MOST_PENDING, NEEDS_APPROVAL, OPERATOR, OTHER_ADMIN, VIEWER

WORKSPACE = uuid.UUID(int=1)
HOUR_MS = 3_600_000.0
TOOL_TIMEOUT_S, MODEL_TIMEOUT_S = 4.0, 20.0

TAKES_S = (0.0, 0.05, 0.5, 3.0, 3600.0)
"""How long tools and models take, seconds; they are not let."""

M, O, T = StepKind.MODEL_CALL, StepKind.OBSERVATION, StepKind.TOOL_CALL  # noqa: E741 - as in a script
SCRIPTS: tuple[tuple[ScriptStep, ...], ...] = (
    (ScriptStep(M), ScriptStep(O)),
    (ScriptStep(M),),
    (ScriptStep(M, latency_ms=300.0), ScriptStep(O), ScriptStep(M, latency_ms=1500.0)),
    (ScriptStep(T, error="out of tea"),),
    (ScriptStep(M), ScriptStep(T, latency_ms=40.0, error="out of milk")),
    (ScriptStep(M, latency_ms=HOUR_MS),),  # hung, for all that a caller can tell
    (ScriptStep(T, tool="look"), ScriptStep(M)),
    (ScriptStep(M), ScriptStep(T, tool="change", latency_ms=200.0), ScriptStep(M, latency_ms=40.0)),
    (ScriptStep(T, tool="drop"), ScriptStep(T, tool="quick"), ScriptStep(T, tool="ask")),
    (ScriptStep(T, tool="look"), ScriptStep(T, tool="quick"), ScriptStep(T, tool="look")),  # one more than it may
)
PLAIN_SCRIPTS = range(6)
TOOL_SCRIPTS = range(6, len(SCRIPTS))
MODEL = len(SCRIPTS)
"""The agent that is a model."""

MODEL_TOOLS = ("look", "quick", "ask", "change", "drop")
AGENTS: Mapping[uuid.UUID, KnownAgent] = {
    **{uuid.UUID(int=number): KnownAgent(WORKSPACE, script) for number, script in enumerate(SCRIPTS)},
    uuid.UUID(int=9): KnownAgent(WORKSPACE, SCRIPTS[9], max_tool_calls=2),
    uuid.UUID(int=MODEL): KnownAgent(WORKSPACE, (), ModelSpec("m", tools=MODEL_TOOLS), max_steps=14, max_tool_calls=3),
}

RISKS = {"look": Risk.SAFE, "quick": Risk.ELEVATED, "ask": Risk.SAFE, "change": Risk.ELEVATED, "drop": Risk.DANGEROUS}
DEFINITIONS = {
    name: Definition(name, "echo", risk, NEEDS_APPROVAL[name], {"type": "object"}, TOOL_TIMEOUT_S)
    for name, risk in RISKS.items()
}

QUOTA = dataclasses.replace(LIFTED, pending_tool_calls=MOST_PENDING, pending_tool_calls_per_run=1)

APPROVERS = tuple(
    Caller(token_id, WORKSPACE, role, None)
    for token_id, role in (
        (VIEWER, Role.VIEWER),
        (OPERATOR, Role.OPERATOR),
        (ADMIN, Role.ADMIN),
        (OTHER_ADMIN, Role.ADMIN),
    )
)
"""A viewer, who may decide on nothing; an operator, who may not decide on what is dangerous; and two who may."""

Sleep = Callable[[float], Awaitable[None]]


class Models:
    """In place of `service.agents.Models`: answers after a while, or never in time."""

    def __init__(self, rng: random.Random, sleep: Sleep, takes_s: Sequence[float]) -> None:
        self._rng = rng
        self._sleep = sleep
        self._takes_s = takes_s

    async def ask(
        self, spec: ModelSpec, messages: Sequence[Mapping[str, Any]], tools: Mapping[str, Definition]
    ) -> Answered | GaveUp:
        """Answer with up to three tool calls; the content says how many messages it was asked with."""
        rng = self._rng
        await self._sleep(min(rng.choice(self._takes_s), MODEL_TIMEOUT_S))
        if rng.random() < 0.04:
            return GaveUp("the model's endpoint answered 400")
        asked = [self._call() for _ in range(rng.choice((0, 0, 1, 1, 2, 3)))]
        return Answered("m", str(len(messages)), asked, None, {}, 1, 0.0)

    def _call(self) -> AskedTool:
        name = self._rng.choice((*MODEL_TOOLS, "nothing"))
        return AskedTool(f"call-{self._rng.getrandbits(40)}", name, "no JSON" if self._rng.random() < 0.1 else "{}")

    async def close(self) -> None:
        return


class Outsiders(Outside):
    """The engine's own way to the outside, and a world where its own would be."""

    def __init__(
        self,
        database: Any,
        lease_s: float,
        rng: random.Random,
        sleep: Sleep,
        started: Callable[[uuid.UUID], None],
        takes_s: Sequence[float],
    ) -> None:
        super().__init__(database, lease_s, sleep=sleep)
        self._models = Models(rng, sleep, takes_s)  # type: ignore[assignment]
        self._rng = rng
        self._takes_s = takes_s
        self._started = started

    async def _execute(self, started: Started) -> Executed:
        """Let the tool have its effect, which is noted, and take its time."""
        self._started(started.tool_call_id)
        takes_s = self._rng.choice(self._takes_s)
        await self._sleep(min(takes_s, started.timeout_seconds))
        if takes_s > started.timeout_seconds:
            return Executed(error=f"timed out after {started.timeout_seconds:g} s")
        return Executed(error="failed as asked") if self._rng.random() < 0.2 else Executed({"took_s": takes_s})
