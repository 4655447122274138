"""What a user does with one agent run: create it, spawn its children, poll its snapshot until it is final.

Every request of it is a row, whatever becomes of it, and so is a request that was planned and never sent because an
earlier one failed. A poll timeout is a timeout, not a completion: the run's record then has no final status. Whatever
is left unfinished is cancelled. When runs are started is `generator`'s business; what a request looks like, `api`'s.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Protocol

from harness.api import CreateAnswer, RunView, Snapshot, SpawnAnswer, Workspace, problem_of, read_answer
from harness.client import Client
from harness.connection import NO_TIMING, Exchange, parse_server_timing
from harness.sample import Endpoint, Outcome, RunRecord
from harness.samplebuffer import UNKNOWN, SampleBuffer, run_key

SCENARIO = "create-spawn-poll"
TIMER_S = 0.001  # resolution of event loops' own timers
FAULT_PAUSE_S = 0.1  # least time to the next poll after a failed one: a refused connection fails in microseconds


class Rows(Protocol):
    """Where the rows of a run go: the recorder, or what a sending process keeps for it."""

    samples: SampleBuffer

    def plan(self, requests: int) -> None:
        """Count requests that are about to be made, or would have been: each must get its row."""


@dataclasses.dataclass(frozen=True, slots=True)
class Habits:
    """How the user behaves in every run."""

    children: int  # subruns to spawn, 0 to 4
    poll_interval_s: float  # from a poll's answer to the next poll
    poll_timeout_s: float  # from the first poll on; the last poll is sent when it ends


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where one run stands within the measurement."""

    run: int  # from 1, unique within the sample set
    level: float  # see Sample.level; NAN where the mode has none
    trial: int
    worker: int


@dataclasses.dataclass(slots=True)
class _Draft:
    """A RunRecord in the making; the fields are the same."""

    run_key: str
    parent_run_key: str | None
    workspace_id: str
    trial: int
    worker: int
    run_id: str | None = None
    created_at_ns: int | None = None
    last_unfinished_at_ns: int | None = None
    first_finished_at_ns: int | None = None
    server_completion_ms: float | None = None
    final_status: str | None = None
    poll_timed_out: bool = False
    ticks: int | None = None
    steps: int | None = None
    events: int | None = None
    subruns: int = 0

    def record(self) -> RunRecord:
        return RunRecord(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    @property
    def unfinished(self) -> bool:
        """Whether the service may still hold a slot for it."""
        return self.run_id is not None and self.final_status is None

    def see(self, view: RunView, exchange: Exchange) -> None:
        """Take what one poll showed of this run."""
        if self.final_status is not None:
            return
        self.ticks = view.ticks if view.ticks is not None else self.ticks
        self.steps = view.step_count if view.step_count is not None else self.steps
        self.events = view.last_seq if view.last_seq is not None else self.events
        if view.final:
            self.final_status = view.status
            self.first_finished_at_ns = exchange.done_at_ns
            self.server_completion_ms = view.completion_ms
        else:
            self.last_unfinished_at_ns = exchange.sent_at_ns


async def _sleep_until(due_at_ns: int) -> None:
    """Sleep to an instant of the monotonic clock, never to before it: some loops round their timers down."""
    while (left_ns := due_at_ns - time.monotonic_ns()) > 0:  # noqa: ASYNC110 - no event tells the time
        await asyncio.sleep(max(left_ns / 1e9, TIMER_S))


class AgentRun:
    """One pass of the scenario. `perform` it once; `records` tells at any moment what is known."""

    def __init__(self, client: Client, recorder: Rows, workspace: Workspace, habits: Habits, place: Place) -> None:
        self._client = client
        self._recorder = recorder
        self.workspace = workspace
        self._habits = habits
        self._place = place
        self.parent = self._draft(0)
        self.children: list[_Draft] = []
        self._uncertain = False  # a create or spawn ended without an answer: it may have been carried out

    @property
    def left_nothing(self) -> bool:
        """Whether the workspace is certainly free of this run and its children."""
        return not self._uncertain and not any(draft.unfinished for draft in (self.parent, *self.children))

    def _draft(self, child: int) -> _Draft:
        place = self._place
        parent = run_key(place.run) if child else None
        return _Draft(run_key(place.run, child), parent, self.workspace.workspace_id, place.trial, place.worker)

    def records(self) -> list[RunRecord]:
        """Return the run and its children as far as they are known."""
        return [draft.record() for draft in (self.parent, *self.children)]

    async def perform(self, intended_at_ns: int) -> None:
        """Carry the scenario out. The create was due at `intended_at_ns`; never raises for the service's faults."""
        habits = self._habits
        self._recorder.plan(1 + habits.children + 1)  # the create, the spawns, at least one poll
        created = await self._create(intended_at_ns)
        spawned = created and await self._spawn_children()
        if spawned:
            self.parent.poll_timed_out = not await self._poll_until_final()
            for child in self.children:
                child.poll_timed_out = self.parent.poll_timed_out and child.unfinished
        else:
            for number in range(len(self.children) + 1, habits.children + 1):
                self.children.append(self._draft(number))
                self._not_sent(Endpoint.SPAWN, "an earlier request of this run failed", number)
            self._not_sent(Endpoint.SNAPSHOT, "an earlier request of this run failed")
        await self.cancel_unfinished()

    async def _create(self, intended_at_ns: int) -> bool:
        wire = self.workspace.create_wire(self._habits.children)
        exchange = await self._client.exchange(wire)
        answer = read_answer(exchange, CreateAnswer) if exchange.outcome is Outcome.OK else None
        self._record(Endpoint.CREATE, intended_at_ns, exchange)
        if answer is None:
            return False
        self.parent.run_id, self.parent.created_at_ns = answer.run_id, exchange.done_at_ns
        return True

    async def _spawn_children(self) -> bool:
        """Spawn every child, one after another; False as soon as one is not granted."""
        assert self.parent.run_id is not None  # noqa: S101 - it was created
        wire = self.workspace.spawn_wire(self.parent.run_id)
        for number in range(1, self._habits.children + 1):
            child = self._draft(number)
            self.children.append(child)
            ready_at_ns = time.monotonic_ns()
            exchange = await self._client.exchange(wire)
            answer = read_answer(exchange, SpawnAnswer) if exchange.outcome is Outcome.OK else None
            self._record(Endpoint.SPAWN, ready_at_ns, exchange, number)
            if answer is None:
                return False
            child.run_id, child.created_at_ns = answer.child_run_id, exchange.done_at_ns
            self.parent.subruns += 1
        return True

    async def _poll_until_final(self) -> bool:
        """Poll until the parent is final; False when the poll timeout ends first. The first poll is planned already."""
        due_at_ns = time.monotonic_ns()
        deadline_ns = due_at_ns + round(self._habits.poll_timeout_s * 1e9)
        since_seq = 0
        while True:
            exchange, snapshot = await self._snapshot(due_at_ns, since_seq)
            if snapshot is not None:
                self._see(snapshot, exchange)
                since_seq = snapshot.last_seq
                if self.parent.final_status is not None:
                    return True
            if exchange.done_at_ns >= deadline_ns:
                return False
            pause_s = self._habits.poll_interval_s
            if snapshot is None:
                pause_s = max(pause_s, FAULT_PAUSE_S, exchange.retry_after_s)
            due_at_ns = min(exchange.done_at_ns + round(pause_s * 1e9), deadline_ns)
            self._recorder.plan(1)
            await _sleep_until(due_at_ns)

    async def _snapshot(self, due_at_ns: int, since_seq: int) -> tuple[Exchange, Snapshot | None]:
        assert self.parent.run_id is not None  # noqa: S101 - it was created
        exchange = await self._client.exchange(self.workspace.snapshot_wire(self.parent.run_id, since_seq))
        snapshot = read_answer(exchange, Snapshot) if exchange.outcome is Outcome.OK else None
        self._record(Endpoint.SNAPSHOT, due_at_ns, exchange)
        return exchange, snapshot

    def _see(self, snapshot: Snapshot, exchange: Exchange) -> None:
        self.parent.see(snapshot.run, exchange)
        self.parent.steps = snapshot.step_count
        self.parent.events = snapshot.last_seq
        views = {view.run_id: view for view in snapshot.child_runs}
        for child in self.children:
            if child.run_id in views:
                child.see(views[child.run_id], exchange)

    async def cancel_unfinished(self) -> None:
        """Cancel what the service may still be working on, the parent first; then what that left of the children."""
        if self.parent.unfinished:
            await self._cancel(self.parent)
            if not any(child.unfinished for child in self.children):
                return
            # Whether children end with their parent is the service's choice: look before cancelling them too.
            self._recorder.plan(1)
            _, snapshot = await self._snapshot(time.monotonic_ns(), 0)
            ended = {view.run_id for view in snapshot.child_runs if view.final} if snapshot else set()
        else:
            ended = set()
        for child in self.children:
            if child.unfinished and child.run_id not in ended:
                await self._cancel(child)

    async def _cancel(self, draft: _Draft) -> None:
        assert draft.run_id is not None  # noqa: S101 - it is unfinished
        self._recorder.plan(1)
        ready_at_ns = time.monotonic_ns()
        exchange = await self._client.exchange(self.workspace.cancel_wire(draft.run_id))
        self._record(
            Endpoint.CANCEL, ready_at_ns, exchange, self.children.index(draft) + 1 if draft.parent_run_key else 0
        )

    def _record(self, endpoint: Endpoint, intended_at_ns: int, exchange: Exchange, child: int = 0) -> None:
        """Make the row of a request that ended."""
        assert exchange.outcome is not None  # noqa: S101 - it ended
        place = self._place
        if endpoint in {Endpoint.CREATE, Endpoint.SPAWN}:
            self._uncertain |= exchange.outcome in {Outcome.TIMEOUT, Outcome.CONNECTION_ERROR}
        if exchange.outcome is Outcome.HTTP_ERROR:
            exchange.error = problem_of(exchange)
        self._recorder.samples.append(
            place.run, child, endpoint, place.level, place.trial, place.worker, intended_at_ns,
            exchange.sent_at_ns, exchange.first_byte_at_ns, exchange.done_at_ns, exchange.status,
            exchange.outcome, exchange.error, parse_server_timing(exchange.server_timing),
            exchange.response_bytes, exchange.connection_id,
        )  # fmt: skip

    def _not_sent(self, endpoint: Endpoint, why: str, child: int = 0) -> None:
        """Make the row of a request that was planned and never sent."""
        place = self._place
        self._recorder.samples.append(
            place.run, child, endpoint, place.level, place.trial, place.worker, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN,
            UNKNOWN, Outcome.NOT_SENT, why, NO_TIMING, UNKNOWN, UNKNOWN,
        )  # fmt: skip
