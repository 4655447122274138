"""What is recorded: one row per planned request, one per agent run, one per second of the machine.

This is the hinge of the harness: everything to its left makes these rows, everything to its right reads them, and
nobody keeps a shadow copy. The Parquet schemas are derived from the dataclasses below, so a column is named once.
`recorder` writes the files, `sampleset` reads them.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing

import pyarrow as pa

SCHEMA_VERSION = 1
"""Raised whenever a column changes its name, type or meaning; readers refuse versions they do not know."""


class Endpoint(enum.StrEnum):
    """Which of the service's operations a request asked for."""

    CREATE = "create"  # POST /api/runs/
    SPAWN = "spawn"  # POST /api/runs/<id>/spawn_subrun/
    SNAPSHOT = "snapshot"  # GET /api/runs/<id>/snapshot/
    CANCEL = "cancel"  # POST /api/runs/<id>/cancel/, what the harness leaves unfinished
    OTHER = "other"  # an imported request that is none of these


class Mode(enum.StrEnum):
    """How the load was made."""

    SMOKE = "smoke"  # closed loop, a few runs side by side
    BURST = "burst"  # closed loop, groups of runs started at one instant
    SOAK = "soak"  # closed loop, one run after another for a long time
    OPEN = "open"  # open loop: creates at a given rate whatever the replies
    BURST_LIMITS = "burst-limits"  # search for the highest burst that meets the SLO
    CAPACITY = "capacity"  # search for the highest sustained rate that meets the SLO
    IMPORT = "import"  # another tool's results


class Outcome(enum.StrEnum):
    """What became of a planned request. Every planned request has exactly one row and one outcome."""

    OK = "ok"  # answered 2xx or 304
    HTTP_ERROR = "http_error"  # answered with another status (429 included), or refused by an imported tool's own check
    TIMEOUT = "timeout"  # no complete answer within the client's patience
    REFUSED = "refused"  # the TCP connection was refused
    CONNECTION_ERROR = "connection_error"  # reset, closed early or unreadable
    NOT_SENT = "not_sent"  # planned, never put on the wire


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One planned request and what became of it.

    Instants are nanoseconds of one monotonic clock; null where unknown.
    """

    run_key: str  # the agent run it belongs to: the same in runs.parquet; unique within a sample set
    scenario: str  # name of the scenario that planned it, e.g. "create-spawn-poll"
    endpoint: Endpoint
    mode: Mode
    level: float | None  # burst size, or arrivals per second; null in smoke and soak
    trial: int  # repetition at one level, from 0
    worker: int  # generator process or closed-loop worker, from 0
    intended_at_ns: int | None  # when it was due; in closed loop, when the scenario was ready to send
    sent_at_ns: int | None  # first byte handed to the kernel
    first_byte_at_ns: int | None  # first byte of the answer read
    done_at_ns: int | None  # last byte read, or the moment at which the client gave up
    latency_ms: float | None  # done - intended: what a user waited
    service_ms: float | None  # done - sent: what the service took
    status: int | None  # HTTP status
    outcome: Outcome
    error: str | None  # one line: the problem's `error`, or the connection's fault; never a secret
    server_db_ms: float | None  # from Server-Timing, as are the next three
    server_quota_ms: float | None
    server_publish_ms: float | None
    server_app_ms: float | None
    response_bytes: int | None  # head and body
    connection_id: int | None  # which connection of the pool carried it


@dataclasses.dataclass(frozen=True, slots=True)
class RunRecord:
    """One agent run that the harness asked for (parents and children), as far as polling could see it."""

    run_key: str  # chosen by the harness before the create was sent
    run_id: str | None  # the service's id; null when the create failed
    parent_run_key: str | None  # null for a parent
    workspace_id: str | None
    trial: int
    worker: int
    created_at_ns: int | None  # when the create (or spawn) was answered
    last_unfinished_at_ns: int | None  # sending instant of the last poll that saw it unfinished
    first_finished_at_ns: int | None  # done instant of the first poll that saw it final; null if none did
    server_completion_ms: float | None  # ended_at - created_at by the service's own clock
    final_status: str | None  # null when no poll saw it final: a poll timeout is no completion
    poll_timed_out: bool  # polling gave up before a final status was seen
    ticks: int | None  # worker turns, from the run's own counter
    steps: int | None
    events: int | None  # last_seq: events are numbered without gaps
    subruns: int  # children asked for and granted


@dataclasses.dataclass(frozen=True, slots=True)
class ResourceSample:
    """The machine and the service once a second. Null where the source does not tell."""

    at_ns: int  # the same monotonic clock as Sample
    cpu_percent: float | None  # whole machine, 100 = every core busy
    load1: float | None
    service_rss_bytes: int | None  # the service's processes together; null against a remote service
    service_cpu_percent: float | None  # 100 = one core busy
    harness_cpu_percent: float | None
    queue_depth: float | None  # due runs not yet claimed (plimsoll_queue_depth)
    oldest_due_tick_s: float | None  # age of the oldest due run (plimsoll_oldest_due_tick_seconds)
    ticks_per_s: float | None  # from the counter plimsoll_ticks_total
    redis_publish_lag_ms: float | None  # mean from a commit to Redis having passed its events on, over the second
    db_write_ms: float | None  # mean write transaction over the second, of HTTP processes and workers together
    iowait_percent: float | None
    generator_lag_ms: float | None  # how late a sending loop woke or took a request up, worst of the second
    generator_gc_ms: float | None = None  # longest pause of a sending process for its garbage, within the second
    generator_wait_percent: float | None = None  # of the second in which a sending thread was ready and had no core
    steal_percent: float | None = None  # of the machine's time, given to other machines by its host


def _arrow_type(annotation: object) -> tuple[pa.DataType, bool]:
    """Return the Arrow type of one field annotation and whether it may be null."""
    nullable = False
    if isinstance(annotation, types.UnionType):
        inner = [a for a in typing.get_args(annotation) if a is not types.NoneType]
        nullable, annotation = len(inner) < len(typing.get_args(annotation)), inner[0]
    if isinstance(annotation, type) and issubclass(annotation, enum.StrEnum):
        return pa.dictionary(pa.int8(), pa.string()), nullable
    plain = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    return plain[typing.cast("type", annotation)], nullable


def arrow_schema(row: type, measurement_id: str) -> pa.Schema:
    """Derive the Parquet schema of a row dataclass, with Plimsoll's metadata keys."""
    hints = typing.get_type_hints(row)
    fields = []
    for field in dataclasses.fields(row):
        arrow, nullable = _arrow_type(hints[field.name])
        fields.append(pa.field(field.name, arrow, nullable))
    metadata = {"plimsoll.schema_version": str(SCHEMA_VERSION), "plimsoll.measurement_id": measurement_id}
    return pa.schema(fields, metadata=metadata)
