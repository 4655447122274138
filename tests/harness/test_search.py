"""The order in which levels are tried, and what may be claimed of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.analysis.slo import Status
from harness.search import Bracket, Ladder, burst_ladder, consider, rate_ladder, rate_per_s, together

P, F, OPEN = Status.PASS, Status.FAIL, Status.INCONCLUSIVE


def climb(ladder: Ladder, answers: dict[int, Status], default: Status) -> tuple[list[int], Bracket]:
    """Search with given answers; returns the levels in their order and the result."""
    tried: dict[int, Status] = {}
    while (level := (bracket := consider(ladder, tried)).next_level) is not None:
        assert level not in tried
        tried[level] = answers.get(level, default)
    return list(tried), bracket


def below(limit: int, most: int = 1_000) -> dict[int, Status]:
    return {level: P if level <= limit else F for level in range(1, most + 1)}


@pytest.mark.parametrize(
    ("limit", "levels", "passed", "failed"),
    [
        (100, [8, 16, 32, 64, 128, 80, 96, 112], 96, 112),
        (127, [8, 16, 32, 64, 128, 80, 96, 112], 112, 128),  # the doubled level itself is the lowest that fails
        (64, [8, 16, 32, 64, 128, 80], 64, 80),
        (3, [8, 1, 2, 4], 2, 4),  # not even the first passes: the second climb begins at one
        (7, [8, 1, 2, 4, 6], 6, 8),
        (0, [8, 1], None, 1),
    ],
)
def test_it_doubles_then_climbs_in_equal_steps_to_the_lowest_that_fails(
    limit: int, levels: list[int], passed: int | None, failed: int
) -> None:
    assert climb(burst_ladder(1_000), below(limit), F) == (levels, Bracket(passed, failed, None))


def test_nothing_above_a_level_that_did_not_pass_is_claimed_to_pass() -> None:
    answers = {8: P, 16: P, 32: F, 20: OPEN, 24: P, 28: F}
    assert climb(burst_ladder(1_000), answers, F) == ([8, 16, 32, 20, 24, 28], Bracket(16, 28, None))


def test_a_doubled_level_that_is_open_leaves_the_lowest_failure_to_be_sought_above_it() -> None:
    answers = {8: P, 16: OPEN, 10: P, 12: P, 14: P, 20: OPEN, 24: F}
    assert climb(burst_ladder(1_000), answers, F) == ([8, 16, 10, 12, 14, 20, 24], Bracket(14, 24, None))


def test_a_search_that_proves_nothing_ends_at_the_highest_level_allowed() -> None:
    levels, bracket = climb(burst_ladder(40), {}, OPEN)
    assert levels == [8, 1, 2, 4, 6, 10, 12, 14, 16, 20, 24, 28, 32, 40]
    assert bracket == Bracket(None, None, None)
    assert not bracket.found


@pytest.mark.parametrize("most", [1, 5, 8, 9, 100])
def test_a_service_that_meets_every_burst_allowed_has_no_lowest_failure(most: int) -> None:
    levels, bracket = climb(burst_ladder(most), {}, P)
    assert levels[-1] == most
    assert bracket == Bracket(most, None, None)


@given(st.integers(0, 300), st.integers(1, 256), st.integers(1, 8))
def test_where_levels_never_err_the_limit_lies_in_the_bracket_no_wider_than_a_step(
    limit: int, most: int, steps: int
) -> None:
    ladder = Ladder(1, min(8, most), most, steps)
    levels, bracket = climb(ladder, below(limit), F)
    assert max(levels) <= most
    assert (bracket.highest_pass or 0) <= limit
    if limit >= most:
        assert bracket == Bracket(most, None, None)
    else:
        assert bracket.lowest_fail is not None
        assert bracket.lowest_fail > limit
        widest = max(1, -(-8 // steps), ladder.step_at(max(ladder.first, limit)) + 1)
        assert bracket.lowest_fail - (bracket.highest_pass or 0) <= widest


@given(st.dictionaries(st.integers(1, 200), st.sampled_from([P, F, OPEN])), st.integers(1, 200))
def test_every_search_ends_and_claims_to_pass_only_what_passed_on_the_way_up(
    answers: dict[int, Status], most: int
) -> None:
    levels, bracket = climb(burst_ladder(most), answers, OPEN)
    assert len(set(levels)) == len(levels)
    if bracket.highest_pass is not None:
        assert answers[bracket.highest_pass] is P
    if bracket.lowest_fail is not None:
        assert answers[bracket.lowest_fail] is F
        assert bracket.highest_pass is None or bracket.highest_pass < bracket.lowest_fail


def test_a_level_meets_several_checks_only_if_it_meets_each() -> None:
    assert together([P, P, P]) is P
    assert together([P, OPEN, P]) is OPEN
    assert together([P, OPEN, F]) is F
    assert together([P, Status.NOT_APPLICABLE]) is P
    assert together([]) is OPEN


def test_rates_are_searched_in_tenths_of_a_request_per_second() -> None:
    ladder = rate_ladder(0.5, 200.0)
    assert ladder == Ladder(lowest=5, first=5, most=2_000)
    levels, bracket = climb(ladder, below(85, 2_000), F)
    assert [rate_per_s(level) for level in levels] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 10.0]
    assert bracket == Bracket(80, 100, None)


@pytest.mark.parametrize(("lowest", "first", "most"), [(0, 1, 2), (2, 1, 3), (1, 4, 3)])
def test_a_ladder_in_the_wrong_order_is_refused(lowest: int, first: int, most: int) -> None:
    with pytest.raises(ValueError, match="a ladder needs 1 <= lowest <= first <= most"):
        Ladder(lowest, first, most)
