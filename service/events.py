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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import msgspec
import redis.asyncio
import structlog
from redis.asyncio.client import PubSub
from sqlalchemy import ForeignKey
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from service.db import Base
from service.rediswire import open_redis
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


INSTANT = "coalesce(CAST(:now AS timestamptz), now())"
"""What stamps all that a statement writes: the instant that was read with the locks held. A transaction may have waited
for them, so that its own `now()` lies before that of whoever wrote last; null where nothing was locked."""

APPEND_EVENTS = f"""
    INSERT INTO events (run_id, seq, event_type, payload, correlation_id, created_at)
    SELECT run_id, seq, event_type, payload, correlation_id, {INSTANT}
    FROM json_to_recordset(CAST(:events AS json))
        AS e(run_id uuid, seq int, event_type text, payload jsonb, correlation_id uuid)
"""  # noqa: S608 - a constant
"""The one statement that writes events, for use inside a transaction's set statement."""


class Published(msgspec.Struct, frozen=True):
    """What one commit tells the followers of one workspace."""

    created_at: dt.datetime  # the transaction's instant, shared by all its events
    events: list[NewEvent]


_DECODER = msgspec.json.Decoder(Published)


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


Listener: TypeAlias = Callable[[uuid.UUID, "Published | None"], None]
"""Hears every message of a workspace; None says that messages may have been lost, so look at the database."""

RETRY_S = 0.5
"""Pause before Redis is tried again, seconds."""

PING_EVERY_S = 2.0
"""How often a quiet connection is asked whether it still lives, seconds."""

SILENCE_S = 6.0
"""How long a connection that was asked may stay silent before it is given up as half-open, seconds."""


class Following:
    """One process's ear on Redis: tells whoever follows a workspace what was committed anywhere.

    A subscription is shared by all followers of a workspace in this process and ends with the last of them. Followers
    are also told when a subscription begins to hold, first or again: what was published before is not repeated. While
    Redis is away nobody is told anything; followers look at the database by themselves.
    """

    def __init__(self, redis_url: str) -> None:
        # A lost connection must be seen here and not be mended below: two tasks use it, and each subscription that is
        # made anew must be answered with a look at the database.
        self._client = open_redis(redis_url, retries=0)
        self._bells: dict[uuid.UUID, dict[uuid.UUID, set[asyncio.Event]]] = {}  # workspace -> run -> bells
        self._listeners: dict[uuid.UUID, Counter[Listener]] = {}
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._heard_at_s = 0.0  # the loop's clock
        self._closed = False
        self.closing = False  # nobody should begin to wait any more: the process is about to end

    @contextmanager
    def follow(self, workspace_id: uuid.UUID, run_id: uuid.UUID) -> Iterator[asyncio.Event]:
        """Yield a bell that is set whenever events of the run were committed; the caller clears it."""
        bell = asyncio.Event()
        runs = self._bells.setdefault(workspace_id, {})
        runs.setdefault(run_id, set()).add(bell)
        self._attend()
        try:
            yield bell
        finally:
            runs[run_id].discard(bell)
            if not runs[run_id]:
                del runs[run_id]
            if not runs:
                self._bells.pop(workspace_id, None)
            self._changed.set()

    @contextmanager
    def listen(self, workspace_id: uuid.UUID, listener: Listener) -> Iterator[None]:
        """Have `listener` called with every message of the workspace, once however often it listens."""
        self._listeners.setdefault(workspace_id, Counter())[listener] += 1
        self._attend()
        try:
            yield
        finally:
            counts = self._listeners[workspace_id]
            counts[listener] -= 1
            if not counts[listener]:
                del counts[listener]
            if not counts:
                del self._listeners[workspace_id]
            self._changed.set()

    def let_go(self) -> None:
        """Wake all who wait for a bell and let nobody wait again: the process is about to end."""
        self.closing = True
        for workspace_id in list(self._bells):
            self._ring(workspace_id)

    async def close(self) -> None:
        """Stop listening."""
        self._closed = True  # besides the cancellation: a call of redis-py that is about to return may swallow it
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._client.aclose()

    def _attend(self) -> None:
        """Have the subscriptions brought up to what is followed."""
        self._changed.set()
        if self._task is None:
            self._task = asyncio.create_task(self._hold(), name="follow events")

    def _ring(self, workspace_id: uuid.UUID, run_ids: Iterable[uuid.UUID] | None = None) -> None:
        """Ring the bells of some runs of a workspace, or of all that are followed."""
        runs = self._bells.get(workspace_id, {})
        for run_id in list(runs) if run_ids is None else run_ids:
            for bell in runs.get(run_id, ()):
                bell.set()

    async def _hold(self) -> None:
        """Hold the subscriptions up for as long as the process lives; a lost connection is made anew."""
        while not self._closed:
            try:
                async with self._client.pubsub() as pubsub:
                    await pubsub.connect()
                    async with asyncio.TaskGroup() as group:
                        group.create_task(self._hear(pubsub))
                        group.create_task(self._subscribe(pubsub))
            except* (redis.RedisError, OSError) as faults:
                log.warning("following events interrupted", fault=str(faults.exceptions[0]))
            except* Exception as faults:  # a bug of ours: followers lose their copies, not the events
                log.error("following events interrupted", exc_info=faults.exceptions[0])
            await asyncio.sleep(RETRY_S)

    async def _subscribe(self, pubsub: PubSub) -> None:
        """Keep the subscriptions equal to what is followed, and the connection proven alive."""
        subscribed: set[uuid.UUID] = set()
        self._heard_at_s = asyncio.get_running_loop().time()
        while not self._closed:
            self._changed.clear()
            wanted = self._bells.keys() | self._listeners.keys()
            if wanted - subscribed:
                await pubsub.subscribe(*(channel(w) for w in wanted - subscribed))
            if subscribed - wanted:
                await pubsub.unsubscribe(*(channel(w) for w in subscribed - wanted))
            subscribed = set(wanted)
            try:
                async with asyncio.timeout(PING_EVERY_S):
                    await self._changed.wait()
            except TimeoutError:
                if asyncio.get_running_loop().time() - self._heard_at_s > SILENCE_S:
                    raise redis.ConnectionError(f"silent for {SILENCE_S:g} s") from None
                await pubsub.ping()

    async def _hear(self, pubsub: PubSub) -> None:
        """Pass each message on."""
        while not self._closed:
            message = await pubsub.get_message(timeout=None)
            self._heard_at_s = asyncio.get_running_loop().time()
            if message is None or message["type"] not in ("subscribe", "message"):
                continue
            workspace_id = uuid.UUID(message["channel"].decode().rpartition("{")[2].rstrip("}"))
            published = _read(message["data"]) if message["type"] == "message" else None
            self._ring(workspace_id, None if published is None else {event.run_id for event in published.events})
            for listener in list(self._listeners.get(workspace_id, ())):
                listener(workspace_id, published)


def _read(body: bytes) -> Published | None:
    """Return what was published; None for what this version cannot read, which is as good as lost."""
    try:
        return _DECODER.decode(body)
    except msgspec.DecodeError as fault:
        log.warning("a published message cannot be read", fault=str(fault))
        return None
