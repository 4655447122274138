"""What must hold of tool calls and of turns that wait outside, checked by somebody who knows the promises only.

Beside the audit of runs (`audit`): a call's row may only go the ways that are written here, its tool is started once,
one person decides on it, it is told once, and what the run observes is what became of it.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from service.events import NewEvent
from service.pen import NewStep, RunRow
from service.toolcalls import Call
from service.workspaces import KnownAgent
from tests.simulator.breach import require

LEGAL = {
    "": "PENDING APPROVED",
    "PENDING": "APPROVED REJECTED CANCELED",
    "APPROVED": "RUNNING CANCELED",
    "RUNNING": "COMPLETED FAILED CANCELED",
}

OPEN = ("PENDING", "APPROVED", "RUNNING")

MOST_PENDING = 3
"""The workspace's cap on calls that wait for approval."""


VIEWER, OPERATOR, ADMIN, OTHER_ADMIN = (uuid.UUID(int=number) for number in range(500, 504))
"""The tokens of those who would decide."""

MAY_DECIDE: dict[uuid.UUID, tuple[str, ...]] = {
    OPERATOR: ("SAFE", "ELEVATED"),
    ADMIN: ("SAFE", "ELEVATED", "DANGEROUS"),
    OTHER_ADMIN: ("SAFE", "ELEVATED", "DANGEROUS"),
}
"""On calls of which risks."""


class Told(NamedTuple):
    """What the events of one call have said so far."""

    requested: int = 0
    approved: int = 0
    rejected: int = 0
    completed: int = 0

    @property
    def decided(self) -> int:
        """How many people have decided on it."""
        return self.approved + self.rejected

    @property
    def ended(self) -> int:
        """How often its end was told: a rejection is one."""
        return self.completed + self.rejected


class CallAudit:
    """Follows every write that concerns a tool call."""

    def __init__(self, runs: Mapping[uuid.UUID, RunRow], calls: Mapping[uuid.UUID, Call]) -> None:
        self._runs = runs
        self._calls = calls
        self.agents: Mapping[uuid.UUID, KnownAgent] = {}
        self.most_pending = 0
        """How many calls have waited for approval at once."""
        self._told: dict[uuid.UUID, Told] = {}
        self._started: set[uuid.UUID] = set()
        self._observed: set[uuid.UUID] = set()
        self._requested: Counter[uuid.UUID] = Counter()  # by run

    def written(self, now: dt.datetime, old: Call | None, new: Call) -> None:
        """Check one row as it was and is."""
        run = self._runs[new.run_id]
        before = "" if old is None else old.status
        if new.status != before:
            require(new.status in LEGAL.get(before, "").split(), run, f"took a call from {before} to {new.status}")
        require((new.ended_at is None) == (new.status in OPEN), run, "has a call whose end its status denies")
        if old is None:
            self._made(run, new)
        elif new.status == "RUNNING" != before:
            self._may_start(run, new)
        elif new.status == "FAILED" != before and new.error == "started but its end is unknown":
            require(new.lease_until is not None and new.lease_until <= now, run, "gave up a tool that was still held")
        if before == "PENDING" and new.status in ("APPROVED", "REJECTED"):
            may = MAY_DECIDE.get(new.decided_by) if new.decided_by is not None else None
            require(may is not None and new.risk in may, run, f"let {new.decided_by} decide on what is {new.risk}")

    def _made(self, run: RunRow, call: Call) -> None:
        self._requested[run.run_id] += 1
        most = self.agents[run.agent_id].max_tool_calls
        require(self._requested[run.run_id] <= most, run, f"requested more than {most} tool calls")
        require(call.status == ("PENDING" if NEEDS_APPROVAL[call.tool] else "APPROVED"), run, "passed an approval by")
        is_open = [each for each in self._calls.values() if each.run_id == run.run_id and each.status in OPEN]
        require(len(is_open) <= 1, run, "has two open tool calls")
        pending = sum(each.status == "PENDING" for each in self._calls.values())
        self.most_pending = max(self.most_pending, pending)
        require(pending <= MOST_PENDING, run, f"is the {pending}th that waits for approval")

    def _may_start(self, run: RunRow, call: Call) -> None:
        require(run.ended_at is None and run.status != "PAUSED", run, f"started a tool while {run.status}")
        told = self._told.get(call.tool_call_id, Told())
        approved = (told.approved, told.rejected) == (int(NEEDS_APPROVAL[call.tool]), 0)
        require(approved, run, f"started a tool of which was told {told}")

    def started(self, call_id: uuid.UUID) -> None:
        """Check that a tool has its effect now, for the first time. Whoever started it may have stalled meanwhile."""
        call = self._calls[call_id]
        require(call_id not in self._started, self._runs[call.run_id], "started a tool twice")
        require(call.started_at is not None, self._runs[call.run_id], "ran a tool that was not started")
        self._started.add(call_id)

    def event(self, event: NewEvent) -> None:
        """Check what is told of a call."""
        if not event.event_type.startswith("tool_call_"):
            return
        run, call_id = self._runs[event.run_id], uuid.UUID(event.payload["tool_call_id"])
        kind, told = event.event_type.removeprefix("tool_call_"), self._told.get(call_id, Told())
        told = told._replace(**{kind: getattr(told, kind) + 1})
        require(told.requested == 1, run, f"told {kind} of a call that was requested {told.requested} times")
        require(told.decided <= 1, run, "told two decisions on one call")
        require(told.ended <= 1, run, "told the end of a call twice")
        self._told[call_id] = told

    def observation(self, step: NewStep) -> None:
        """Check that what a run observes is what became of its call."""
        run, payload = self._runs[step.run_id], step.payload
        if "tool_call_id" not in payload:  # of a call that the model could not have
            require(payload["status"] == "REJECTED", run, "observed a call that was never made")
            return
        call_id = uuid.UUID(payload["tool_call_id"])
        require(call_id not in self._observed, run, "observed a call twice")
        self._observed.add(call_id)
        self._to_compare = (call_id, payload)

    _to_compare: tuple[uuid.UUID, Mapping[str, Any]] | None = None

    def consistent(self, run: RunRow) -> None:
        """Check a run with its call, after the whole of a write."""
        if self._to_compare is not None:
            (call_id, payload), self._to_compare = self._to_compare, None
            call = self._calls[call_id]
            owner = self._runs[call.run_id]
            seen = (payload["status"], payload.get("result"), payload.get("error"))
            require(seen == (call.status, call.result, call.error), owner, f"observed {seen} of {call}")
            require(call.status not in OPEN, owner, "observed a call that is open")
        now = self._calls.get(run.tool_call_id) if run.tool_call_id is not None else None
        status = run.paused_from if run.status == "PAUSED" else run.status
        final = run.ended_at is not None
        if status == "WAITING_FOR_APPROVAL":
            require(now is not None, run, "waits for approval of nothing")
        if now is None:
            return
        require(now.run_id == run.run_id, run, "waits for another run's tool call")
        require(not final or now.status not in OPEN, run, "left its tool call open")
        if now.status == "PENDING":
            require(status == "WAITING_FOR_APPROVAL", run, f"is {status} and its call was not decided")
        elif status == "WAITING_FOR_APPROVAL" and run.status != "PAUSED":
            require(run.next_tick_at is not None, run, "was decided upon and does not go on")
        if final:
            told = self._told.get(now.tool_call_id, Told())
            require(told.ended == 1, run, f"told the end of its last call {told.ended} times")

    def wakes(self, run: RunRow) -> bool:
        """Whether a person will wake the run."""
        call = self._calls.get(run.tool_call_id) if run.tool_call_id is not None else None
        return run.status == "WAITING_FOR_APPROVAL" and call is not None and call.status == "PENDING"


NEEDS_APPROVAL = {"look": False, "quick": False, "ask": True, "change": True, "drop": True}
"""The workspace's tools."""
