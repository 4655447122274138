"""The same world, with Hypothesis as its fate: it looks for a short story that breaks a promise, and shrinks it."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from service.changes import GroupOptions
from tests.groupoptions import group_options
from tests.simulator.breach import Broken
from tests.simulator.mutants import MUTANTS, mutated
from tests.simulator.outsiders import APPROVERS
from tests.simulator.stage import NONE
from tests.simulator.world import CHILDREN, World

scripts = st.sampled_from(CHILDREN)
options = group_options([0.2, 3.0])


STORIES = settings(max_examples=60, stateful_step_count=40, deadline=None)


class Orchestra(RuleBasedStateMachine):
    """Callers, workers and faults, each move chosen by Hypothesis; a run is named by its place among the live ones."""

    @initialize(seed=st.integers(0, 3))
    def begin(self, seed: int) -> None:
        self.world = World(seed, NONE, workers=2)

    @rule(script=scripts, children=st.lists(scripts, max_size=3), options=options, announced=st.booleans())
    def family(self, script: int, children: list[int], options: GroupOptions, announced: bool) -> None:
        self.world.family(script, children, options, announced=announced)

    @rule(place=st.integers(0, 7), script=scripts, group=st.sampled_from([None, "f", "g"]), options=options)
    def spawn(self, place: int, script: int, group: str | None, options: GroupOptions) -> None:
        self._with_run(place, lambda run_id: self.world.spawn(run_id, script, group, options))

    @rule(place=st.integers(0, 7), verb=st.sampled_from(["cancel", "pause", "resume"]))
    def control(self, place: int, verb: str) -> None:
        self._with_run(place, lambda run_id: self.world.control(verb, run_id))

    @rule(place=st.integers(0, 3), times=st.integers(1, 4))
    def caller_goes_on(self, place: int, times: int) -> None:
        for _ in range(times):
            if self.world.callers:
                self.world.let_caller(place % len(self.world.callers))

    @rule(number=st.integers(0, 1), times=st.integers(1, 12))
    def worker_goes_on(self, number: int, times: int) -> None:
        for _ in range(times):
            self.world.let_worker(self.world.workers[number])

    @rule(number=st.integers(0, 1))
    def worker_is_killed(self, number: int) -> None:
        self.world.kill(self.world.workers[number])

    @rule(place=st.integers(0, 3))
    def caller_is_killed(self, place: int) -> None:
        if self.world.callers:
            self.world.callers.pop(place % len(self.world.callers)).close()

    @rule(number=st.integers(0, 1))
    def worker_is_out_of_patience(self, number: int) -> None:
        self.world.interrupt(self.world.workers[number])

    @rule(place=st.integers(0, 3), approver=st.integers(0, len(APPROVERS) - 1), approve=st.booleans())
    def somebody_decides(self, place: int, approver: int, approve: bool) -> None:
        calls = list(self.world.database.calls)
        if calls:
            self.world.decide(calls[-1 - place % len(calls)], approver, approve=approve)

    @rule(seconds=st.sampled_from([0.001, 0.25, 1.0, 2.5, 3600.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule(number=st.integers(0, 1))
    def bell(self, number: int) -> None:
        self.world.workers[number].belled = True

    @rule(place=st.integers(0, 7))
    def run_is_poisoned(self, place: int) -> None:
        self._with_run(place, self.world.database.poisoned.add)

    @invariant()
    def nothing_final_is_due(self) -> None:
        world = getattr(self, "world", None)
        if world is not None:
            assert all(run.next_tick_at is None for run in world.database.runs.values() if run.ended_at is not None)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            try:
                self.world.end()
            finally:
                self.world.close()

    def _with_run(self, place: int, do: Callable[[uuid.UUID], None]) -> None:
        live = self.world.live()
        if live:
            do(live[place % len(live)])


@pytest.mark.usefixtures("silent")
def test_no_story_breaks_a_promise() -> None:
    run_state_machine_as_test(Orchestra, settings=STORIES)


@pytest.mark.usefixtures("silent")
def test_a_story_is_found_that_breaks_a_promise_when_there_is_one() -> None:
    (mutant,) = (each for each in MUTANTS if each.bug == "nobody makes the run due for its next step")
    once = settings(STORIES, database=None, derandomize=True, max_examples=300, phases=[Phase.generate])
    with mutated(mutant), pytest.raises(Broken, match="nobody to wake it"):
        run_state_machine_as_test(Orchestra, settings=once)
