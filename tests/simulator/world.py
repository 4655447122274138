"""A world of workers, callers and faults around the real engine, driven by one seed on a clock of its own.

Every worker's turn and every caller's request is a coroutine of the real code. It lets go at each transaction and each
announcement, and the world decides who goes on: so any two meet in any order. Between any two of those points a process
may be killed, the database may be away, a commit's answer may be lost, rings may be lost, doubled or late, and time
may jump past every lease. When the faults are over, everything must end.
"""

from __future__ import annotations

import datetime as dt
import itertools
import random
import uuid
from collections.abc import Coroutine, Sequence
from typing import Any, NamedTuple, TypeAlias

import msgspec

from service import commits
from service.changes import GroupOptions
from service.commits import Commits, Create, Spawn
from service.control import pause_run, resume_run
from service.db import is_outage
from service.errors import ApiError
from service.events import NewEvent
from service.families import cancel_run
from service.joins import FailurePolicy, JoinPolicy
from service.quota.limits import LIFTED
from service.runs import FINAL, StepKind
from service.tallies import Tallies
from service.tick import Claim, Ticker
from service.workspaces import Agents, ScriptStep
from tests.simulator.audit import Breach, Broken
from tests.simulator.database import MemoryDatabase, PlannedFault, switch

START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
LEASE_S, SWEEP_S = 2.0, 1.0
WORKSPACE = uuid.UUID(int=1)
NO_METADATA = msgspec.Raw(b"{}")
HOUR_MS = 3_600_000.0

M, O, T = StepKind.MODEL_CALL, StepKind.OBSERVATION, StepKind.TOOL_CALL  # noqa: E741 - as in a script
SCRIPTS: tuple[tuple[ScriptStep, ...], ...] = (
    (ScriptStep(M), ScriptStep(O)),
    (ScriptStep(M),),
    (ScriptStep(M, latency_ms=300.0), ScriptStep(O), ScriptStep(M, latency_ms=1500.0)),
    (ScriptStep(T, error="out of tea"),),
    (ScriptStep(M), ScriptStep(T, latency_ms=40.0, error="out of milk")),
    (ScriptStep(M, latency_ms=HOUR_MS),),  # hung, for all that a caller can tell
)

Task: TypeAlias = Coroutine[Any, Any, Any]


class Faults(NamedTuple):
    """How often something goes wrong, each a share of the occasions."""

    kill: float = 0.02  # a coroutine is never woken again
    outage: float = 0.01  # before a transaction, or after its commit
    lose_ring: float = 0.3
    double_ring: float = 0.1
    poison: float = 0.04  # a run's steps cannot be written


NONE = Faults(0.0, 0.0, 0.0, 0.0, 0.0)


class _Ticker(Ticker):
    """The ticker, which here fails only as planned."""

    async def postpone(self, claim: Claim, fault: Exception) -> None:
        if not isinstance(fault, PlannedFault):
            raise Breach(f"run {claim.run_id} could not be advanced: {fault!r}") from fault
        await super().postpone(claim, fault)


class _Announcer:
    """Rings and publishes, or loses it."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def announce(
        self, events: Sequence[NewEvent], created_at: dt.datetime, *, due: bool, tallies: Tallies | None = None
    ) -> None:
        await switch()
        for event in events:
            self._world.database.audit.published(event)
        if due:
            self._world.ring()


class _Worker:
    """A worker process: asleep until a bell or the sweep wakes it, then in the middle of one turn."""

    def __init__(self) -> None:
        self.task: Task | None = None
        self.belled = True
        self.looks_at = START


class World:
    """Everything there is, and what happens next."""

    def __init__(self, seed: int, faults: Faults = Faults(), workers: int = 3) -> None:  # noqa: B008 - immutable
        self.rng = random.Random(seed)  # noqa: S311 - a simulation
        self.faults = faults
        self.now = START
        self.steps = 0
        self.database = MemoryDatabase(lambda: self.now, lambda: self.chance(self.faults.outage))
        announcer: Any = _Announcer(self)
        database: Any = self.database
        agents = Agents()
        for number, script in enumerate(SCRIPTS):
            agents._known[uuid.UUID(int=number)] = WORKSPACE, script
            self.database.audit.scripts[uuid.UUID(int=number)] = script
        self.ticker = _Ticker(database, announcer, agents, Tallies(), LEASE_S)
        self.commits = Commits(database, announcer)
        self.announcer = announcer
        self.workers = [_Worker() for _ in range(workers)]
        self.callers: list[Task] = []
        self._late_rings: list[dt.datetime] = []
        self._ids = itertools.count(1000)

    def chance(self, share: float) -> bool:
        return share > 0 and self.rng.random() < share

    # ---- what callers do ---------------------------------------------------------------------------------------------

    def create(self, script: int, expected_subruns: int = 0, max_wait_s: float = 60.0) -> None:
        write = Create(WORKSPACE, uuid.UUID(int=script), "", "", NO_METADATA, expected_subruns, max_wait_s, LIFTED)
        self.callers.append(self._submit(write))

    def spawn(self, parent: uuid.UUID, script: int, group_id: str | None, options: GroupOptions) -> None:
        write = Spawn(parent, WORKSPACE, uuid.UUID(int=script), "", NO_METADATA, group_id, LIFTED, options)
        self.callers.append(self._submit(write))

    def family(self, script: int, children: Sequence[int], options: GroupOptions, *, announced: bool) -> None:
        """Ask for a run, and then for its children one by one, all in one group."""
        self.callers.append(self._family(script, children, options, announced))

    async def _family(self, script: int, children: Sequence[int], options: GroupOptions, announced: bool) -> None:
        expected = len(children) if announced else 0
        parent = await self._submit(
            Create(WORKSPACE, uuid.UUID(int=script), "", "", NO_METADATA, expected, 60.0, LIFTED)
        )
        for child in children:
            await self._submit(Spawn(parent, WORKSPACE, uuid.UUID(int=child), "", NO_METADATA, "f", LIFTED, options))

    def control(self, verb: str, run_id: uuid.UUID) -> None:
        self.callers.append(self._control(verb, run_id))

    async def _submit(self, write: Create | Spawn) -> uuid.UUID:
        (answer,) = await self.commits._commit([write])
        if isinstance(answer, Exception):
            raise answer
        if self.chance(self.faults.poison):
            self.database.poisoned.add(answer.run_id)
        return answer.run_id

    async def _control(self, verb: str, run_id: uuid.UUID) -> None:
        control = {"cancel": cancel_run, "pause": pause_run, "resume": resume_run}[verb]
        async with self.database.begin() as connection:
            written = await control(connection, run_id, None)  # type: ignore[arg-type]
        await self.announcer.announce(written.events, written.created_at, due=written.due)

    # ---- what workers do ---------------------------------------------------------------------------------------------

    async def _turn(self, worker: _Worker) -> None:
        worker.belled = False
        claims = await self.ticker.claim(self.rng.choice((1, 2, 5, 128)))
        worker.looks_at = self.now + dt.timedelta(seconds=SWEEP_S)
        if claims:
            worker.looks_at = self.now
            outcomes = await self.ticker.outcomes(claims)
            await switch()
            await self.ticker.settle(claims, outcomes, ring=self.chance(0.5))

    def ring(self) -> None:
        """Wake a worker: or nobody, or two, or one later than others that were rung after it."""
        if self.chance(self.faults.lose_ring):
            return
        for _ in range(2 if self.chance(self.faults.double_ring) else 1):
            if self.chance(self.faults.lose_ring):
                self._late_rings.append(self.now + dt.timedelta(seconds=self.rng.random() * 3))
            else:
                self.rng.choice(self.workers).belled = True

    # ---- who goes on -------------------------------------------------------------------------------------------------

    def go_on(self, task: Task) -> bool:
        """Let a coroutine go on to its next point, or kill it there; False when it is over."""
        self.steps += 1
        if self.chance(self.faults.kill):
            task.close()
            return False
        names = vars(commits)
        before, names["new_id"] = names["new_id"], self._new_id  # so that a seed says everything
        try:
            task.send(None)
        except StopIteration:
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
            names["new_id"] = before
        return True

    def _new_id(self) -> uuid.UUID:
        return uuid.UUID(int=next(self._ids))

    def let_caller(self, index: int) -> None:
        task = self.callers[index]
        if not self.go_on(task):
            self.callers.remove(task)

    def let_worker(self, worker: _Worker) -> None:
        if worker.task is None:
            if not worker.belled and self.now < worker.looks_at:
                return
            worker.task = self._turn(worker)
        if not self.go_on(worker.task):
            worker.task = None

    def pass_time(self, seconds: float) -> None:
        self.now += dt.timedelta(seconds=seconds)
        for at in [at for at in self._late_rings if at <= self.now]:
            self._late_rings.remove(at)
            self.rng.choice(self.workers).belled = True

    def close(self) -> None:
        """Kill whoever is in the middle of something."""
        for task in (*self.callers, *(worker.task for worker in self.workers)):
            if task is not None:
                task.close()

    # ---- a whole episode ---------------------------------------------------------------------------------------------

    def live(self) -> list[uuid.UUID]:
        return [run.run_id for run in self.database.runs.values() if run.status not in FINAL]

    def anything(self) -> None:
        """Let something happen."""
        what = self.rng.random()
        if what < 0.10:
            self._somebody_asks()
        elif what < 0.16:
            self.pass_time(self.rng.choice((0.001, 0.01, 0.05, 0.3, 1.0, 2.5)))
        elif self.callers and what < 0.35:
            self.let_caller(self.rng.randrange(len(self.callers)))
        else:
            self.let_worker(self.rng.choice(self.workers))

    def _somebody_asks(self) -> None:
        rng, live = self.rng, self.live()
        what = rng.random()
        if len(live) < 20 and (not live or what < 0.25):
            children = rng.choices(range(len(SCRIPTS)), k=rng.randint(1, 4))
            self.family(rng.choice((0, 2, 2, 5)), children, self._options(), announced=self.chance(0.7))
        elif len(live) < 20 and what < 0.40:
            self.create(rng.choice((0, 0, 1, 2, 2, 4, 5)), rng.choice((0, 0, 0, 1, 2, 3)), rng.choice((1.0, 60.0)))
        elif what < 0.75:
            self.spawn(
                rng.choice(live), rng.randrange(len(SCRIPTS)), rng.choice((None, "a", "a", "b")), self._options()
            )
        elif what < 0.80:
            self.control("cancel", rng.choice(live))
        elif what < 0.90:
            self.control("pause", rng.choice(live))
        else:
            paused = [run_id for run_id in live if self.database.runs[run_id].status == "PAUSED"]
            self.control("resume", rng.choice(paused or live))

    def _options(self) -> GroupOptions:
        rng = self.rng
        if rng.random() < 0.3:
            return GroupOptions()
        policy = rng.choice([None, *JoinPolicy])
        quorum = rng.randint(1, 3) if policy is JoinPolicy.QUORUM else None
        timed = policy is JoinPolicy.TIMEOUT or rng.random() < 0.1
        return GroupOptions(
            policy, rng.choice([None, *FailurePolicy]), quorum, rng.choice((0.2, 3.0)) if timed else None
        )

    def end(self) -> None:
        """Let the faults be over and everything come to its end; raises Broken when something does not."""
        self.faults, calm_since = NONE, self.now
        while self.callers:
            self.let_caller(0)
        for run in list(self.database.runs.values()):
            if run.status == "PAUSED":
                self.control("resume", run.run_id)
        while self.callers:
            self.let_caller(0)
        for _ in range(400):
            self._settle_all_due()
            if not self.live():
                return
            self._require_timely(calm_since)
            due = [run.next_tick_at for run in self.database.runs.values() if run.next_tick_at is not None]
            if not due:
                break
            self.now = max(self.now, min(due))
        stuck = [self.database.runs[run_id] for run_id in self.live()]
        raise Broken(f"does not end: {stuck}")

    def _settle_all_due(self) -> None:
        """Let the workers work until nothing is due at this instant."""
        for round_ in itertools.count():
            for worker in self.workers:
                worker.belled = True
                self.let_worker(worker)
                while worker.task is not None:
                    self.let_worker(worker)
            if not any(
                run.next_tick_at is not None and run.next_tick_at <= self.now for run in self.database.runs.values()
            ):
                return
            if round_ > 200:
                raise Broken("there is no end to what is due")

    def _require_timely(self, calm_since: dt.datetime) -> None:
        """Require that no group of a run whose turns can be written is undecided long after its time.

        The last killed worker's lease must end first.
        """
        allowed = dt.timedelta(seconds=LEASE_S + SWEEP_S)
        for run in self.database.runs.values():
            if run.status in (*FINAL, "PAUSED") or run.vain_attempts:
                continue
            for group in run.groups.values():
                if group.state != "WAITING" or group.deadline_at is None:
                    continue
                if max(group.deadline_at, calm_since) + allowed < self.now:
                    raise Broken(f"run {run.run_id} slept past the deadline of {group}")


def simulate(seed: int, steps: int, episode: int = 400) -> int:
    """Live through episodes until so many steps were taken; returns how many. Raises Broken naming the seed."""
    taken = 0
    for number in itertools.count():
        if taken >= steps:
            return taken
        world = World(seed + number)
        try:
            for _ in range(episode):
                world.anything()
            world.end()
        except Broken as broken:
            raise Broken(f"seed {seed + number}: {broken}") from broken
        finally:
            world.close()
        taken += world.steps
    raise AssertionError
