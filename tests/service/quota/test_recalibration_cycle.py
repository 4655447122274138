"""Which state follows which: by time, by figures, and by what a person does meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from service.quota.limits import Limit
from service.quota.recalibration_cycle import FINAL, Count, Figures, Phase, Plan, Standing, Turn, turn

ALONE = Plan(needs_approval=False, shadow_s=60, canary_s=60, watch_s=60)
ATTENDED = Plan(needs_approval=True, shadow_s=60, canary_s=60, watch_s=60)
MINE, BEFORE = 7, 6
SHADOW = Standing("shadow", BEFORE, BEFORE)
ACTIVE = Standing("active", MINE, BEFORE)
ASKED = Figures(shadow={"run_creation": Count(1_000, 2)})
LOWERED = (Limit.RUN_CREATION,)


def then(phase: Phase, in_phase_s: float = 61, standing: Standing = SHADOW, **more: Any) -> Turn | None:
    """Return what comes next."""
    figures, plan = more.get("figures", ASKED), more.get("plan", ALONE)
    return turn(phase, in_phase_s, MINE, more.get("lowered", LOWERED), standing, plan, figures)


def phase_of(found: Turn | None) -> Phase | None:
    """Return the phase of a turn."""
    return None if found is None else found.phase


def test_without_a_person_it_goes_from_shadow_to_canary_to_all_to_its_end() -> None:
    assert phase_of(then(Phase.SHADOW)) is Phase.CANARY
    assert phase_of(then(Phase.CANARY)) is Phase.WATCHED
    assert phase_of(then(Phase.WATCHED, standing=ACTIVE)) is Phase.KEPT


@pytest.mark.parametrize(
    ("phase", "standing"), [(Phase.SHADOW, SHADOW), (Phase.CANARY, SHADOW), (Phase.WATCHED, ACTIVE)]
)
def test_each_state_lasts_as_long_as_the_plan_says(phase: Phase, standing: Standing) -> None:
    assert then(phase, 59, standing) is None


def test_by_default_a_person_says_yes() -> None:
    assert Plan().needs_approval
    assert then(Phase.SHADOW, plan=ATTENDED) == Turn(Phase.WAITING, "a person activates or rejects it")
    assert then(Phase.WAITING, 86_400) is None
    assert then(Phase.WAITING, 8 * 86_400) == Turn(
        Phase.REFUSED, "nobody decided within 7 days, and the measurement is stale"
    )


@pytest.mark.parametrize("shadow", [{}, {"run_creation": Count(99, 0)}, {"subrun_spawn": Count(9_999, 0)}])
def test_what_nobody_asked_about_is_not_lowered_without_a_person(shadow: dict[str, Count]) -> None:
    found = then(Phase.SHADOW, figures=Figures(shadow=shadow))
    assert found == Turn(
        Phase.WAITING, "run_creation would be lowered, and fewer than 100 requests were asked about it"
    )
    assert phase_of(then(Phase.SHADOW, figures=Figures(shadow=shadow), lowered=())) is Phase.CANARY


def test_a_shadow_that_would_refuse_too_much_ends_it_at_once() -> None:
    assert then(Phase.SHADOW, 1, figures=Figures(shadow={"tick": Count(1_000, 11)})) == Turn(
        Phase.REFUSED, "as shadow, tick would newly refuse 11 of 1,000 requests (1.1%; at most 1%)"
    )
    assert then(Phase.SHADOW, 1, figures=Figures(shadow={"tick": Count(1_000, 10)})) is None
    assert then(Phase.SHADOW, 1, figures=Figures(shadow={"tick": Count(99, 99)})) is None


@pytest.mark.parametrize(
    ("phase", "standing", "end"),
    [(Phase.CANARY, SHADOW, Phase.REFUSED), (Phase.WATCHED, ACTIVE, Phase.ROLLED_BACK)],
)
def test_a_rise_of_refusals_or_of_failed_runs_takes_it_back(phase: Phase, standing: Standing, end: Phase) -> None:
    refusals = Figures(before={"run_creation": Count(10_000, 50)}, during={"run_creation": Count(1_000, 60)})
    found = then(phase, 1, standing, figures=refusals)
    assert found is not None
    assert found.phase is end
    assert "60 of 1,000 requests were refused by run_creation (6.0%; before 50 of 10,000)" in found.reason
    failures = Figures(before={"runs": Count(500, 0)}, during={"runs": Count(500, 40)})
    found = then(phase, 1, standing, figures=failures)
    assert found is not None
    assert (found.phase, "40 of 500 runs failed (8.0%; before 0 of 500)" in found.reason) == (end, True)


@pytest.mark.parametrize(
    ("before", "during"),
    [
        (Count(10_000, 50), Count(99, 99)),  # too few to say
        (Count(10_000, 500), Count(1_000, 50)),  # it was like this
        (Count(10_000, 50), Count(1_000, 15)),  # within the bound
        (Count(10_000, 0), Count(100, 4)),  # within chance
        (Count(10_000, 5_000), Count(1_000, 0)),  # better
    ],
)
def test_what_is_no_rise_is_tolerated(before: Count, during: Count) -> None:
    figures = Figures(before={"run_creation": before}, during={"run_creation": during})
    assert then(Phase.WATCHED, 1, ACTIVE, figures=figures) is None


def test_without_a_time_before_every_refusal_counts() -> None:
    assert phase_of(then(Phase.WATCHED, 1, ACTIVE, figures=Figures(during={"tick": Count(200, 40)}))) is (
        Phase.ROLLED_BACK
    )


@pytest.mark.parametrize(
    ("phase", "standing", "found"),
    [
        (Phase.SHADOW, ACTIVE, Turn(Phase.WATCHED, "activated by hand")),
        (Phase.WAITING, ACTIVE, Turn(Phase.WATCHED, "activated by hand")),
        (Phase.CANARY, ACTIVE, Turn(Phase.WATCHED, "activated by hand")),
        (Phase.SHADOW, Standing("shadow", 5, BEFORE), Turn(Phase.OVERTAKEN, "revision 5 was put in force by hand")),
        (
            Phase.WATCHED,
            Standing("superseded", 6, BEFORE),
            Turn(Phase.OVERTAKEN, "revision 6 was put in force by hand"),
        ),
        (Phase.WAITING, Standing("rejected", BEFORE, BEFORE), Turn(Phase.REFUSED, "rejected by hand")),
        (
            Phase.CANARY,
            Standing("proposed", BEFORE, BEFORE),
            Turn(Phase.OVERTAKEN, "another shadow was put in its place by hand"),
        ),
    ],
)
def test_what_a_person_does_is_followed(phase: Phase, standing: Standing, found: Turn) -> None:
    assert then(phase, 1, standing) == found


@pytest.mark.parametrize("phase", sorted(FINAL | {Phase.MEASURING}))
def test_an_end_stays_and_a_measurement_ends_by_being_handed_in(phase: Phase) -> None:
    assert then(phase, 1e9) is None
