"""Who plays in the simulator's world: workers, callers, approvers and a clock. Nobody moves by himself.

Every worker's turn, every wait for a tool or a model, every renewal of leases and every request is a task that lets go
before each transaction, after each commit and each announcement. Who goes on, and what happens to him there, is decided
in `world`: so any two meet in any order. Between any two of those points a process may be killed or told to stop, the
database may be away, a commit's answer may be lost, rings may be lost, doubled or late.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import itertools
import random
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from service import claim_leases, commits, outside, tick
from service.approvals import decide_tool_call
from service.backstop import Backstop
from service.changes import GroupOptions
from service.claims import BATCH, Claim
from service.commits import Commits, Create, Spawn
from service.control import pause_run, resume_run
from service.db import is_outage
from service.errors import ApiError
from service.events import NewEvent
from service.families import cancel_run
from service.quota.inforce import REMEMBERED_S
from service.quota.limits import LIFTED, Limit, Rate
from service.tallies import Tallies
from service.tick import Ticker
from service.workspaces import Agents
from tests.simulator.breach import Breach, Broken
from tests.simulator.database import MemoryDatabase, switch
from tests.simulator.outsiders import (
    AGENTS,
    APPROVERS,
    DEFINITIONS,
    QUOTA,
    TAKES_S,
    WORKSPACE,
    Outsiders,
)
from tests.simulator.quotas import KnownQuotas, PaidTurns
from tests.simulator.statements import PlannedFault
from tests.simulator.tasks import Loop, Task, Work

START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
LEASE_S, SWEEP_S = 2.0, 1.0
NO_METADATA = msgspec.Raw(b"{}")


class Faults(NamedTuple):
    """How often something goes wrong, each a share of the occasions."""

    kill: float = 0.02  # a coroutine is never woken again
    outage: float = 0.01  # before a transaction, or after its commit
    lose_ring: float = 0.3
    double_ring: float = 0.1
    poison: float = 0.04  # a run's steps cannot be written
    full_lane: float = 0.05  # a worker that waits for as many tools and models as it may hands a run back
    interrupt: float = 0.005  # at any moment: a worker that is to stop waits no longer for tools and models


NONE = Faults(*(0.0 for _ in Faults._fields))


class _Ticker(Ticker):
    """The ticker, which here fails only as planned, and tells which turns it may take a step in."""

    async def claim(self, most: int = BATCH) -> list[Claim]:
        claims = await super().claim(most)
        paid: set[tuple[uuid.UUID, int]] = self._database.paid  # type: ignore[attr-defined]
        paid.update((claim.run_id, claim.epoch) for claim in claims if claim.pays and claim.delay is None)
        return claims

    async def postpone(self, claim: Claim, fault: Exception) -> None:
        if not isinstance(fault, PlannedFault):
            raise Breach(f"run {claim.run_id} could not be advanced: {fault!r}") from fault
        await super().postpone(claim, fault)


class _Announcer:
    """Rings and publishes, or loses it."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    async def announce(
        self, events: Sequence[NewEvent], created_at: dt.datetime, *, due: bool, tallies: Tallies | None = None
    ) -> None:
        await switch()
        for event in events:
            self._stage.database.audit.published(event)
        if due:
            self._stage.ring()


class _Worker:
    """A worker process: asleep until a bell or the sweep wakes it, then in the middle of one turn.

    Beside its turn it waits for tools and models, and renews what it holds.
    """

    def __init__(self, ticker: _Ticker) -> None:
        self.ticker = ticker
        self.task: Task | None = None
        self.beside: list[Task] = []
        self.belled = True
        self.looks_at = START

    def awake(self, now: dt.datetime) -> list[Task]:
        """Return what can go on beside its turn."""
        return [task for task in self.beside if task.is_awake(now)]


class Stage:
    """Who plays, and what each of them does; nobody moves by himself."""

    def __init__(
        self,
        seed: int,
        faults: Faults = Faults(),  # noqa: B008 - immutable
        workers: int = 3,
        takes_s: Sequence[float] = TAKES_S,
        tick_rates: Sequence[Rate] = (),
    ) -> None:
        # Chance of its own, so that a seed says the same about all else in worlds with and without tick rates.
        self._rates_rng = random.Random(f"tick rates {seed}")  # noqa: S311 - a simulation
        self._tick_rates = tick_rates
        self._paying = PaidTurns(self)
        self.quota = QUOTA
        self.change_tick_rate()
        self._takes_s = takes_s
        self.rng = random.Random(seed)  # noqa: S311 - a simulation
        self.faults = faults
        self.now = START
        self.steps = 0
        self.seen: Counter[str] = Counter()
        """The faults that were made, and what else is worth counting."""
        self.database = MemoryDatabase(lambda: self.now, self._is_away)
        self.database.audit.agents = self.database.audit.calls.agents = AGENTS
        announcer: Any = _Announcer(self)
        self.announcer = announcer
        self.loop = Loop(lambda: self.now, self._start_beside)
        self._agents = Agents()
        self._agents._known.update(AGENTS)
        self._tallies = Tallies()
        database: Any = self.database
        self.commits = Commits(database, announcer)
        self.workers = [_Worker(self._new_ticker()) for _ in range(workers)]
        self.callers: list[Task] = []
        self._late_rings: list[dt.datetime] = []
        self._ids = itertools.count(1000)
        self._going_on: _Worker | None = None
        # What the engine finds in place of its own while somebody goes on: ids, so that a seed says everything; tasks.
        self._here: list[tuple[dict[str, Any], str, Any]] = [
            (vars(commits), "new_id", self._new_id),
            (vars(tick), "new_id", self._new_id),
            *((vars(module), "asyncio", self.loop) for module in (tick, outside, claim_leases)),
        ]

    def chance(self, share: float) -> bool:
        return share > 0 and self.rng.random() < share

    def happens(self, fault: str) -> bool:
        """Decide whether a fault happens now, and count it."""
        if not self.chance(getattr(self.faults, fault)):
            return False
        self.seen[fault] += 1
        return True

    def _is_away(self) -> bool:
        return self.happens("outage")

    def _new_ticker(self) -> _Ticker:
        """Return the hands of a process that has just begun."""
        database: Any = self.database
        outsiders = Outsiders(database, LEASE_S, self.rng, self.loop.sleep, self._tool_started, self._takes_s)
        rates: Any = self._paying
        quotas = KnownQuotas(database)
        backstop = Backstop(database, quotas, rates, self._tallies, None, self.passed_s) if self._tick_rates else None
        ticker = _Ticker(database, self.announcer, self._agents, self._tallies, LEASE_S, outsiders, backstop)
        ticker._definitions._known[WORKSPACE] = DEFINITIONS
        ticker._quotas._known[WORKSPACE] = (float("inf"), self.quota)
        return ticker

    def passed_s(self) -> float:
        return (self.now - START).total_seconds()

    def change_tick_rate(self) -> None:
        """Put another tick rate in force, where the world has any; each worker learns of it later."""
        if self._tick_rates:
            self.quota = dataclasses.replace(QUOTA, rates={Limit.TICK: self._rates_rng.choice(self._tick_rates)})

    def require_paid(self) -> None:
        """Require that no step was taken by a turn without a token; raises Broken."""
        if self._tick_rates and self.database.step_turns > self._paying.paid:
            raise Broken(f"{self.database.step_turns} turns took a step, and {self._paying.paid} were paid")

    def require_called(self, calm_since: dt.datetime) -> None:
        """Require that nobody is left who was delayed under another rate than is in force; raises Broken."""
        if self._tick_rates and self.now > calm_since + dt.timedelta(seconds=2 * REMEMBERED_S):
            code = self.quota.rates[Limit.TICK].code
            for run in self.database.runs.values():
                if run.delayed_under not in (None, code) and (run.step_due_at or self.now) > self.now:
                    raise Broken(f"the rate is {code}, and nobody has called {run}")

    def _tool_started(self, tool_call_id: uuid.UUID) -> None:
        self.database.audit.calls.started(tool_call_id)
        self.seen["tools started"] += 1

    # ---- what callers do ---------------------------------------------------------------------------------------------

    def _call(self, work: Work) -> None:
        self.callers.append(Task(work, START))

    def create(self, script: int, expected_subruns: int = 0, max_wait_s: float = 60.0) -> None:
        write = Create(WORKSPACE, uuid.UUID(int=script), "", "", NO_METADATA, expected_subruns, max_wait_s, LIFTED)
        self._call(self._submit(write))

    def spawn(self, parent: uuid.UUID, script: int, group_id: str | None, options: GroupOptions) -> None:
        write = Spawn(parent, WORKSPACE, uuid.UUID(int=script), "", NO_METADATA, group_id, LIFTED, options)
        self._call(self._submit(write))

    def family(self, script: int, children: Sequence[int], options: GroupOptions, *, announced: bool) -> None:
        """Ask for a run, and then for its children one by one, all in one group."""
        self._call(self._family(script, children, options, announced))

    async def _family(self, script: int, children: Sequence[int], options: GroupOptions, announced: bool) -> None:
        expected = len(children) if announced else 0
        parent = await self._submit(
            Create(WORKSPACE, uuid.UUID(int=script), "", "", NO_METADATA, expected, 60.0, LIFTED)
        )
        for child in children:
            await self._submit(Spawn(parent, WORKSPACE, uuid.UUID(int=child), "", NO_METADATA, "f", LIFTED, options))

    def control(self, verb: str, run_id: uuid.UUID) -> None:
        self._call(self._control(verb, run_id))

    async def _submit(self, write: Create | Spawn) -> uuid.UUID:
        (answer,) = await self.commits._commit([write])
        if isinstance(answer, Exception):
            raise answer
        if self.happens("poison"):
            self.database.poisoned.add(answer.run_id)
        return answer.run_id

    async def _control(self, verb: str, run_id: uuid.UUID) -> None:
        control = {"cancel": cancel_run, "pause": pause_run, "resume": resume_run}[verb]
        async with self.database.begin() as connection:
            written = await control(connection, run_id, None)  # type: ignore[arg-type]
        await self.announcer.announce(written.events, written.created_at, due=written.due)

    def decide(self, tool_call_id: uuid.UUID, approver: int, *, approve: bool) -> None:
        """Ask for a decision on a tool call."""
        self._call(self._decide(tool_call_id, approver, approve))

    async def _decide(self, tool_call_id: uuid.UUID, approver: int, approve: bool) -> None:
        caller = APPROVERS[approver]
        async with self.database.begin() as connection:
            written = await decide_tool_call(connection, caller, tool_call_id, approve=approve)  # type: ignore[arg-type]
        self.seen["approved" if approve else "rejected"] += 1
        self.seen["decided while paused"] += self.database.runs[written.events[0].run_id].status == "PAUSED"
        await self.announcer.announce(written.events, written.created_at, due=written.due)

    # ---- what workers do ---------------------------------------------------------------------------------------------

    async def _turn(self, worker: _Worker) -> None:
        """Do what `service.worker` does with a batch."""
        ticker = worker.ticker
        worker.belled = False
        if self.faults == NONE or self._rates_rng.random() < 0.5:
            ticker._quotas._known[WORKSPACE] = (float("inf"), self.quota)
        claims = await ticker.claim(self.rng.choice((1, 2, 5, 128)))
        worker.looks_at = self.now + dt.timedelta(seconds=SWEEP_S)
        if not claims:
            return
        worker.looks_at = self.now
        at_once, outside_ = await ticker.part(claims)
        if outside_ and self.happens("full_lane"):
            await ticker.hand_back(outside_, 1.0)
            outside_ = []
        for claim in outside_:
            self._start_beside(self._settle_outside(ticker, claim))
        if at_once:
            outcomes = await ticker.outcomes(at_once)
            await switch()
            await ticker.settle(at_once, outcomes, ring=self.chance(0.5))

    async def _settle_outside(self, ticker: _Ticker, claim: Claim) -> None:
        outcomes = await ticker.outcomes([claim])
        await switch()
        await ticker.settle([claim], outcomes)

    def _start_beside(self, work: Work) -> Task:
        """Let something go on beside the turn of the worker that goes on now."""
        assert self._going_on is not None
        task = Task(work, self.now)
        self._going_on.beside.append(task)
        return task

    def ring(self) -> None:
        """Wake a worker: or nobody, or two, or one later than others that were rung after it."""
        if self.happens("lose_ring"):
            return
        for _ in range(2 if self.happens("double_ring") else 1):
            if self.chance(self.faults.lose_ring):
                self.seen["late_ring"] += 1
                self._late_rings.append(self.now + dt.timedelta(seconds=self.rng.random() * 3))
            else:
                self.rng.choice(self.workers).belled = True

    # ---- who goes on -------------------------------------------------------------------------------------------------

    def go_on(self, task: Task, worker: _Worker | None = None) -> bool:
        """Let a task go on to its next point; False when it is over. Or kill it there, with all of its process."""
        self.steps += 1
        if self.happens("kill"):
            if worker is None:
                task.close()
            else:
                self.kill(worker)
            return False
        self._going_on, self.loop.current = worker, task
        before = [names[name] for names, name, _ in self._here]
        for names, name, ours in self._here:
            names[name] = ours
        try:
            return task.go_on()
        except (StopIteration, asyncio.CancelledError):
            return False
        except ApiError:
            return False  # a caller was refused
        except Breach as breach:
            raise Broken(str(breach)) from None
        except Exception as fault:
            if is_outage(fault):
                return False  # as a worker does: it is logged and the leases end
            raise
        finally:
            for (names, name, _), theirs in zip(self._here, before, strict=True):
                names[name] = theirs

    def _new_id(self) -> uuid.UUID:
        return uuid.UUID(int=next(self._ids))

    def kill(self, worker: _Worker) -> None:
        """End a worker process wherever it is; another takes its place, and knows nothing."""
        for task in (*worker.beside, *([worker.task] if worker.task is not None else [])):
            task.close()
        worker.task, worker.beside, worker.ticker = None, [], self._new_ticker()

    def let_caller(self, index: int) -> None:
        task = self.callers[index]
        if not self.go_on(task):
            self.callers.remove(task)

    def let_worker(self, worker: _Worker) -> None:
        """Let a worker go on: with its turn, or with what it does beside it."""
        beside = worker.awake(self.now)
        if beside and (not self._has_a_turn(worker) or self.rng.random() < 0.5):
            self.let_beside(worker, self.rng.choice(beside))
        elif self._has_a_turn(worker):
            task = worker.task = worker.task or Task(self._turn(worker), START)
            if not self.go_on(task, worker):
                worker.task = None

    def let_beside(self, worker: _Worker, task: Task) -> None:
        if not self.go_on(task, worker) and task in worker.beside:
            worker.beside.remove(task)

    def _has_a_turn(self, worker: _Worker) -> bool:
        return worker.task is not None or worker.belled or self.now >= worker.looks_at

    def pass_time(self, seconds: float) -> None:
        self.now += dt.timedelta(seconds=seconds)
        for at in [at for at in self._late_rings if at <= self.now]:
            self._late_rings.remove(at)
            self.rng.choice(self.workers).belled = True

    def close(self) -> None:
        """Kill whoever is in the middle of something."""
        for task in self.callers:
            task.close()
        for worker in self.workers:
            self.kill(worker)

    @staticmethod
    def interrupt(worker: _Worker) -> None:
        """Let a worker wait no longer for tools and models."""
        for task in worker.beside:
            task.cancel()
