"""The join rule, case by case."""

from __future__ import annotations

import datetime as dt

import pytest

from service.joins import DEFAULT_POLICY, Children, Decision, decide, why_failed

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
LATER, EARLIER = NOW + dt.timedelta(seconds=1), NOW - dt.timedelta(seconds=1)


@pytest.mark.parametrize(
    ("children", "wait_until", "decision"),
    [
        pytest.param(Children(0, 0, 0, 0), None, Decision.RESUME, id="a run without children waits for nothing"),
        pytest.param(Children(0, 2, 0, 0), None, Decision.RESUME, id="all children have completed"),
        pytest.param(Children(0, 2, 1, 0), None, Decision.WAIT, id="a child that nobody expected is waited for too"),
        pytest.param(Children(2, 1, 0, 0), LATER, Decision.WAIT, id="one expected child was not spawned yet"),
        pytest.param(Children(2, 2, 1, 0), LATER, Decision.WAIT, id="one expected child is pending"),
        pytest.param(Children(2, 2, 0, 0), LATER, Decision.RESUME, id="all expected children have completed"),
        pytest.param(Children(2, 3, 0, 0), LATER, Decision.RESUME, id="more children than expected have completed"),
        pytest.param(Children(2, 1, 0, 0), NOW, Decision.FAIL, id="the wait ends at its very instant"),
        pytest.param(Children(2, 2, 1, 0), EARLIER, Decision.FAIL, id="the wait ended with a child pending"),
        pytest.param(
            Children(2, 2, 0, 0), EARLIER, Decision.RESUME, id="a complete join outweighs the end of the wait"
        ),
        pytest.param(Children(2, 2, 1, 1), LATER, Decision.FAIL, id="a child failed while another is pending"),
        pytest.param(Children(1, 1, 0, 1), LATER, Decision.FAIL, id="a failure outweighs a complete join"),
        pytest.param(Children(0, 1, 0, 1), None, Decision.FAIL, id="an unexpected child failed"),
    ],
)
def test_a_run_waits_resumes_or_fails(children: Children, wait_until: dt.datetime | None, decision: Decision) -> None:
    assert decide(children, DEFAULT_POLICY, wait_until, NOW) is decision


def test_a_failed_child_is_named_with_its_policy() -> None:
    assert (
        why_failed(Children(3, 3, 1, 1), DEFAULT_POLICY, 60.0) == "1 of 3 subruns ended FAILED or CANCELED (FAIL_FAST)"
    )


def test_the_end_of_a_wait_says_what_was_waited_for() -> None:
    assert (
        why_failed(Children(3, 2, 1, 0), DEFAULT_POLICY, 1.5)
        == "waited 1.5 s for 2 of 3 expected subruns: 1 never spawned, 1 unfinished"
    )
