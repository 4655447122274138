"""What goes over a socket, as text: pushes, answers to commands, errors. Pure."""

from __future__ import annotations

import datetime as dt
import enum
import uuid
from functools import cached_property
from typing import Any

import msgspec

from service.events import EventType


class Topic(enum.StrEnum):
    """What a push is about."""

    RUN = "run.event"  # an event of the run that the stream follows
    WORKSPACE = "workspace.event"  # the summary of a run after one event of it
    APPROVALS = "approvals.event"  # a tool call was requested, approved or rejected


APPROVALS = frozenset(
    {EventType.TOOL_CALL_REQUESTED, EventType.TOOL_CALL_APPROVED, EventType.TOOL_CALL_REJECTED},
)
"""The events that approvals are made of."""


class Happened:
    """A committed event, from Redis or from the database; all sockets that push it share one frame."""

    def __init__(
        self,
        workspace_id: uuid.UUID,
        run_id: uuid.UUID,
        seq: int,
        event_type: str,
        payload: dict[str, Any],
        created_at: dt.datetime,
    ) -> None:
        self.workspace_id = workspace_id
        self.run_id = run_id
        self.seq = seq
        self.event_type = event_type
        self.payload = payload
        self.created_at = created_at

    @cached_property
    def run_frame(self) -> str:
        """The push of the run's own stream."""
        return self.frame(Topic.RUN, self.payload)

    def frame(self, topic: Topic, data: dict[str, Any]) -> str:
        """Return the push of this event under a topic."""
        return push(topic, self.event_type, data, self.seq, self.run_id, self.workspace_id, self.created_at)


def push(
    topic: Topic,
    event: str,
    data: dict[str, Any],
    seq: int | None,
    run_id: uuid.UUID | None,
    workspace_id: uuid.UUID,
    at: dt.datetime,
) -> str:
    """Return a push; `seq` and `run_id` are null only where a frame is about no run."""
    return _text(
        {
            "type": "push",
            "topic": topic,
            "event": event,
            "data": data,
            "seq": seq,
            "run_id": run_id,
            "workspace_id": workspace_id,
            "ts": instant(at),
        }
    )


def ack(cmd: str, request_id: Any, data: Any) -> str:
    """Return the answer to a command that was done; `event` repeats `type`, so clients may dispatch on either."""
    name = f"{cmd}_ack"
    return _text({"type": name, "event": name, "cmd": cmd, "id": request_id, "data": data})


def error(cmd: str | None, request_id: Any, problem: dict[str, Any], retry_after_s: int | None = None) -> str:
    """Return the answer to a command that was not done; `data` is the problem that HTTP would have answered."""
    return _text(
        {
            "type": "error",
            "event": "error",
            "cmd": cmd,
            "id": request_id,
            "code": problem["type"].rpartition(":")[2],
            "status": problem["status"],
            "error": problem["error"],
            "retry_after_s": retry_after_s,
            "data": problem,
        }
    )


def instant(at: dt.datetime) -> str:
    """Write an instant as the HTTP interface does: UTC, as many digits of the second as it has."""
    text = at.astimezone(dt.UTC).isoformat()
    return text.removesuffix("+00:00").rstrip("0") + "+00:00" if at.microsecond else text


def _text(frame: dict[str, Any]) -> str:
    return msgspec.json.encode(frame).decode()
