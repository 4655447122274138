"""Rules that hold for every life of a run, whatever its children and its callers do."""

from __future__ import annotations

import datetime as dt
import itertools
import uuid
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from service.advance import advance
from service.changes import GroupOptions, cancel, child_ended, pause, resume, spawned
from service.errors import ApiError
from service.events import EventType
from service.joins import GroupState
from service.pen import Advance, RunRow
from service.runs import FINAL, PAUSABLE, TRANSITIONS, RunStatus, StepKind
from service.workspaces import ScriptStep
from tests.groupoptions import group_options
from tests.runrows import (
    NOW,
    child,
    row,
)

steps = st.builds(
    ScriptStep,
    kind=st.sampled_from([kind for kind in StepKind if kind is not StepKind.SUBRUN_SPAWN]),
    latency_ms=st.sampled_from([0.0, 0.5, 700.0]),
    error=st.sampled_from([None] * 9 + ["broken"]),
)
moves = st.lists(
    st.one_of(
        st.sampled_from(["tick", "complete", "fail", "cancel child", "cancel", "pause", "resume", "later"]),
        st.tuples(st.sampled_from(["a", "b"]), group_options([0.1, 5.0])),  # a spawn
    ),
    max_size=30,
)
ENDS = {"complete": RunStatus.COMPLETED, "fail": RunStatus.FAILED, "cancel child": RunStatus.CANCELED}


class Life:
    """One run with its children, driven by moves."""

    def __init__(self, script: list[ScriptStep], expected: int) -> None:
        self.script = script
        self.run = row(expected_subruns=expected)
        self.now = NOW
        self.children: dict[uuid.UUID, str] = {}
        self.events: list[Any] = []
        self.steps: list[Any] = []

    def write(self, result: Advance, ended: list[RunRow] = []) -> None:  # noqa: B006 - never changed
        self.run = result.run
        self.events += result.events
        self.steps += result.steps
        for each in ended:
            del self.children[each.run_id]

    def ended(self, status: RunStatus, *group_ids: str) -> list[RunRow]:
        """Return the pending children, of some groups only, as ended."""
        return [
            msgspec.structs.replace(child(status, group_id), run_id=run_id)
            for run_id, group_id in self.children.items()
            if not group_ids or group_id in group_ids
        ]

    def move(self, move: Any) -> None:
        if isinstance(move, tuple):
            self.spawn(*move)
        elif move == "tick" and self.run.next_tick_at is not None:
            self.now = max(self.now, self.run.next_tick_at)
            self.tick()
        elif move in ENDS and self.children:
            first = self.ended(ENDS[move])[:1]
            self.write(child_ended(self.run, first[0], self.now), first)
        elif move == "cancel":
            orphans = self.ended(RunStatus.CANCELED)
            self.write(cancel(self.run, None, self.now, orphans), orphans)
        elif move == "pause" and self.run.status in PAUSABLE:
            self.write(pause(self.run, None, self.now))
        elif move == "resume" and self.run.status == RunStatus.PAUSED:
            before = self.run.paused_from
            self.write(resume(self.run, None, self.now))
            assert self.run.status == before
        elif move == "later":
            self.now += dt.timedelta(seconds=1)

    def tick(self) -> None:
        first = advance(self.run, self.script, self.now)
        orphans = self.ended(RunStatus.CANCELED, *first.doomed) if first.doomed else []
        again = advance(self.run, self.script, self.now, orphans)
        assert (again.run.status, again.doomed) == (first.run.status, frozenset())
        self.write(again, orphans)

    def spawn(self, group_id: str, wanted: GroupOptions) -> None:
        run_id = uuid.UUID(int=1000 + self.run.spawned_subruns)
        try:
            result = spawned(self.run, run_id, group_id, wanted, self.now)
        except ApiError:
            return
        self.write(result)
        self.children[run_id] = group_id

    def live_on(self) -> None:
        """Let everything that was begun come to its end."""
        self.move("resume")
        for _ in range(60):
            if self.run.is_final:
                return
            self.move("tick" if self.run.next_tick_at is not None else "complete")
            self.check()

    def check(self) -> None:
        """Hold what must hold after every move."""
        run = self.run
        assert run.is_final or run.status == "PAUSED" or run.next_tick_at is not None or self.children, (
            "nobody wakes it"
        )
        assert run.pending_subruns == len(self.children)
        assert (run.next_tick_at is None) or not (run.is_final or run.status == "PAUSED")
        for each in run.groups.values():
            assert each.pending == sum(group_id == each.group_id for group_id in self.children.values())


@given(script=st.lists(steps, min_size=1, max_size=5), expected=st.integers(0, 3), story=moves)
def test_every_life_is_legal_numbered_without_gaps_ends_and_is_never_due_after_its_end(
    script: list[ScriptStep], expected: int, story: list[Any]
) -> None:
    life = Life(script, expected)
    for move in story:
        if life.run.is_final:
            break
        life.move(move)
        life.check()
    life.live_on()

    run = life.run
    assert [event.seq for event in life.events] == list(range(2, run.last_seq + 1))
    statuses = [(e.payload["from"], e.payload["to"]) for e in life.events if e.event_type is EventType.STATE_CHANGED]
    assert all(new in TRANSITIONS[old] for old, new in statuses)
    assert all(new == old for (_, new), (old, _) in itertools.pairwise(statuses))
    executed = [step.kind for step in life.steps if step.kind is not StepKind.SUBRUN_SPAWN]
    assert executed == [step.kind for step in script[: run.script_position]]
    assert [step.step_index for step in life.steps] == list(range(1, run.step_count + 1))
    assert run.status in FINAL
    assert (run.next_tick_at, run.pending_subruns, run.ended_at) == (None, 0, life.now)
    assert (life.events[-1].event_type, life.events[-1].payload["to"]) == (EventType.STATE_CHANGED, run.status)
    if run.status == RunStatus.COMPLETED:
        assert run.script_position == len(script)
        assert run.spawned_subruns >= expected
        assert {each.state for each in run.groups.values()} <= {GroupState.JOINED}
