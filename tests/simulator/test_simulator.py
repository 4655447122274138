"""The engine keeps its promises in a hundred thousand steps of a world where everything goes wrong."""

from __future__ import annotations

import datetime as dt
import uuid

import pytest

from service.changes import GroupOptions
from service.joins import FailurePolicy, JoinPolicy
from service.outside import INTERRUPTED
from service.toolcalls import UNKNOWN_END
from tests.simulator.calls import MOST_PENDING
from tests.simulator.outsiders import MODEL
from tests.simulator.stage import NONE, SWEEP_S
from tests.simulator.world import World, simulate

HUNG = 5
"""The script whose step takes an hour."""


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("seed", [1, 10_001, 20_001, 30_001])
def test_every_promise_holds_whatever_goes_wrong(seed: int) -> None:
    assert simulate(seed, 26_000).steps >= 26_000


@pytest.mark.usefixtures("silent")
def test_a_seed_says_everything() -> None:
    def lived() -> list[str]:
        world = World(7)
        for _ in range(400):
            world.anything()
        world.end()
        return [str(run) for run in world.database.runs.values()]

    first = lived()
    assert (first == lived(), len(first) > 10) == (True, True)


@pytest.mark.usefixtures("silent")
def test_the_world_shows_the_engine_all_that_it_should() -> None:
    """A simulation that never pauses in a join, never gives up and never ends a sibling would prove little."""
    seen: set[str] = set()
    for seed in range(80):
        world = World(seed)
        for _ in range(400):
            world.anything()
        world.end()
        for run in world.database.runs.values():
            seen |= {run.status, f"depth {run.depth}", *(run.error_summary or "").split(": ")[:1]}
            seen |= {f"{group.join_policy} {group.state}" for group in run.groups.values()}
            seen |= {f"attempts {run.ticks < run.epoch}"}
        seen |= {f"paused from {h.paused_from}" for h in world.database.audit._histories.values()}
        for call in world.database.calls.values():
            seen |= {f"call {call.status}", f"call's error {call.error}"}
            seen |= {"model answered"} if call.model_call_id is not None else set()
        seen |= {*world.seen, f"pending {world.database.audit.calls.most_pending}"}

    assert seen >= {
        *("COMPLETED", "FAILED", "CANCELED", "depth 0", "depth 1", "depth 2", "out of tea", "attempts True"),
        *(f"{policy} {state}" for policy in JoinPolicy for state in ("JOINED", "FAILED")),
        *(f"paused from {status}" for status in ("PENDING", "RUNNING", "WAITING_FOR_SUBRUN")),
        "its group was joined without it",
        "the run that spawned it completed without it",
        *(f"call {status}" for status in ("COMPLETED", "FAILED", "REJECTED", "CANCELED")),
        *(f"call's error {error}" for error in (UNKNOWN_END, INTERRUPTED, "timed out after 4 s", "failed as asked")),
        *(
            f"pending {MOST_PENDING}",
            "max_tool_calls",
            "max_steps",
            "paused from WAITING_FOR_APPROVAL",
            "model answered",
        ),
        "decided while paused",
    }
    assert any(each.startswith("could not be advanced in 8 attempts") for each in seen)


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("failure", FailurePolicy)
@pytest.mark.parametrize("children", [1, 2, 4])
def test_a_timeout_fires_within_a_second_with_every_child_hung_and_every_ring_lost(
    failure: FailurePolicy, children: int
) -> None:
    world = World(children, NONE._replace(lose_ring=1.0), workers=1)
    options = GroupOptions(JoinPolicy.TIMEOUT, failure, timeout_seconds=3.3)
    world.family(1, [HUNG] * children, options, announced=True)
    while world.callers:
        world.let_caller(0)
    parent = world.database.runs[uuid.UUID(int=1000)]

    for _ in range(2000):
        world.let_worker(world.workers[0])
        if world.workers[0].task is None:
            world.pass_time(0.01)

    (group,) = parent.groups.values()
    assert group.deadline_at is not None
    assert parent.ended_at is not None
    assert dt.timedelta() <= parent.ended_at - group.deadline_at <= dt.timedelta(seconds=SWEEP_S)
    assert (parent.status, group.state, group.failed) == ("COMPLETED", "JOINED", children)


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("agent", [6, MODEL], ids=["a tool runs", "a model thinks"])
@pytest.mark.parametrize("timeout_s", [0.2, 1.7])
def test_a_timeout_fires_within_a_second_while_its_parent_waits_outside(agent: int, timeout_s: float) -> None:
    world = World(1, NONE, workers=2, takes_s=[3600.0])
    world.create(agent)
    _let_callers(world)
    (parent,) = world.database.runs.values()
    _live_through(world, 0.5)
    assert sum(len(worker.beside) for worker in world.workers) == 2  # it waits outside, and its lease is renewed
    world.spawn(parent.run_id, HUNG, "g", GroupOptions(JoinPolicy.TIMEOUT, timeout_seconds=timeout_s))
    _let_callers(world)
    _live_through(world, timeout_s + 1.0)
    world.close()

    group = parent.groups["g"]
    assert group.deadline_at is not None
    assert group.decided_at is not None
    assert dt.timedelta() <= group.decided_at - group.deadline_at <= dt.timedelta(seconds=1)


def _let_callers(world: World) -> None:
    """Let every caller be answered."""
    while world.callers:
        world.let_caller(0)


def _live_through(world: World, seconds: float) -> None:
    """Let the workers work for some time."""
    until = world.now + dt.timedelta(seconds=seconds)
    while world.now < until:
        for worker in world.workers:
            while worker.task is not None or worker.belled or worker.awake(world.now) or world.now >= worker.looks_at:
                world.let_worker(worker)
        world.pass_time(0.01)


@pytest.mark.usefixtures("silent")
def test_without_faults_nothing_is_tried_in_vain() -> None:
    for seed in range(20):
        world = World(seed, NONE._replace(lose_ring=0.3, double_ring=0.1))
        for _ in range(300):
            world.anything()
        world.end()
        assert all(run.vain_attempts == 0 for run in world.database.runs.values())
