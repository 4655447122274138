"""One transaction's ledger: runs locked in the one order, changes noted in memory, all written by one statement.

The lock order everywhere is workspace, then parent before child, then by id: (depth, run_id). Each call locks rows that
lie deeper than those locked before it, so two ledgers never wait for each other in a circle. Tool calls are locked
after their runs. The lock is FOR NO KEY UPDATE: it shuts out every other change of the row and lets the foreign keys of
its steps and events through.

Python's work per statement is what costs, so a batch of any size is one SELECT and one write (docs/decisions/0002).
What is noted is decided by `advance`; who uses ledgers: `tick` and `families`.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Iterable
from typing import NamedTuple

import msgspec
from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.changes import child_ended
from service.db import rows
from service.events import APPEND_EVENTS, INSTANT, NewEvent
from service.joins import Group
from service.pen import Advance, NewStep, RunRow
from service.quota.caps import count_pending_tool_calls, lock_workspaces
from service.toolcalls import Call

RUN_COLUMNS = tuple(name for name in RunRow.__struct_fields__ if name not in ("groups", "tool_call"))
_COLUMNS = ", ".join(RUN_COLUMNS)
GROUP_COLUMNS = ", ".join(f"g.{name}" for name in Group.__struct_fields__)


def locking(select: str) -> TextClause:
    """Complete a SELECT that locks rows: each comes with the database's clock, read once the row was locked.

    So the last row tells an instant at which all are locked. `now()` is when the transaction began, before it waited
    for anybody: stamped with that, a change would seem older than the one that it followed.
    """
    return text(f"WITH locked AS MATERIALIZED ({select}) SELECT locked.*, clock_timestamp() FROM locked")  # noqa: S608 - our own words


_LOCK = locking(f"""
    SELECT {_COLUMNS} FROM runs WHERE run_id = ANY(CAST(:run_ids AS uuid[]))
    ORDER BY depth, run_id FOR NO KEY UPDATE
""")  # noqa: S608 - the columns are RunRow's own

_LOCK_LIVE_CHILDREN = locking(f"""
    SELECT {_COLUMNS} FROM runs WHERE parent_run_id = ANY(CAST(:run_ids AS uuid[])) AND ended_at IS NULL
    ORDER BY depth, run_id FOR NO KEY UPDATE
""")  # noqa: S608 - the columns are RunRow's own

_OPEN_GROUPS = text(f"""
    SELECT {GROUP_COLUMNS} FROM subrun_groups g WHERE g.run_id = ANY(CAST(:run_ids AS uuid[]))
        AND NOT (g.state = 'JOINED' AND g.pending = 0)
    ORDER BY g.run_id, g.group_id
""")  # noqa: S608 - the columns are Group's own
"""To be read after their parents were locked, by a statement of its own: an older snapshot would miss changes."""

_CALL_COLUMNS = Call.__struct_fields__
_LOCK_CALLS = locking(f"""
    SELECT {", ".join(_CALL_COLUMNS)} FROM tool_calls WHERE tool_call_id = ANY(CAST(:ids AS uuid[]))
    ORDER BY tool_call_id FOR NO KEY UPDATE
""")  # noqa: S608 - the columns are Call's own
"""Locked after their runs: whoever executes a tool records its end without the run's lock (`outside`)."""

_WRITE_CALLS = text(f"""
    INSERT INTO tool_calls AS t ({", ".join(_CALL_COLUMNS)})
    SELECT {", ".join(_CALL_COLUMNS)} FROM json_to_recordset(CAST(:calls AS json))
        AS c(tool_call_id uuid, workspace_id uuid, run_id uuid, step_index int, tool text, implementation text,
             arguments jsonb, risk text, timeout_seconds float8, model_call_id text, status text, result jsonb,
             error text, reason text, decided_by uuid, created_at timestamptz, decided_at timestamptz,
             started_at timestamptz, epoch int, lease_until timestamptz, ended_at timestamptz)
    ON CONFLICT (tool_call_id) DO UPDATE SET
        status = excluded.status, error = excluded.error, reason = excluded.reason, decided_by = excluded.decided_by,
        decided_at = excluded.decided_at, ended_at = excluded.ended_at
""")  # noqa: S608 - the columns are Call's own

_WRITTEN = {
    "status": "text",
    "pending_subruns": "int",
    "failed_subruns": "int",
    "script_position": "int",
    "tool_call_id": "uuid",
    "tool_calls": "int",
    "step_count": "int",
    "last_seq": "int",
    "ticks": "int",
    "epoch": "int",
    "next_tick_at": "timestamptz",
    "step_due_at": "timestamptz",
    "delayed_under": "text",
    "wait_until": "timestamptz",
    "paused_from": "text",
    "paused_at": "timestamptz",
    "vain_attempts": "int",
    "error_summary": "text",
    "started_at": "timestamptz",
    "ended_at": "timestamptz",
}
"""The columns that a ledger writes, with their types."""

_WRITTEN_OF_GROUPS = {
    "deadline_at": "timestamptz",
    "pending": "int",
    "failed": "int",
    "state": "text",
    "decided_at": "timestamptz",
}
"""The columns of groups that a ledger writes, with their types; the others change by spawns alone (`commits`)."""

_CHANGE_RUNS = f"""
    changed AS (
        UPDATE runs SET {", ".join(f"{name} = new.{name}" for name in _WRITTEN)}
        FROM json_to_recordset(CAST(:runs AS json))
            AS new(run_id uuid, {", ".join(f"{name} {its_type}" for name, its_type in _WRITTEN.items())})
        WHERE runs.run_id = new.run_id
    ), stepped AS (
        INSERT INTO steps (run_id, step_index, kind, payload, correlation_id, created_at)
        SELECT run_id, step_index, kind, payload, correlation_id, {INSTANT}
        FROM json_to_recordset(CAST(:steps AS json))
            AS s(run_id uuid, step_index int, kind text, payload jsonb, correlation_id uuid)
    )
"""  # noqa: S608 - the columns are those above

_WRITE = text(f"WITH {_CHANGE_RUNS} {APPEND_EVENTS}")
_WRITE_WITH_GROUPS = text(f"""
    WITH {_CHANGE_RUNS}, grouped AS (
        UPDATE subrun_groups g SET {", ".join(f"{name} = new.{name}" for name in _WRITTEN_OF_GROUPS)}
        FROM json_to_recordset(CAST(:groups AS json))
            AS new(run_id uuid, group_id text,
                   {", ".join(f"{name} {its_type}" for name, its_type in _WRITTEN_OF_GROUPS.items())})
        WHERE g.run_id = new.run_id AND g.group_id = new.group_id
    )
    {APPEND_EVENTS}
""")  # noqa: S608 - the columns are those above


class Written(NamedTuple):
    """What a transaction has to announce once it has committed."""

    events: list[NewEvent]
    created_at: dt.datetime  # of all of them
    due: bool  # whether some run became due, so that workers must be rung


class Ledger:
    """The locked runs of one transaction and what it is about to write about them."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection
        self.runs: dict[uuid.UUID, RunRow] = {}
        """Every locked run as it shall be."""
        self.steps: list[NewStep] = []
        self.events: list[NewEvent] = []
        self._changed: dict[uuid.UUID, None] = {}
        self._groups: dict[tuple[uuid.UUID, str], Group] = {}
        self._calls: dict[uuid.UUID, Call] = {}
        self._now: dt.datetime | None = None

    @property
    def now(self) -> dt.datetime:
        """The transaction's instant, which stamps all it writes: when the last of its rows was locked."""
        if self._now is None:
            raise RuntimeError("the ledger has not locked any run")
        return self._now

    async def lock_workspaces(self, workspace_ids: set[uuid.UUID]) -> dict[uuid.UUID, int]:
        """Lock workspaces, before any run; returns how many tool calls of each wait for approval."""
        if self.runs:
            raise RuntimeError("workspaces are locked before runs")
        await lock_workspaces(self._connection, workspace_ids)
        return await count_pending_tool_calls(self._connection, workspace_ids)

    async def lock(self, run_ids: Iterable[uuid.UUID]) -> None:
        """Lock runs and read what they are now; ids that do not exist are passed over."""
        await self._lock(_LOCK, run_ids)

    async def lock_descendants(self, run_id: uuid.UUID) -> list[RunRow]:
        """Lock every live descendant of a locked run and return them, parents first.

        Level by level: while a run is locked nobody can spawn below it, so each level is complete when it is read.
        """
        found: list[RunRow] = []
        level = [run_id]
        while level:
            runs = await self._lock(_LOCK_LIVE_CHILDREN, level)
            found += runs
            level = [run.run_id for run in runs]
        return found

    def note(self, outcome: Advance) -> None:
        """Note one decision; a run that it ends settles its parent, which must be locked too."""
        run = outcome.run
        self.note_alone(outcome)
        if run.is_final and run.parent_run_id is not None:
            self.note_alone(child_ended(self.runs[run.parent_run_id], run, self.now))

    def note_alone(self, outcome: Advance) -> None:
        """Note one decision that leaves the run's parent to the caller."""
        self.runs[outcome.run.run_id] = outcome.run
        self._changed[outcome.run.run_id] = None
        self.steps += outcome.steps
        self.events += outcome.events
        self._groups.update(((group.run_id, group.group_id), group) for group in outcome.groups)
        self._calls.update((call.tool_call_id, call) for call in outcome.tool_calls)

    async def write(self) -> None:
        """Write all that was noted."""
        if not self._changed:
            return
        changed = (self.runs[run_id] for run_id in self._changed)
        parameters = {
            # Groups and tool calls are rows of their own: without them a run's row stays small.
            "runs": rows(
                msgspec.structs.replace(run, groups={}, tool_call=None) if run.groups or run.tool_call else run
                for run in changed
            ),
            "steps": rows(self.steps),
            "events": rows(self.events),
            "now": self.now,
        }
        if self._groups:
            parameters["groups"] = rows(self._groups.values())
        await self._connection.execute(_WRITE_WITH_GROUPS if self._groups else _WRITE, parameters)
        if self._calls:
            await self._connection.execute(_WRITE_CALLS, {"calls": rows(self._calls.values())})

    def written(self) -> Written:
        """Return what to announce after the commit."""
        return Written(self.events, self.now, self.makes_due())

    def makes_due(self) -> bool:
        """Tell whether some run is due as soon as this is committed."""
        due_at = (self.runs[run_id].next_tick_at for run_id in self._changed)
        return any(instant is not None and instant <= self.now for instant in due_at)

    async def _lock(self, statement: TextClause, run_ids: Iterable[uuid.UUID]) -> list[RunRow]:
        found = await self._connection.execute(statement, {"run_ids": list(run_ids)})
        runs = []
        for row in found:
            run = RunRow(*row[:-1])
            self._now = row[-1]
            self.runs[run.run_id] = run
            runs.append(run)
        parents = [run.run_id for run in runs if run.spawned_subruns]
        if parents:
            for row in await self._connection.execute(_OPEN_GROUPS, {"run_ids": parents}):
                group = Group(*row)
                self.runs[group.run_id].groups[group.group_id] = group
        call_ids = [run.tool_call_id for run in runs if run.tool_call_id is not None]
        if call_ids:
            for row in await self._connection.execute(_LOCK_CALLS, {"ids": call_ids}):
                call = Call(*row[:-1])
                self._now = row[-1]
                self.runs[call.run_id].tool_call = call
        return runs
