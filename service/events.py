"""Events: immutable numbered facts about runs. Appended in a transaction, published after its commit, followed live.

Invariants: `seq` of a run starts at 1, has no gaps and is never reused: it is counted on the run's own row, under that
row's lock. What is published is only a wake-up with a copy of the events: whoever follows a run reads the database
first and drops what it has seen, so Redis may lose any message.

One message carries all events that one commit gave one workspace: the tenant is also the channel.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import redis.asyncio
import structlog
from redis.asyncio.client import PubSub
from sqlalchemy import ForeignKey
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from service.db import Base
from service.runs import Instant

log = structlog.get_logger()


class EventType(enum.StrEnum):
    """What happened to a run."""

    RUN_CREATED = "run_created"  # the run was accepted
    STATE_CHANGED = "state_changed"  # its status changed: payload has `from` and `to`
    STEP_CREATED = "step_created"  # a step was written: payload has `step_index` and `kind`
    TOOL_CALL_REQUESTED = "tool_call_requested"  # a tool call waits for approval or execution
    TOOL_CALL_APPROVED = "tool_call_approved"  # somebody allowed it
    TOOL_CALL_REJECTED = "tool_call_rejected"  # somebody refused it
    TOOL_CALL_COMPLETED = "tool_call_completed"  # it was executed
    SUBRUN_SPAWNED = "subrun_spawned"  # a child was accepted: payload has `child_run_id`
    SUBRUN_COMPLETED = "subrun_completed"  # a child ended COMPLETED
    SUBRUN_FAILED = "subrun_failed"  # a child ended FAILED
    SUBRUN_CANCELLED = "subrun_cancelled"  # a child ended CANCELED
    RUN_ARCHIVED = "run_archived"  # a verified bundle of the run exists


class Event(Base, kw_only=True):
    """One immutable numbered fact about a run."""

    __tablename__ = "events"

    run_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("runs.run_id"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    """From 1, without gaps, never reused."""
    event_type: Mapped[str]
    """An EventType."""
    payload: Mapped[dict[str, Any]] = mapped_column(JSONB)
    correlation_id: Mapped[uuid.UUID]
    created_at: Mapped[dt.datetime] = mapped_column(Instant)


class NewEvent(msgspec.Struct, frozen=True):
    """An event about to be appended; the database stamps `created_at`."""

    run_id: uuid.UUID
    seq: int
    event_type: EventType
    payload: dict[str, Any]
    correlation_id: uuid.UUID
    workspace_id: uuid.UUID  # whose channel carries it


APPEND_EVENTS = """
    INSERT INTO events (run_id, seq, event_type, payload, correlation_id, created_at)
    SELECT run_id, seq, event_type, payload, correlation_id, now()
    FROM json_to_recordset(CAST(:events AS json))
        AS e(run_id uuid, seq int, event_type text, payload jsonb, correlation_id uuid)
"""
"""The one statement that writes events, for use inside a transaction's set statement."""


class Published(msgspec.Struct, frozen=True):
    """What one commit tells the followers of one workspace."""

    created_at: dt.datetime  # the transaction's instant, shared by all its events
    events: list[NewEvent]


def channel(workspace_id: uuid.UUID) -> str:
    """Return the name of the Redis channel that carries a workspace's events."""
    return f"plimsoll:events:{{{workspace_id}}}"


def messages(events: Iterable[NewEvent], created_at: dt.datetime) -> list[tuple[str, bytes]]:
    """Group one commit's events into one message for each workspace: (channel, body)."""
    by_workspace: dict[uuid.UUID, list[NewEvent]] = {}
    for event in events:
        by_workspace.setdefault(event.workspace_id, []).append(event)
    return [
        (channel(workspace_id), msgspec.json.encode(Published(created_at, its)))
        for workspace_id, its in by_workspace.items()
    ]


class Following:
    """One process's ear on Redis: wakes whoever follows a run when events of it were committed anywhere.

    A subscription is shared by all followers of a workspace in this process and ends with the last of them. While
    Redis is away nobody is woken; followers look at the database again when their own patience ends.
    """

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._client = client
        self._followers: dict[uuid.UUID, dict[uuid.UUID, set[asyncio.Event]]] = {}  # workspace -> run -> bells
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def follow(self, workspace_id: uuid.UUID, run_id: uuid.UUID) -> AsyncIterator[asyncio.Event]:
        """Yield a bell that is set whenever events of the run were committed; the caller clears it."""
        bell = asyncio.Event()
        runs = self._followers.setdefault(workspace_id, {})
        runs.setdefault(run_id, set()).add(bell)
        self._changed.set()
        if self._task is None:
            self._task = asyncio.create_task(self._listen(), name="follow events")
        try:
            yield bell
        finally:
            runs[run_id].discard(bell)
            if not runs[run_id]:
                del runs[run_id]
            if not runs:
                self._followers.pop(workspace_id, None)
            self._changed.set()

    async def close(self) -> None:
        """Stop listening."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _wake(self, workspace_id: uuid.UUID, run_ids: Iterable[uuid.UUID] | None = None) -> None:
        """Ring the bells of some runs of a workspace, or of all that are followed."""
        runs = self._followers.get(workspace_id, {})
        for run_id in list(runs) if run_ids is None else run_ids:
            for bell in runs.get(run_id, ()):
                bell.set()

    async def _listen(self) -> None:
        """Hold the subscription up for as long as the process lives; a lost connection is made anew."""
        while True:
            try:
                async with self._client.pubsub(ignore_subscribe_messages=False) as pubsub:
                    await self._serve(pubsub)
            except (redis.RedisError, OSError) as fault:
                log.warning("following events interrupted", fault=str(fault))
                await asyncio.sleep(0.5)

    async def _serve(self, pubsub: PubSub) -> None:
        """Keep the subscriptions equal to what is followed and pass each message on."""
        subscribed: set[uuid.UUID] = set()
        while True:
            self._changed.clear()
            wanted = set(self._followers)
            if wanted - subscribed:
                await pubsub.subscribe(*(channel(w) for w in wanted - subscribed))
            if subscribed - wanted:
                await pubsub.unsubscribe(*(channel(w) for w in subscribed - wanted))
            subscribed = wanted
            if not subscribed:
                await self._changed.wait()
                continue
            message = await pubsub.get_message(timeout=0.25)
            if message is None:
                continue
            workspace_id = uuid.UUID(message["channel"].decode().rpartition("{")[2].rstrip("}"))
            if message["type"] == "subscribe":
                self._wake(workspace_id)  # what was committed before the subscription held
            elif message["type"] == "message":
                published = msgspec.json.decode(message["data"], type=Published)
                self._wake(workspace_id, {event.run_id for event in published.events})
