"""A database in memory that knows the engine's own statements, for the simulator.

The engine runs unchanged: `Ticker`, `Ledger`, `families`, `control`, `approvals`, `Outside`, `Leases` and `Commits`
give their statements to a connection, and it answers them as PostgreSQL would (`statements`). Two things are simpler. A
transaction runs in one piece, because the engine's locks make those that meet wait for each other; whoever runs it may
be stopped before it and after its commit. And time is the simulator's. Every write is shown to the audit.
"""

from __future__ import annotations

import datetime as dt
import types
import uuid
from collections.abc import Callable, Generator

from service.pen import NewStep, RunRow
from service.toolcalls import Call
from tests.simulator.audit import Audit
from tests.simulator.calls import CallAudit
from tests.simulator.statements import Connection


@types.coroutine
def switch() -> Generator[None, None, None]:
    """Let others run, or never be woken again."""
    yield


class MemoryDatabase:
    """All runs with their groups, behind the interface of `service.db.Database`."""

    def __init__(self, now: Callable[[], dt.datetime], outage: Callable[[], bool]) -> None:
        self.now = now
        self.runs: dict[uuid.UUID, RunRow] = {}
        self.children: dict[uuid.UUID, list[uuid.UUID]] = {}
        self.calls: dict[uuid.UUID, Call] = {}
        self.steps: dict[uuid.UUID, list[NewStep]] = {}
        self.poisoned: set[uuid.UUID] = set()
        self.step_turns = 0
        """Turns that wrote a step of their run's agent."""
        self.paid: set[tuple[uuid.UUID, int]] = set()
        """The claims, as run and epoch, whose turn may take a step: it was due then, and has its token."""
        self.audit = Audit(self.runs, self.children, CallAudit(self.runs, self.calls))
        self._outage = outage

    def begin(self) -> Transaction:
        return Transaction(self, self._outage)

    read = begin

    def add(self, run: RunRow) -> None:
        self.runs[run.run_id] = run
        self.audit.accepted(run)
        if run.parent_run_id is not None:
            self.children.setdefault(run.parent_run_id, []).append(run.run_id)


class Transaction:
    """One transaction, or one statement of its own: something may go wrong before it and after its commit."""

    def __init__(self, database: MemoryDatabase, outage: Callable[[], bool]) -> None:
        self._database = database
        self._outage = outage
        self._connection: Connection | None = None

    async def __aenter__(self) -> Connection:
        await switch()
        if self._outage():
            raise ConnectionRefusedError("the database is away")
        self._connection = Connection(self._database)
        return self._connection

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None or self._connection is None:
            return
        for run_id in self._connection.touched:
            self._database.audit.consistent(self._database.runs[run_id])
        await switch()
        if self._outage():
            raise ConnectionResetError("the commit's answer was lost")
