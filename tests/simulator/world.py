"""A world for the engine: what happens next on the stage, all of it in the hands of one seed.

At random somebody asks for something, somebody decides, time passes, or one of those who are in the middle of something
goes on to the next point. When the faults are over, everything must end. Who plays is in `stage`.
"""

from __future__ import annotations

import datetime as dt
import itertools
import uuid
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

from service.changes import GroupOptions
from service.joins import FailurePolicy, JoinPolicy
from service.quota.limits import Rate
from service.runs import FINAL
from tests.simulator.breach import Broken
from tests.simulator.outsiders import APPROVERS, MODEL, PLAIN_SCRIPTS, TOOL_SCRIPTS
from tests.simulator.stage import LEASE_S, NONE, SWEEP_S, Stage

CHILDREN = (*PLAIN_SCRIPTS, *TOOL_SCRIPTS, MODEL)
"""Agents that children may have."""

TICK_RATES = (Rate(Fraction(1, 5), 1), Rate(Fraction(20), 5), Rate(Fraction(1000), 50))
"""What a workspace may be under in every second episode; it changes now and then."""


class World(Stage):
    """A stage on which something happens."""

    def live(self) -> list[uuid.UUID]:
        return [run.run_id for run in self.database.runs.values() if run.status not in FINAL]

    def anything(self) -> None:
        """Let something happen."""
        if self.happens("interrupt"):
            self.interrupt(self.rng.choice(self.workers))
        if self._rates_rng.random() < 0.01:
            self.change_tick_rate()
        what = self.rng.random()
        if what < 0.10:
            self._somebody_asks()
        elif what < 0.16:
            self.pass_time(self.rng.choice((0.001, 0.01, 0.05, 0.3, 1.0, 2.5)))
        elif self.callers and what < 0.50:
            self.let_caller(self.rng.randrange(len(self.callers)))
        else:
            self.let_worker(self.rng.choice(self.workers))

    def _somebody_asks(self) -> None:
        rng, live = self.rng, self.live()
        if self.chance(0.4):
            self._somebody_decides()
            return
        what = rng.random()
        if len(live) < 20 and (not live or what < 0.25):
            children = rng.choices(CHILDREN, k=rng.randint(1, 4))
            self.family(rng.choice((0, 2, 2, 5, 7, 8, MODEL)), children, self._options(), announced=self.chance(0.7))
        elif len(live) < 20 and what < 0.40:
            self.create(
                rng.choice((0, 1, 2, 4, 5, 6, 7, 8, 8, 9, MODEL)),
                rng.choice((0, 0, 0, 1, 2, 3)),
                rng.choice((1.0, 60.0)),
            )
        elif what < 0.75:
            self.spawn(rng.choice(live), rng.choice(CHILDREN), rng.choice((None, "a", "a", "b")), self._options())
        elif what < 0.80:
            self.control("cancel", rng.choice(live))
        elif what < 0.90:
            self.control("pause", rng.choice(live))
        else:
            paused = [run_id for run_id in live if self.database.runs[run_id].status == "PAUSED"]
            self.control("resume", rng.choice(paused or live))

    def pending(self) -> list[uuid.UUID]:
        """Return the tool calls that wait for approval."""
        return [call.tool_call_id for call in self.database.calls.values() if call.status == "PENDING"]

    def _somebody_decides(self) -> None:
        """Let somebody decide, or two people on the same call, or somebody on one that is past that."""
        rng = self.rng
        calls = self.pending() or list(self.database.calls)
        if not calls:
            return
        call_id = rng.choice(calls if rng.random() < 0.9 else list(self.database.calls))
        for _ in range(rng.choice((1, 1, 1, 2))):
            self.decide(call_id, rng.randrange(len(APPROVERS)), approve=rng.random() < 0.7)

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
        for _ in range(5000):
            self._settle_all_due()
            self.require_paid()
            if not self.live():
                return
            self._require_timely(calm_since)
            self.require_called(calm_since)
            for call_id in self.pending():
                self.decide(call_id, len(APPROVERS) - 1, approve=self.chance(0.7))
            while self.callers:
                self.let_caller(0)
            instants = [run.next_tick_at for run in self.database.runs.values() if run.next_tick_at is not None]
            instants += [task.wakes_at for worker in self.workers for task in worker.beside]
            if not instants:
                break
            self.now = max(self.now, min(instants))
        stuck = [self.database.runs[run_id] for run_id in self.live()]
        raise Broken(f"does not end: {stuck}")

    def _settle_all_due(self) -> None:
        """Let the workers work until nothing is due at this instant."""
        for round_ in itertools.count():
            for worker in self.workers:
                worker.belled = True
                self.let_worker(worker)
                while worker.task is not None or worker.awake(self.now):
                    self.let_worker(worker)
            if not any(
                run.next_tick_at is not None and run.next_tick_at <= self.now for run in self.database.runs.values()
            ):
                return
            if round_ > 20:
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


class Lived(NamedTuple):
    """What a simulation came to."""

    steps: int
    episodes: int
    seen: Counter[str]
    """The faults that were made and what became of the runs."""


def simulate(seed: int, steps: int, episode: int = 800) -> Lived:
    """Live through episodes until so many steps were taken. Raises Broken naming the seed."""
    taken, seen = 0, Counter[str]()
    for number in itertools.count():
        if taken >= steps:
            return Lived(taken, number, seen)
        world = World(seed + number, tick_rates=TICK_RATES if number % 2 else ())
        try:
            for _ in range(episode):
                world.anything()
            world.end()
        except Broken as broken:
            found = Broken(f"seed {seed + number}: {broken}")
            found.episode = number + 1
            raise found from broken
        finally:
            world.close()
        taken += world.steps
        seen += world.seen
        seen.update(f"runs {run.status}" for run in world.database.runs.values())
        seen.update(f"tool calls {call.status}" for call in world.database.calls.values())
    raise AssertionError
