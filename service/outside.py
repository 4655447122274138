"""What a turn waits for outside of the database: a tool that runs, a model that answers. In no transaction.

A tool call that may be executed goes through two statements and a turn. *Start* turns it RUNNING; it holds the run's
row lock and finds the epoch that was claimed, so of two workers that hold one run only the later one can start it, and
no call is started twice. Then the tool runs, at most for its timeout. *Record* writes its end on the row. The turn that
follows reads the row and writes the steps. A worker that dies in between leaves the call RUNNING; when its lease has
passed, the next turn ends it FAILED, because nobody knows how far it came (`advance`).

A model is asked with what the run's steps say. Nothing is recorded before the turn: an answer that comes too late is
lost, and the next worker asks again.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

import structlog
from sqlalchemy import text

from service.agents import Models, PastStep, conversation, next_tool_call
from service.claim_leases import LeaseLost, Leases
from service.db import Database, is_outage, rows
from service.settings import Settings
from service.toolcalls import Definition, ToolCallStatus
from service.tools import Executed, ToolContext, execute, registry
from service.turns import GaveUp, Move
from service.workspaces import KnownAgent

log = structlog.get_logger()

_START = text("""
    WITH held AS (
        SELECT run_id, tool_call_id FROM runs
        WHERE run_id = :run_id AND epoch = :epoch AND ended_at IS NULL AND status <> 'PAUSED' FOR NO KEY UPDATE
    )
    UPDATE tool_calls t SET status = 'RUNNING', started_at = clock_timestamp(), epoch = :epoch,
                            lease_until = clock_timestamp() + make_interval(secs => :lease_s)
    FROM held WHERE t.tool_call_id = held.tool_call_id AND t.status = 'APPROVED'
    RETURNING t.tool_call_id, t.run_id, t.implementation, t.arguments, t.timeout_seconds
""")

_RECORD = text("""
    UPDATE tool_calls t SET status = e.status, result = e.result, error = e.error, ended_at = clock_timestamp()
    FROM json_to_recordset(CAST(:ended AS json)) AS e(tool_call_id uuid, status text, result jsonb, error text)
    WHERE t.tool_call_id = e.tool_call_id AND t.status = 'RUNNING'
""")

_READ_RUN = text("""
    SELECT input_text, EXISTS (
        SELECT 1 FROM subrun_groups g WHERE g.run_id = runs.run_id AND g.state = 'WAITING' AND g.deadline_at <= now()
    ) AS is_overdue
    FROM runs WHERE run_id = :run_id
""")
_READ_STEPS = text("SELECT kind, payload FROM steps WHERE run_id = :run_id ORDER BY step_index")

RECORD_AGAIN_AFTER_S = (0.2, 1.0, 3.0)
"""Pauses before the end of a tool is recorded again when the database was away; the tool cannot be started again."""

INTERRUPTED = "interrupted: the worker was stopped while the tool was running"


class Started(NamedTuple):
    """A tool call that this worker, and no other ever, has started."""

    tool_call_id: uuid.UUID
    run_id: uuid.UUID
    implementation: str
    arguments: Mapping[str, object]
    timeout_seconds: float


class Outside:
    """Executes tools and asks models, for one worker."""

    def __init__(
        self,
        database: Database,
        lease_s: float,
        settings: Settings | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._database = database
        self._leases = Leases(database, lease_s)
        self._settings = settings or Settings(database_url="", redis_url="")
        self._models = Models(self._settings, sleep)
        self._sleep = sleep

    async def close(self) -> None:
        """Close the connections to endpoints."""
        await self._models.close()

    async def run_tool(self, run_id: uuid.UUID, epoch: int) -> None:
        """Start the claimed run's tool call if it may be executed, let its tool run, and record its end."""
        async with self._database.begin() as connection:
            row = (
                await connection.execute(_START, {"run_id": run_id, "epoch": epoch, "lease_s": self._leases.lease_s})
            ).first()
        if row is None:
            return
        started = Started(*row)
        try:
            async with self._leases.hold(run_id, epoch, started.tool_call_id):
                await self._record(started, await self._execute(started))
        except LeaseLost:
            log.info("a tool is not waited for any more", tool_call_id=str(started.tool_call_id))
        except asyncio.CancelledError:
            await asyncio.shield(self._record(started, Executed(error=INTERRUPTED)))
            raise

    async def _execute(self, started: Started) -> Executed:
        tool = registry().get(started.implementation)
        if tool is None:
            return Executed(error=f"the tool {started.implementation!r} is not installed on this worker")
        context = ToolContext(str(started.tool_call_id), str(started.run_id), self._settings.http_get_allow)
        return await execute(tool, started.arguments, context, started.timeout_seconds)

    async def _record(self, started: Started, ended: Executed) -> None:
        """Write how a started call ended, unless it was ended meanwhile; waits a while for a database that is away."""
        status = ToolCallStatus.COMPLETED if ended.error is None else ToolCallStatus.FAILED
        row = {"tool_call_id": started.tool_call_id, "status": status, "result": ended.result, "error": ended.error}
        for pause_s in (*RECORD_AGAIN_AFTER_S, None):
            try:
                async with self._database.begin() as connection:
                    await connection.execute(_RECORD, {"ended": rows([row])})
            except Exception as fault:
                if pause_s is None or not is_outage(fault):
                    raise
                await self._sleep(pause_s)
            else:
                return

    async def find_move(
        self, run_id: uuid.UUID, epoch: int, agent: KnownAgent, tools: Mapping[str, Definition]
    ) -> Move | None:
        """Say what a model's claimed run does next.

        None when the claim was lost while the model was thinking, and when the time of a group of its subruns is over:
        that is decided by a turn at once, and the model is asked in the turn after it.
        """
        if agent.model is None:
            raise ValueError("the agent is no model")
        async with self._database.read() as connection:
            input_text, is_overdue = (await connection.execute(_READ_RUN, {"run_id": run_id})).one()
            if is_overdue:
                return None
            steps = [PastStep(*row) for row in await connection.execute(_READ_STEPS, {"run_id": run_id})]
        wanted = next_tool_call(steps, tools)
        if wanted is not None:
            return wanted
        own = sum(step.kind != "SUBRUN_SPAWN" for step in steps)
        if own >= agent.max_steps:  # the answer could not be written: do not pay for it
            return GaveUp(f"max_steps: the run has taken {own} of {agent.max_steps} steps and is not finished")
        try:
            async with self._leases.hold(run_id, epoch):
                return await self._models.ask(agent.model, conversation(agent.model, input_text, steps), tools)
        except LeaseLost:
            return None
