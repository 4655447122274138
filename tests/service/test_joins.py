"""The join rules: the page's table against the code, every order of ending against an independent oracle."""

from __future__ import annotations

import datetime as dt
import itertools
import re
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.advance import advance
from service.changes import child_ended
from service.joins import (
    Decision,
    FailurePolicy,
    Group,
    GroupState,
    JoinPolicy,
    decide,
    judge,
    why_failed,
    why_waited_in_vain,
)
from service.pen import RunRow
from service.runs import RunStatus
from service.workspaces import DEFAULT_SCRIPT
from tests.runrows import NOW, at, group, row, running, waiting

PAGE = Path(__file__).resolve().parents[2] / "docs/joins.md"
LATER, EARLIER = NOW + dt.timedelta(seconds=1), NOW - dt.timedelta(seconds=1)

W, J, F = GroupState.WAITING, GroupState.JOINED, GroupState.FAILED


@pytest.mark.parametrize(
    ("states", "missing", "wait_until", "decision"),
    [
        pytest.param([], 0, None, Decision.RESUME, id="a run without children waits for nothing"),
        pytest.param([J, J], 0, None, Decision.RESUME, id="all groups are joined"),
        pytest.param([J, W], 0, None, Decision.WAIT, id="one group is undecided"),
        pytest.param([J], 1, LATER, Decision.WAIT, id="an announced child was not spawned yet"),
        pytest.param([J], 1, NOW, Decision.FAIL, id="the wait ends at its very instant"),
        pytest.param([W], 0, EARLIER, Decision.FAIL, id="the wait ended with a group undecided"),
        pytest.param([J], 0, EARLIER, Decision.RESUME, id="a complete join outweighs the end of the wait"),
        pytest.param([W, F], 0, LATER, Decision.FAIL, id="a group failed while another is undecided"),
        pytest.param([J, F], 0, None, Decision.FAIL, id="a failure outweighs a join"),
    ],
)
def test_a_run_waits_resumes_or_fails(
    states: list[GroupState], missing: int, wait_until: dt.datetime | None, decision: Decision
) -> None:
    assert decide(states, missing, wait_until, NOW) is decision


@pytest.mark.parametrize(
    ("failed", "why"),
    [
        (
            group(spawned=3, pending=1, failed=1),
            "group group: 1 of 3 subruns ended FAILED or CANCELED (WAIT_ALL, FAIL_FAST)",
        ),
        (
            group(join_policy="QUORUM", failure_policy="CANCEL_SIBLINGS", quorum=2, spawned=3, pending=1, failed=2),
            "group group: QUORUM of 2 was out of reach of 3 subruns: 0 completed, 1 pending",
        ),
        (
            group(timeout_seconds=1.5, deadline_at=at(1.5), decided_at=at(1.5), spawned=2, pending=1),
            "group group: waited 1.5 s for WAIT_ALL of 2 subruns: 1 completed, 1 pending",
        ),
    ],
)
def test_a_failed_group_says_why(failed: Group, why: str) -> None:
    assert why_failed(failed) == why


def test_the_end_of_a_wait_says_what_was_waited_for() -> None:
    assert why_waited_in_vain(3, 2, 1, 1.5) == "waited 1.5 s for 2 of 3 expected subruns: 1 never spawned, 1 unfinished"


def described_rules() -> list[list[str]]:
    """Return the lines of the page's table of decisions, as cells without code marks."""
    section = PAGE.read_text(encoding="utf-8").partition("## When a group is decided\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def holds(condition: str, names: dict[str, int]) -> bool:
    """Evaluate a condition of the page: sums of counters compared with one value."""
    if condition == "never":
        return False
    terms, operator, bound = re.fullmatch(r"([\w +]+) (>|>=|==|<) (\w+)", condition).groups()  # type: ignore[union-attr]
    left = sum(names[term] for term in terms.split(" + "))
    right = int(bound) if bound.isdigit() else names[bound]
    return {">": left > right, ">=": left >= right, "==": left == right, "<": left < right}[operator]


def described_state(rule: list[str], names: dict[str, int], late: bool) -> str:
    """Return what the page says of a group."""
    _, _, failed, joined, out_of_reach, at_deadline = rule
    for condition, state in ((failed, "FAILED"), (joined, "JOINED"), (out_of_reach, "FAILED")):
        if holds(condition, names):
            return state
    return at_deadline if late else "WAITING"


def test_the_page_has_a_line_for_every_pair_of_policies() -> None:
    assert [tuple(rule[:2]) for rule in described_rules()] == list(itertools.product(JoinPolicy, FailurePolicy))


@pytest.mark.parametrize("rule", described_rules(), ids=lambda rule: " ".join(rule[:2]))
def test_the_code_decides_as_the_page_says(rule: list[str]) -> None:
    for spawned, pending, failed, more, quorum in itertools.product(
        range(1, 5), range(5), range(5), range(3), range(1, 5)
    ):
        if pending + failed > spawned:
            continue
        for late in (False, True):
            judged = group(
                join_policy=rule[0],
                failure_policy=rule[1],
                quorum=quorum if rule[0] == "QUORUM" else None,
                timeout_seconds=1.0,
                deadline_at=NOW if late else LATER,
                spawned=spawned,
                pending=pending,
                failed=failed,
            )
            completed = spawned - pending - failed
            names = {"pending": pending, "completed": completed, "failed": failed, "more": more, "quorum": quorum}
            assert judge(judged, more, NOW) == described_state(rule, names, late), judged


# ---- the oracle ------------------------------------------------------------------------------------------------------
#
# It knows nothing of counters. A history is the sequence of endings so far, with the end of the time ("late") among
# them. A group is joined once its history contains a moment at which the goal was reached, and failed once no future
# history, of all that the children left could still write, contains one.

ENDS = {"completed": RunStatus.COMPLETED, "failed": RunStatus.FAILED, "canceled": RunStatus.CANCELED}


def wins(history: Sequence[str], size: int, policy: JoinPolicy, failure: FailurePolicy, quorum: int) -> bool:
    """Tell whether the goal was reached at some moment of a history of `size` children, and in time."""
    for length in range(len(history) + 1):
        past = history[:length]
        ended = [end for end in past if end != "late"]
        good = [end for end in ended if end == "completed" or failure is FailurePolicy.IGNORE_FAILURE]
        spoiled = len(good) < len(ended)
        if spoiled and failure is FailurePolicy.FAIL_FAST:
            return False
        if policy in (JoinPolicy.WAIT_ANY, JoinPolicy.QUORUM):
            reached = len(good) >= (1 if policy is JoinPolicy.WAIT_ANY else quorum)
        else:
            reached = len(good) == size
        if reached or (policy is JoinPolicy.TIMEOUT and "late" in past and not spoiled):
            return True
        if "late" in past:
            return False
    return False


def futures(history: Sequence[str], size: int) -> Iterator[list[str]]:
    """Yield every way in which the children left may end, with the end of the time after them unless it is past."""
    left = size - sum(end != "late" for end in history)
    for ends in itertools.product(("completed", "failed"), repeat=left):
        yield [*history, *ends, *([] if "late" in history else ["late"])]


def foretell(history: Sequence[str], size: int, policy: JoinPolicy, failure: FailurePolicy, quorum: int) -> GroupState:
    """Return the state of a group after a history."""
    if wins(history, size, policy, failure, quorum):
        return GroupState.JOINED
    if any(wins(future, size, policy, failure, quorum) for future in futures(history, size)):
        return GroupState.WAITING
    return GroupState.FAILED


def goals(size: int) -> list[tuple[JoinPolicy, int]]:
    """Return every join policy with its quorum; one quorum is more than there are children."""
    quorums = [(JoinPolicy.QUORUM, quorum) for quorum in range(1, size + 2)]
    return [(JoinPolicy.WAIT_ALL, 0), (JoinPolicy.WAIT_ANY, 0), *quorums, (JoinPolicy.TIMEOUT, 0)]


def parent_at_join(size: int, policy: JoinPolicy, failure: FailurePolicy, quorum: int, timeout: bool) -> RunRow:
    """Return a run that has just executed its last step, with `size` pending children in one group."""
    own = group(
        join_policy=policy,
        failure_policy=failure,
        quorum=quorum or None,
        timeout_seconds=10.0 if timeout else None,
        deadline_at=at(10) if timeout else None,
        spawned=size,
        pending=size,
    )
    return advance(running(own, expected_subruns=size), DEFAULT_SCRIPT, at(1)).run


def ended(number: int, end: str) -> RunRow:
    """Return a child of the group that has ended."""
    return row(
        run_id=uuid.UUID(int=100 + number), parent_run_id=row().run_id, depth=1, status=ENDS[end], group_id="group"
    )


def settle(parent: RunRow, now: dt.datetime) -> tuple[RunRow, int]:
    """Do the turn of a parent that is due, with its children cancelled as far as it asks; returns how many were."""
    first = advance(parent, DEFAULT_SCRIPT, now)
    if not first.doomed:
        return first.run, 0
    orphans = [ended(50 + number, "canceled") for number in range(parent.groups["group"].pending)]
    second = advance(parent, DEFAULT_SCRIPT, now, orphans)
    assert (second.doomed, second.run.status) == (frozenset(), first.run.status)
    return second.run, len(orphans)


def require_foretold(parent: RunRow, history: Sequence[str], state: GroupState, now: dt.datetime) -> None:
    """Compare a waiting parent, and what its next turn makes of it, with what was foretold."""
    left = parent.groups["group"].pending
    due = parent.next_tick_at is not None and parent.next_tick_at <= now
    assert due == (state is not GroupState.WAITING), history
    after, cancelled = settle(parent, now) if due else (parent, 0)
    status, gone = {
        GroupState.JOINED: (RunStatus.COMPLETED, left),
        GroupState.FAILED: (RunStatus.FAILED, left),
        GroupState.WAITING: (RunStatus.WAITING_FOR_SUBRUN, 0),
    }[state]
    assert (after.status, cancelled, after.pending_subruns) == (status, gone, left - gone), history


@pytest.mark.parametrize("failure", FailurePolicy)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_order_of_every_ending_is_joined_as_foretold(size: int, failure: FailurePolicy) -> None:
    checked = 0
    for policy, quorum in goals(size):

        def follow(parent: RunRow, history: list[str], left: frozenset[int], policy: JoinPolicy, quorum: int) -> int:
            state = foretell(history, size, policy, failure, quorum)
            if history:
                assert parent.groups["group"].state == state, (policy, quorum, history)
            require_foretold(parent, history, state, at(2))
            seen = 1
            for number, end in itertools.product(sorted(left), ENDS):
                result = child_ended(parent, ended(number, end), at(2))
                assert len(result.events) == 1
                seen += follow(result.run, [*history, end], left - {number}, policy, quorum)
            return seen

        parent = parent_at_join(size, policy, failure, quorum, timeout=False)
        if parent.is_final:
            assert (parent.status, foretell([], size, policy, failure, quorum)) == ("FAILED", GroupState.FAILED)
            continue
        checked += follow(parent, [], frozenset(range(size)), policy, quorum)
    assert checked > len(goals(size))


@pytest.mark.parametrize("failure", FailurePolicy)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_end_of_the_time_is_joined_as_foretold_wherever_it_falls(size: int, failure: FailurePolicy) -> None:
    for policy, quorum in goals(size):
        start = parent_at_join(size, policy, failure, quorum, timeout=True)
        if start.is_final:
            continue
        for before in range(size + 1):
            for ends in itertools.product(ENDS, repeat=before):
                parent = start
                for number, end in enumerate(ends):
                    parent = child_ended(parent, ended(number, end), at(2)).run
                if foretell(ends, size, policy, failure, quorum) is not GroupState.WAITING:
                    continue
                assert parent.next_tick_at == at(10), "the deadline is when the parent is due"
                state = foretell([*ends, "late"], size, policy, failure, quorum)
                after, _ = settle(parent, at(10))
                expected = RunStatus.COMPLETED if state is GroupState.JOINED else RunStatus.FAILED
                assert (after.status, after.groups["group"].state) == (expected, state), (policy, quorum, ends)


counts = st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6)).filter(lambda each: sum(each) > 0)
policies = st.sampled_from(list(itertools.product(JoinPolicy, FailurePolicy)))


@given(counts, policies, st.integers(1, 6), st.integers(0, 6), st.booleans())
def test_what_is_decided_stays_decided_whatever_ends_later(
    numbers: tuple[int, int, int], pair: tuple[JoinPolicy, FailurePolicy], quorum: int, more: int, late: bool
) -> None:
    pending, _, failed = numbers
    policy, failure = pair
    before = group(
        join_policy=policy,
        failure_policy=failure,
        quorum=quorum if policy is JoinPolicy.QUORUM else None,
        deadline_at=NOW,
        spawned=sum(numbers),
        pending=pending,
        failed=failed,
    )
    state = judge(before, more, NOW if late else EARLIER)
    decided = msgspec.structs.replace(before, state=state)

    for later in range(pending):
        changed = msgspec.structs.replace(decided, pending=pending - later - 1, failed=failed + later + 1)
        assert state is GroupState.WAITING or judge(changed, 0, LATER) is state


@given(counts, policies, st.integers(1, 6))
def test_a_group_that_nobody_can_change_any_more_is_decided(
    numbers: tuple[int, int, int], pair: tuple[JoinPolicy, FailurePolicy], quorum: int
) -> None:
    _, completed, failed = numbers
    policy, failure = pair
    over = group(
        join_policy=policy,
        failure_policy=failure,
        quorum=quorum if policy is JoinPolicy.QUORUM else None,
        spawned=completed + failed,
        pending=0,
        failed=failed,
    )
    assert judge(over, 0, NOW) is not GroupState.WAITING


def test_groups_are_joined_independently() -> None:
    done = group(group_id="done", join_policy="WAIT_ANY", pending=0, state="JOINED", decided_at=NOW)
    parent = waiting(group(), done, expected_subruns=0, wait_until=None, next_tick_at=None)

    joined = child_ended(parent, ended(1, "completed"), at(9))

    assert ({g.group_id: g.state for g in joined.run.groups.values()}, joined.run.next_tick_at) == (
        {"group": "JOINED", "done": "JOINED"},
        at(9),
    )
    assert advance(joined.run, DEFAULT_SCRIPT, at(9)).run.status == RunStatus.COMPLETED
