"""The engine's SQL statements, each answered from memory as PostgreSQL would answer it."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from service import approvals, backstop, claim_leases, claims, commits, families, ledger, outside
from service.events import NewEvent
from service.joins import Group
from service.ledger import RUN_COLUMNS
from service.pen import NewStep, RunRow
from service.quota import caps
from service.runs import FINAL
from service.toolcalls import Call
from tests.simulator.breach import require

if TYPE_CHECKING:
    from tests.simulator.database import MemoryDatabase

RUNS = msgspec.json.Decoder(list[RunRow])
STEPS = msgspec.json.Decoder(list[NewStep])
EVENTS = msgspec.json.Decoder(list[NewEvent])
GROUPS = msgspec.json.Decoder(list[Group])
CALLS = msgspec.json.Decoder(list[Call])


class _Locked(tuple[Any, ...]):
    """A locked row: the columns of RUN_COLUMNS, and the instant."""

    __slots__ = ()

    @property
    def run_id(self) -> uuid.UUID:
        found: uuid.UUID = self[RUN_COLUMNS.index("run_id")]
        return found


class _Called(NamedTuple):
    """How many runs of a workspace were called."""

    workspace_id: uuid.UUID
    runs: int
    stood: bool


class Result:
    """What a statement answers."""

    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)

    def scalars(self) -> Iterator[Any]:
        return (row[0] for row in self._rows)

    def all(self) -> list[Any]:
        return self._rows

    def first(self) -> Any:
        return self._rows[0] if self._rows else None

    def scalar(self) -> Any:
        return self._rows[0][0] if self._rows else None

    scalar_one = scalar

    def one(self) -> Any:
        (row,) = self._rows
        return row


class _FoundCall(NamedTuple):
    """What is looked up of a call before its run is locked."""

    run_id: uuid.UUID
    workspace_id: uuid.UUID
    risk: str


class _Pending(NamedTuple):
    """How many calls of a workspace wait for approval."""

    workspace_id: uuid.UUID
    pending: int


class PlannedFault(RuntimeError):
    """A bug that the simulation put into one run: the database refuses its steps."""


class Connection:
    """Answers the engine's statements at one instant."""

    def __init__(self, database: MemoryDatabase) -> None:
        self._database = database
        self._runs = database.runs
        self._calls = database.calls
        self._now = database.now()
        self.touched: dict[uuid.UUID, None] = {}
        """The runs that were changed, or whose tool call was."""

    async def execute(self, statement: Any, parameters: Any) -> Result:
        return Result(ANSWERS[id(statement)](self, parameters))

    def _nothing(self, asked: Any) -> list[Any]:
        return []

    def _lock(self, asked: Any) -> list[Any]:
        return self._rows(asked["run_ids"])

    def _lock_parents(self, asked: Any) -> list[Any]:
        return self._rows(asked["ids"])

    def _claim(self, asked: Any) -> list[Any]:
        runs = [run for run in self._runs.values() if run.workspace_id not in asked.get("crowds", ())]
        due = [run for run in runs if run.next_tick_at is not None and run.next_tick_at <= self._now]
        due.sort(key=lambda run: (run.next_tick_at, run.run_id))
        claimed = []
        for run in due[: asked["most"]]:
            due_at = run.next_tick_at or self._now
            waited = (self._now - due_at).total_seconds()
            run.epoch += 1
            run.next_tick_at = self._now + dt.timedelta(seconds=asked["lease_s"])
            more = (run.status, run.script_position, run.tool_call_id, run.workspace_id, *_pays(run, self._now))
            claimed.append((run.run_id, run.parent_run_id, run.agent_id, run.epoch, waited, *more))
        return claimed

    def _look(self, asked: Any) -> list[Any]:
        del asked
        found = {(run.workspace_id, run.delayed_under): None for run in self._runs.values()}
        return sorted(each for each in found if each[1] is not None)

    def _call(self, asked: Any) -> list[Any]:
        lines = {(uuid.UUID(each["workspace_id"]), each["under"]) for each in msgspec.json.decode(asked["lines"])}
        called: dict[uuid.UUID, _Called] = {}
        for run in self._runs.values():
            clock, due_at = run.paused_at or self._now, run.step_due_at
            stood = due_at is not None and due_at > clock
            if (run.workspace_id, run.delayed_under) in lines and (run.paused_at or stood):
                before = called.get(run.workspace_id, _Called(run.workspace_id, 0, stood=False))
                called[run.workspace_id] = _Called(run.workspace_id, before.runs + 1, before.stood or stood)
                run.delayed_under, run.step_due_at = None, min(due_at or clock, clock)
                run.next_tick_at = self._now if run.paused_at is None else None
        return list(called.values())

    def _postpone(self, asked: Any) -> list[Any]:
        run = self._runs[asked["run_id"]]
        if run.epoch != asked["epoch"] or run.status in FINAL:
            return []
        run.vain_attempts += 1
        delay_s = min(asked["longest_s"], asked["lease_s"] * 2 ** min(run.vain_attempts, 20))
        run.next_tick_at = self._now + dt.timedelta(seconds=delay_s)
        return [(run.vain_attempts,)]

    def _parent(self, asked: Any) -> list[Any]:
        run = self._runs.get(asked["run_id"])
        return [] if run is None else [run]

    def _rows(self, run_ids: list[uuid.UUID]) -> list[Any]:
        found = sorted((self._runs[run_id] for run_id in run_ids), key=lambda run: (run.depth, run.run_id))
        self._now = self._database.now()
        return [_Locked((*(getattr(run, name) for name in RUN_COLUMNS), self._now)) for run in found]

    def _lock_live_children(self, asked: Any) -> list[Any]:
        below = [child for run_id in asked["run_ids"] for child in self._database.children.get(run_id, ())]
        return self._rows([run_id for run_id in below if self._runs[run_id].status not in FINAL])

    def _open_groups(self, asked: Any) -> list[Any]:
        return [
            msgspec.structs.astuple(group)
            for run_id in asked["run_ids"]
            for group in self._runs[run_id].groups.values()
            if not (group.state == "JOINED" and group.pending == 0)
        ]

    def _read_groups(self, asked: Any) -> list[Any]:
        found = []
        for each in msgspec.json.decode(asked["asked"]):
            group = self._runs[uuid.UUID(each["run_id"])].groups.get(each["group_id"])
            if group is not None:
                found.append(msgspec.structs.astuple(group))
        return found

    def _write(self, asked: Any) -> list[Any]:
        """Apply a ledger: the columns that the statement writes, and no others."""
        new_runs = RUNS.decode(asked["runs"])
        steps = STEPS.decode(asked["steps"])
        if any(step.run_id in self._database.poisoned for step in steps):
            raise PlannedFault("this run's steps are refused")
        before = [msgspec.structs.replace(self._runs[run.run_id]) for run in new_runs]
        for run in new_runs:
            stored = self._runs[run.run_id]
            for name in ledger._WRITTEN:
                setattr(stored, name, getattr(run, name))
        changes = self._put_groups(asked.get("groups", "[]"), tuple(ledger._WRITTEN_OF_GROUPS))
        events = EVENTS.decode(asked["events"])
        self._append(steps)
        self._database.step_turns += len({step.run_id for step in steps})
        for step in steps:
            run = self._runs[step.run_id]
            require((run.run_id, run.epoch) in self._database.paid, run, "took a step in a turn that was not paid")
        self.touched.update((run.run_id, None) for run in new_runs)
        self._database.audit.changed(self._now, before, steps, events, changes)
        return []

    def _append(self, steps: Sequence[NewStep]) -> None:
        for step in steps:
            self._database.steps.setdefault(step.run_id, []).append(step)

    def _put_groups(self, encoded: str, columns: Sequence[str] = ()) -> list[tuple[Group | None, Group]]:
        """Write groups, or only some columns of groups that exist; returns each as it was and as it is."""
        changes = []
        for new in GROUPS.decode(encoded):
            groups = self._runs[new.run_id].groups
            old = groups.get(new.group_id)
            if columns:
                assert old is not None
                new = msgspec.structs.replace(old, **{name: getattr(new, name) for name in columns})
            changes.append((old, new))
            groups[new.group_id] = new
        return changes

    def _accept(self, asked: Any) -> list[Any]:
        """Apply a group commit."""
        for run in msgspec.json.decode(asked["runs"]):
            self._database.add(_accepted(run, self._now))
        parents = msgspec.json.decode(asked.get("parents", "[]"))
        before = [msgspec.structs.replace(self._runs[uuid.UUID(each["run_id"])]) for each in parents]
        for each in parents:
            stored = self._runs[uuid.UUID(each.pop("run_id"))]
            due_at = each.pop("next_tick_at")
            stored.next_tick_at = None if due_at is None else msgspec.convert(due_at, dt.datetime)
            for name, value in each.items():
                setattr(stored, name, value)
        changes = self._put_groups(asked.get("groups", "[]"))
        steps = STEPS.decode(asked.get("steps", "[]"))
        events = EVENTS.decode(asked["events"])
        self._append(steps)
        self.touched.update((run.run_id, None) for run in before)
        self._database.audit.changed(self._now, before, steps, events, changes, spawning=True)
        return [(self._now,)]

    # ---- tool calls, and what waits outside --------------------------------------------------------------------------

    def _put_call(self, new: Call) -> None:
        old = self._calls.get(new.tool_call_id)
        self._calls[new.tool_call_id] = new
        self.touched[new.run_id] = None
        self._database.audit.calls.written(self._now, old, new)

    def _lock_calls(self, asked: Any) -> list[Any]:
        return [(*msgspec.structs.astuple(self._calls[call_id]), self._now) for call_id in sorted(asked["ids"])]

    def _write_calls(self, asked: Any) -> list[Any]:
        """Insert calls, or write the columns that the statement writes of those that exist."""
        for new in CALLS.decode(asked["calls"]):
            old = self._calls.get(new.tool_call_id)
            if old is not None:
                columns = ("status", "error", "reason", "decided_by", "decided_at", "ended_at")
                new = msgspec.structs.replace(old, **{name: getattr(new, name) for name in columns})
            self._put_call(new)
        return []

    def _count_pending(self, asked: Any) -> list[Any]:
        pending = sum(call.status == "PENDING" for call in self._calls.values())
        return [_Pending(workspace_id, pending) for workspace_id in asked["ids"]]

    def _find_call(self, asked: Any) -> list[Any]:
        call = self._calls.get(asked["tool_call_id"])
        return [] if call is None else [_FoundCall(call.run_id, call.workspace_id, call.risk)]

    def _start(self, asked: Any) -> list[Any]:
        run = self._runs[asked["run_id"]]
        if run.epoch != asked["epoch"] or run.ended_at is not None or run.status == "PAUSED":
            return []
        call = self._calls.get(run.tool_call_id) if run.tool_call_id is not None else None
        if call is None or call.status != "APPROVED":
            return []
        lease_until = self._now + dt.timedelta(seconds=asked["lease_s"])
        started = {"status": "RUNNING", "started_at": self._now, "epoch": asked["epoch"], "lease_until": lease_until}
        self._put_call(msgspec.structs.replace(call, **started))
        return [(call.tool_call_id, call.run_id, call.implementation, call.arguments, call.timeout_seconds)]

    def _record(self, asked: Any) -> list[Any]:
        for row in msgspec.json.decode(asked["ended"]):
            call = self._calls[uuid.UUID(row.pop("tool_call_id"))]
            if call.status == "RUNNING":
                self._put_call(msgspec.structs.replace(call, **row, ended_at=self._now))
        return []

    def _read_run(self, asked: Any) -> list[Any]:
        deadline_at = self._deadline_of(self._runs[asked["run_id"]])
        return [("", deadline_at is not None and deadline_at <= self._now)]

    @staticmethod
    def _deadline_of(run: RunRow) -> dt.datetime | None:
        """Return the first deadline of a group that is waited for."""
        waiting = [group.deadline_at for group in run.groups.values() if group.state == "WAITING"]
        return min((instant for instant in waiting if instant is not None), default=None)

    def _read_steps(self, asked: Any) -> list[Any]:
        steps = self._database.steps.get(asked["run_id"], ())
        return [(str(step.kind), step.payload) for step in steps]

    def _hand_back(self, asked: Any) -> list[Any]:
        for run in self._held(asked["held"]):
            if run.ended_at is None and run.next_tick_at is not None:
                run.next_tick_at = self._now + dt.timedelta(seconds=asked["delay_s"])
        return []

    def _renew_runs(self, asked: Any) -> list[Any]:
        for run in self._held(asked["held"]):
            if run.ended_at is None and run.next_tick_at is not None and run.next_tick_at > self._now:
                lease_until = self._now + dt.timedelta(seconds=asked["lease_s"])
                run.next_tick_at = min(lease_until, self._deadline_of(run) or lease_until)
        return []

    def _lost_runs(self, asked: Any) -> list[Any]:
        held = {run.run_id for run in self._held(asked["held"]) if run.ended_at is None}
        named = {uuid.UUID(each["run_id"]) for each in msgspec.json.decode(asked["held"])}
        return [(run_id,) for run_id in sorted(named - held)]

    def _held(self, encoded: str) -> list[RunRow]:
        """Return the runs whose epoch is the one that is named."""
        named = [(self._runs[uuid.UUID(each["run_id"])], each["epoch"]) for each in msgspec.json.decode(encoded)]
        return [run for run, epoch in named if run.epoch == epoch]

    def _renew_calls(self, asked: Any) -> list[Any]:
        for call in [self._calls[call_id] for call_id in asked["ids"]]:
            if call.status == "RUNNING":
                lease_until = self._now + dt.timedelta(seconds=asked["lease_s"])
                self._put_call(msgspec.structs.replace(call, lease_until=lease_until))
        return []

    def _lost_calls(self, asked: Any) -> list[Any]:
        return [(call_id,) for call_id in asked["ids"] if self._calls[call_id].status != "RUNNING"]


ANSWERS: dict[int, Callable[[Connection, Any], list[Any]]] = {
    id(claims._CLAIM): Connection._claim,
    id(claims._CLAIM_OTHERS): Connection._claim,
    id(backstop.LOOK): Connection._look,
    id(backstop.CALL): Connection._call,
    id(claims._POSTPONE): Connection._postpone,
    id(families._PARENT): Connection._parent,
    id(ledger._LOCK): Connection._lock,
    id(ledger._LOCK_LIVE_CHILDREN): Connection._lock_live_children,
    id(ledger._OPEN_GROUPS): Connection._open_groups,
    id(ledger._WRITE): Connection._write,
    id(ledger._WRITE_WITH_GROUPS): Connection._write,
    id(commits.LOCK_PARENTS): Connection._lock_parents,
    id(commits.READ_GROUPS): Connection._read_groups,
    id(commits.WRITE_CREATES): Connection._accept,
    id(commits.WRITE_CREATES_AND_SPAWNS): Connection._accept,
    id(claims._HAND_BACK): Connection._hand_back,
    id(ledger._LOCK_CALLS): Connection._lock_calls,
    id(ledger._WRITE_CALLS): Connection._write_calls,
    id(caps.LOCK): Connection._nothing,
    id(caps.COUNT_PENDING_TOOL_CALLS): Connection._count_pending,
    id(approvals._FIND): Connection._find_call,
    id(outside._START): Connection._start,
    id(outside._RECORD): Connection._record,
    id(outside._READ_RUN): Connection._read_run,
    id(outside._READ_STEPS): Connection._read_steps,
    id(claim_leases._RENEW_RUNS): Connection._renew_runs,
    id(claim_leases._LOST_RUNS): Connection._lost_runs,
    id(claim_leases._RENEW_CALLS): Connection._renew_calls,
    id(claim_leases._LOST_CALLS): Connection._lost_calls,
}
"""What answers each of the engine's statements."""


def _pays(run: RunRow, now: dt.datetime) -> tuple[bool, bool]:
    """Tell whether a run's step is due, and whether it was delayed before."""
    return run.step_due_at is not None and run.step_due_at <= now, run.delayed_under is not None


def _accepted(run: dict[str, Any], now: dt.datetime) -> RunRow:
    """Return a run as the statement that accepts it writes it: what is not given has the column's default."""
    defaults = {
        **dict.fromkeys(RUN_COLUMNS),
        **dict.fromkeys(("spawned_subruns", "pending_subruns", "failed_subruns", "script_position"), 0),
        **dict.fromkeys(("tool_calls", "step_count", "ticks", "epoch", "vain_attempts"), 0),
        "status": "PENDING",
        "last_seq": 1,
        "next_tick_at": now,
        "step_due_at": now,
        "created_at": now,
    }
    given = {name: value for name, value in run.items() if name in RUN_COLUMNS}
    return msgspec.convert({**defaults, **given}, RunRow)
