"""What answers look like: the types from which the API's description is made.

PostgreSQL builds most answers' JSON (`wire`), so these types are not made on the way; a test decodes real answers
strictly into them, so they cannot drift apart.
"""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Annotated, Any, Literal

import msgspec

from service.auth import Role
from service.events import EventType
from service.joins import FailurePolicy, GroupState, JoinPolicy
from service.quota.limits import Limit
from service.runs import RunStatus, StepKind
from service.toolcalls import Risk, ToolCallStatus
from service.workspaces import QuotaClass

RoleName = Annotated[str, msgspec.Meta(extra_json_schema={"enum": [role.name for role in Role]})]
"""A role on the wire."""


class Created(msgspec.Struct, frozen=True):
    """An accepted run."""

    run_id: uuid.UUID
    status: RunStatus
    workspace_id: uuid.UUID
    agent_id: uuid.UUID
    correlation_id: uuid.UUID


class Spawned(msgspec.Struct, frozen=True):
    """An accepted subrun."""

    child_run_id: uuid.UUID
    status: RunStatus
    correlation_id: uuid.UUID
    group_id: str


class RunView(msgspec.Struct, frozen=True):
    """A run; `service.runs.Run` explains each field."""

    run_id: uuid.UUID
    workspace_id: uuid.UUID
    agent_id: uuid.UUID
    parent_run_id: uuid.UUID | None
    status: RunStatus
    correlation_id: uuid.UUID
    input_text: str
    channel: str
    metadata: dict[str, Any]
    group_id: str | None
    expected_subruns: int
    max_wait_seconds: float
    spawned_subruns: int
    pending_subruns: int
    step_count: int
    last_seq: int
    ticks: int
    paused_from: RunStatus | None
    error_summary: str | None
    created_at: dt.datetime
    started_at: dt.datetime | None
    ended_at: dt.datetime | None


class StepView(msgspec.Struct, frozen=True):
    """A step of a run."""

    step_index: int
    kind: StepKind
    payload: dict[str, Any]
    correlation_id: uuid.UUID
    created_at: dt.datetime


class EventView(msgspec.Struct, frozen=True):
    """An event of a run."""

    run_id: uuid.UUID
    seq: int
    event_type: EventType
    payload: dict[str, Any]
    correlation_id: uuid.UUID
    created_at: dt.datetime


class ChildView(msgspec.Struct, frozen=True):
    """A subrun, as its parent's snapshot shows it."""

    run_id: uuid.UUID
    status: RunStatus
    group_id: str | None
    last_seq: int
    ticks: int
    step_count: int
    error_summary: str | None
    created_at: dt.datetime
    ended_at: dt.datetime | None


class GroupView(msgspec.Struct, frozen=True):
    """A group of subruns; `service.joins.SubrunGroup` explains each field."""

    group_id: str
    join_policy: JoinPolicy
    failure_policy: FailurePolicy
    quorum: int | None
    timeout_seconds: float | None
    deadline_at: dt.datetime | None
    spawned: int
    pending: int
    failed: int
    state: GroupState
    decided_at: dt.datetime | None


class SnapshotView(msgspec.Struct, frozen=True):
    """A run with its steps, its children and their groups, and the events after the asked number."""

    run: RunView
    steps: list[StepView]
    events_since_seq: list[EventView]
    child_runs: list[ChildView]
    groups: list[GroupView]
    last_seq: int


class RunPage(msgspec.Struct, frozen=True):
    """Runs, newest first."""

    runs: list[RunView]
    next_cursor: str | None  # null on the last page


class ArchiveView(msgspec.Struct, frozen=True):
    """A bundle of a run; `service.archive.records.RunArchive` explains each field."""

    archive_id: uuid.UUID
    run_id: uuid.UUID
    created_at: dt.datetime
    last_seq: int
    compacted_through_seq: int
    schema_version: int
    sha256: str
    size_bytes: int
    path: str
    download: str  # path of the zip in this API


class ArchivePage(msgspec.Struct, frozen=True):
    """A run's bundles, newest first."""

    archives: list[ArchiveView]


class ToolCallView(msgspec.Struct, frozen=True):
    """A tool call; `service.toolcalls.ToolCall` explains each field."""

    tool_call_id: uuid.UUID
    workspace_id: uuid.UUID
    run_id: uuid.UUID
    step_index: int
    tool: str
    arguments: dict[str, Any]
    risk: Risk
    timeout_seconds: float
    status: ToolCallStatus
    result: Any
    error: str | None
    reason: str | None
    decided_by: uuid.UUID | None
    created_at: dt.datetime
    decided_at: dt.datetime | None
    started_at: dt.datetime | None
    ended_at: dt.datetime | None


class ToolCallPage(msgspec.Struct, frozen=True):
    """Tool calls, newest first."""

    tool_calls: list[ToolCallView]
    next_cursor: str | None  # null on the last page


class ToolView(msgspec.Struct, frozen=True):
    """A tool that a workspace's runs may call."""

    workspace_id: uuid.UUID
    name: str
    tool: str
    risk: Risk
    needs_approval: bool
    schema: dict[str, Any]
    timeout_seconds: float


class ToolPage(msgspec.Struct, frozen=True):
    """All tools of a workspace."""

    tools: list[ToolView]


class WorkspaceView(msgspec.Struct, frozen=True):
    """A workspace."""

    workspace_id: uuid.UUID
    name: str
    quota_class: QuotaClass


class AgentView(msgspec.Struct, frozen=True):
    """An agent."""

    agent_id: uuid.UUID
    workspace_id: uuid.UUID
    name: str


class TokenView(msgspec.Struct, frozen=True):
    """A new token: the only answer in which it stands in clear."""

    token: str
    role: RoleName
    expires_at: dt.datetime | None


class TicketView(msgspec.Struct, frozen=True):
    """A ticket that opens one socket."""

    ticket: str
    expires_in_s: float


class Health(msgspec.Struct, frozen=True):
    """How the process is."""

    status: Literal["ok", "degraded"]
    redis: Literal["ok", "unreachable"] | None = None


class Index(msgspec.Struct, frozen=True):
    """What the service is, and where to go on."""

    service: str
    version: str  # of the HTTP interface
    docs: str  # paths in this API
    openapi: str
    livez: str
    readyz: str
    metrics: str


class Problem(msgspec.Struct, frozen=True, rename={"violated_policies": "violated-policies"}):
    """Any answer that is no success (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    error: str
    field: str | None = None
    violated_policies: list[Limit] | None = None
    archive: str | None = None  # 410 of a snapshot: path of the bundle that has the older events
    compacted_through_seq: int | None = None  # 410 of a snapshot: the number from which to ask
