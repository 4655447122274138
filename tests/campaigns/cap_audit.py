"""Whether a cap was ever exceeded: every place that was taken or given back, in order. Nothing of the service is asked.

What PostgreSQL holds is read from the tables after a race: each event stands in a transaction of its own row, and a
server with `track_commit_timestamp` knows when that committed. So the count is known at every instant, not in samples.
What Redis holds is read while it happens: MONITOR tells every command in the order in which it was executed, those of
scripts included. Pure, but for the statements; `cap_races` runs them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from sqlalchemy import text

from service.quota.limits import Limit


class Change(NamedTuple):
    """One place taken or given back."""

    at_us: int  # when the transaction committed, or the command was executed
    taken: bool
    pool: str  # what the cap counts within: a workspace, a run, a user
    holder: str
    who: str  # the process that took it; empty where nobody can tell


@dataclass
class History:
    """What became of one cap."""

    peak: int = 0  # most places that were held at any instant
    taken: int = 0
    filled: int = 0  # how often a pool became full
    between: int = 0  # places taken after one that another process took
    left: int = 0  # places held at the end
    faults: list[str] = field(default_factory=list)

    def add(self, other: History) -> None:
        """Take in the history of another round."""
        self.peak = max(self.peak, other.peak)
        for name in ("taken", "filled", "between", "left"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.faults += other.faults


class Replay:
    """Follows the places of pools that all have the same cap."""

    def __init__(self, most: int) -> None:
        self.history = History()
        self.most = most
        self._held: dict[str, dict[str, float]] = {}  # holder -> when its place lapses
        self._last: dict[str, str] = {}

    def take(self, change: Change, until_us: float = float("inf")) -> None:
        """Note a place that was taken, or renewed."""
        held = self._held.setdefault(change.pool, {})
        for holder in [holder for holder, lapses_us in held.items() if lapses_us <= change.at_us]:
            del held[holder]
        if change.holder in held:
            held[change.holder] = until_us
            return
        held[change.holder] = until_us
        history = self.history
        history.taken += 1
        history.peak = max(history.peak, len(held))
        history.filled += len(held) == self.most
        history.between += self._last.get(change.pool, change.who) != change.who
        self._last[change.pool] = change.who
        if len(held) > self.most:
            history.faults.append(f"{change.pool} held {len(held)} places of {self.most}")

    def give_back(self, change: Change) -> None:
        """Note a place that is free again."""
        held = self._held.get(change.pool, {})
        if held.pop(change.holder, None) is None:
            self.history.faults.append(f"{change.holder} gave back a place in {change.pool} that it did not hold")

    def end(self, at_us: float) -> History:
        """Return what was found; places that have not lapsed by then are left."""
        self.history.left = sum(until > at_us for held in self._held.values() for until in held.values())
        return self.history


def replay(changes: Iterable[Change], most: int) -> History:
    """Follow places that never lapse; of changes at the same microsecond, those that give back come first."""
    followed = Replay(most)
    for change in sorted(changes):
        (followed.take if change.taken else followed.give_back)(change)
    return followed.end(0)


_COMMITTED = "CAST(extract(epoch FROM pg_xact_commit_timestamp(e.xmin)) * 1000000 AS bigint)"

RUN_CHANGES = text(f"""
    SELECT {_COMMITTED} AS at_us, e.event_type = 'run_created' AS taken, r.workspace_id, r.parent_run_id, r.run_id,
           r.input_text AS who
    FROM runs r JOIN events e ON e.run_id = r.run_id
    WHERE r.workspace_id = ANY(:ids) AND (e.event_type = 'run_created'
        OR (e.event_type = 'state_changed' AND e.payload->>'to' IN ('COMPLETED', 'FAILED', 'CANCELED')))
""")  # noqa: S608 - a constant

CALL_CHANGES = text(f"""
    SELECT at_us, taken, workspace_id, run_id, tool_call_id FROM (
        SELECT {_COMMITTED} AS at_us, e.event_type = 'tool_call_requested' AS taken, r.workspace_id, r.run_id,
               e.payload->>'tool_call_id' AS tool_call_id,
               row_number() OVER (PARTITION BY e.payload->>'tool_call_id' ORDER BY e.seq) AS place
        FROM runs r JOIN events e ON e.run_id = r.run_id
        WHERE r.workspace_id = ANY(:ids) AND e.event_type LIKE 'tool\\_call\\_%'
    ) told WHERE place <= 2
""")  # noqa: S608 - a constant
"""A tool call waits from the event that requests it to the next one: approved, rejected, or ended with its run."""

ROWS = text("""
    SELECT (SELECT count(*) FROM runs WHERE workspace_id = ANY(:ids)) AS runs,
           (SELECT count(*) FROM runs WHERE workspace_id = ANY(:ids) AND ended_at IS NULL) AS live,
           (SELECT count(*) FROM tool_calls WHERE workspace_id = ANY(:ids)) AS calls,
           (SELECT count(*) FROM tool_calls WHERE workspace_id = ANY(:ids) AND status = 'PENDING') AS pending
""")

COUNTERS = text("""
    SELECT p.run_id || ' counts ' || p.pending_subruns || ' pending subruns, ' || p.spawned_subruns
           || ' spawned; it has ' || count(c.run_id) FILTER (WHERE c.ended_at IS NULL) || ', '
           || count(c.run_id) AS fault
    FROM runs p LEFT JOIN runs c ON c.parent_run_id = p.run_id
    WHERE p.workspace_id = ANY(:ids) AND p.parent_run_id IS NULL GROUP BY p.run_id
    HAVING p.pending_subruns <> count(c.run_id) FILTER (WHERE c.ended_at IS NULL)
        OR p.spawned_subruns <> count(c.run_id)
    UNION ALL
    SELECT run_id || ' counts ' || r.tool_calls || ' tool calls; it has ' || count(t.tool_call_id)
    FROM runs r LEFT JOIN tool_calls t USING (run_id) WHERE r.workspace_id = ANY(:ids)
    GROUP BY run_id HAVING r.tool_calls <> count(t.tool_call_id)
""")

SAMPLES = {
    Limit.LIVE_PARENT_RUNS: """SELECT count(*) AS held FROM runs WHERE workspace_id = ANY(:ids) AND ended_at IS NULL
        AND parent_run_id IS NULL GROUP BY workspace_id""",
    Limit.LIVE_RUNS: """SELECT count(*) AS held FROM runs WHERE workspace_id = ANY(:ids) AND ended_at IS NULL
        GROUP BY workspace_id""",
    Limit.PENDING_SUBRUNS: """SELECT count(*) AS held FROM runs WHERE workspace_id = ANY(:ids) AND ended_at IS NULL
        AND parent_run_id IS NOT NULL GROUP BY parent_run_id""",
    Limit.PENDING_TOOL_CALLS: """SELECT count(*) AS held FROM tool_calls WHERE workspace_id = ANY(:ids)
        AND status = 'PENDING' GROUP BY workspace_id""",
    Limit.PENDING_TOOL_CALLS_PER_RUN: """SELECT count(*) AS held FROM tool_calls WHERE workspace_id = ANY(:ids)
        AND status = 'PENDING' GROUP BY run_id""",
}
"""Rows counted while the race is on, by an observer of its own: the same caps seen from another side."""

WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"


def pool_of(limit: Limit, workspace_id: object, run_id: object, parent_run_id: object) -> str | None:
    """Return what a run (or, for tool calls, one of its calls) counts within; None where it does not count."""
    if limit is Limit.LIVE_PARENT_RUNS:
        return None if parent_run_id is not None else str(workspace_id)
    if limit is Limit.PENDING_SUBRUNS:
        return None if parent_run_id is None else str(parent_run_id)
    return str(run_id if limit is Limit.PENDING_TOOL_CALLS_PER_RUN else workspace_id)


_COMMAND = re.compile(
    rb'\+?(\d+)\.(\d{6}) \[[^\]]*\] "(ZADD|ZREM)" '
    rb'"plimsoll:\{sockets\}:(workspace|user):([^"]+)" "([^"]*)"(?: "([^"]*)")?',
    re.IGNORECASE,
)


class Monitored:
    """Follows the pools of sockets from what MONITOR prints."""

    def __init__(self, kind: str, most: int) -> None:
        self.replay = Replay(most)
        self.commands = 0
        self._kind = kind.encode()

    def read(self, line: bytes) -> None:
        """Take in one line."""
        self.commands += b'"EVALSHA"' in line
        if b'"ZADD"' not in line and b'"ZREM"' not in line:
            return
        found = _COMMAND.match(line)
        if found is None or found[4] != self._kind:
            return
        at_us = int(found[1]) * 1_000_000 + int(found[2])
        renewing = found[3].upper() == b"ZADD"
        holder = (found[7] if renewing else found[6]).decode()
        change = Change(at_us, renewing, found[5].decode(), holder, holder.partition(":")[0])
        if renewing:
            self.replay.take(change, int(found[6]) * 1000.0)
        else:
            self.replay.give_back(change)
