from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.weightstats import ttost_ind, ttost_paired

from harness.analysis.dependence import Floats
from harness.analysis.regression import GateVerdict, compare_pairs, compare_runs, run_quantiles
from harness.analysis.slo import Status
from harness.sample import Outcome

BASELINE = np.array([100.0, 102.0, 98.0, 101.0, 99.0, 103.0, 97.0, 100.0, 101.0, 99.0])
RUNS = st.lists(st.floats(80.0, 120.0), min_size=3, max_size=12).map(np.array)


def bounds(found: GateVerdict) -> tuple[float, float]:
    """Return the bounds of the logarithm."""
    assert found.lower is not None
    assert found.upper is not None
    return math.log1p(found.lower), math.log1p(found.upper)


def test_the_bounds_are_student_s_with_the_pooled_spread_by_hand() -> None:
    candidate = np.array([104.0, 107.0, 105.0])
    ours, theirs = np.log(candidate), np.log(BASELINE)
    change = ours.mean() - theirs.mean()
    pooled = math.sqrt((ours.var(ddof=1) * 2 + theirs.var(ddof=1) * 9) / 11)
    half = 1.795885 * pooled * math.sqrt(1 / 3 + 1 / 10)  # Student's t, 11 degrees of freedom, from a printed table
    found = compare_runs(candidate, BASELINE, 0.05)
    assert bounds(found) == pytest.approx((change - half, change + half), rel=1e-6)
    theirs_too = stats.ttest_ind(ours, theirs).confidence_interval(0.9)
    assert bounds(found) == pytest.approx((theirs_too.low, theirs_too.high))
    assert found.change == pytest.approx(math.expm1(change))
    assert found.noise == pytest.approx(pooled)


@given(RUNS, RUNS)
def test_equivalence_agrees_with_the_two_one_sided_tests_of_statsmodels(ours: Floats, theirs: Floats) -> None:
    found = compare_runs(ours, theirs, 0.05)
    if min(float(np.ptp(ours)), float(np.ptp(theirs))) > 1e-6:
        p = ttost_ind(np.log(ours), np.log(theirs), math.log(0.95), math.log(1.05), usevar="pooled")[0]
        assert abs(p - 0.05) < 1e-9 or (found.equivalence is Status.PASS) is bool(p < 0.05)


@given(st.lists(st.tuples(st.floats(80.0, 120.0), st.floats(80.0, 120.0)), min_size=4, max_size=12))
def test_equivalence_of_pairs_agrees_with_the_two_one_sided_tests_of_statsmodels(
    pairs: list[tuple[float, float]],
) -> None:
    ours, theirs = np.array(pairs).T
    found = compare_pairs(ours, theirs, 0.05)
    if float(np.ptp(np.log(ours / theirs))) > 1e-6:
        p = ttost_paired(np.log(ours), np.log(theirs), math.log(0.95), math.log(1.05))[0]
        assert abs(p - 0.05) < 1e-9 or (found.equivalence is Status.PASS) is bool(p < 0.05)


@given(RUNS, RUNS, st.floats(0.01, 100.0))
def test_the_unit_of_latency_changes_no_verdict(ours: Floats, theirs: Floats, factor: float) -> None:
    found, scaled = compare_runs(ours, theirs, 0.05), compare_runs(ours * factor, theirs * factor, 0.05)
    assert bounds(found) == pytest.approx(bounds(scaled), abs=1e-9)


@pytest.mark.parametrize(
    ("factor", "status", "equivalence", "is_slower"),
    [
        (1.0, Status.PASS, Status.PASS, False),
        (0.8, Status.PASS, Status.FAIL, False),  # faster is no regression, and no equivalence
        (1.03, Status.PASS, Status.PASS, True),  # slower, but harmless
        (1.055, Status.FAIL, Status.INCONCLUSIVE, True),
        (1.2, Status.FAIL, Status.FAIL, True),
    ],
)
def test_a_change_of_known_size(factor: float, status: Status, equivalence: Status, is_slower: bool) -> None:
    found = compare_runs(BASELINE * factor, BASELINE, 0.05)
    assert (found.status, found.equivalence, found.is_slower) == (status, equivalence, is_slower)
    assert found.change == pytest.approx(factor - 1.0)
    assert (found.more_candidate_runs, found.more_baseline_runs) == (None, None)


def test_too_few_noisy_runs_leave_it_open_and_say_how_many_more_would_do() -> None:
    noisy = BASELINE * np.array([1.1, 0.9] * 5)
    found = compare_runs(noisy[:3], noisy, 0.05)
    assert found.status is Status.INCONCLUSIVE
    assert found.more_candidate_runs is not None
    assert found.more_baseline_runs is not None
    more_ours, more_theirs = found.more_candidate_runs, found.more_baseline_runs
    change, spread = math.log1p(found.change or 0.0), found.noise or 0.0
    n, m = 3 + more_ours, 10 + more_theirs
    half = 1.66 * spread * math.sqrt(1 / n + 1 / m)  # about Student's t with some hundred degrees of freedom
    assert change + 0.98 * half < math.log(1.05) or change - 0.98 * half > 0.0


def test_one_candidate_run_is_compared_by_the_spread_of_the_baseline() -> None:
    theirs = np.log(BASELINE)
    half = 1.833113 * theirs.std(ddof=1) * math.sqrt(1 + 1 / 10)  # Student's t, 9 degrees of freedom
    found = compare_runs(np.array([130.0]), BASELINE, 0.05)
    change = math.log(130.0) - theirs.mean()
    assert bounds(found) == pytest.approx((change - half, change + half), rel=1e-6)
    assert found.status is Status.FAIL


@pytest.mark.parametrize(
    ("candidates", "baselines", "more"), [(0, 10, (1, 0)), (3, 1, (0, 2)), (1, 3, (1, 0)), (0, 0, (2, 3))]
)
def test_too_few_runs_are_refused_with_the_number_that_lacks(
    candidates: int, baselines: int, more: tuple[int, int]
) -> None:
    found = compare_runs(BASELINE[:candidates], BASELINE[:baselines], 0.05)
    assert (found.status, found.change) == (Status.INCONCLUSIVE, None)
    assert (found.more_candidate_runs, found.more_baseline_runs) == more
    assert "3 baseline runs and 5 in all are needed" in found.reason


def test_too_few_pairs_are_refused_with_the_number_that_lacks() -> None:
    found = compare_pairs(BASELINE[:3], BASELINE[:3], 0.05)
    assert (found.status, found.more_candidate_runs, found.more_baseline_runs) == (Status.INCONCLUSIVE, 1, 1)


def test_pairs_take_out_what_both_met() -> None:
    met = np.array([1.0, 1.4, 0.8, 1.2, 0.9])
    ours, theirs = BASELINE[:5] * met * 1.03, BASELINE[5:] * met
    together, apart = compare_pairs(ours, theirs, 0.05), compare_runs(ours, theirs, 0.05)
    assert (together.noise or 0.0) < (apart.noise or 0.0) / 5
    assert apart.status is Status.INCONCLUSIVE


def test_the_bounds_of_pairs_are_those_of_scipy() -> None:
    ours, theirs = BASELINE[:5] * 1.03, BASELINE[5:]
    expected = stats.ttest_rel(np.log(ours), np.log(theirs)).confidence_interval(0.9)
    assert bounds(compare_pairs(ours, theirs, 0.05)) == pytest.approx((expected.low, expected.high))


def test_pairs_of_different_numbers_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="pairs need as many candidates as baselines, not 3 and 10"):
        compare_pairs(BASELINE[:3], BASELINE, 0.05)


def test_identical_runs_pass_without_any_spread() -> None:
    same = np.full(5, 20.0)
    for found in (compare_runs(same, same, 0.05), compare_pairs(same, same, 0.05)):
        assert (found.status, found.change, found.noise) == (Status.PASS, 0.0, 0.0)


def test_a_candidate_whose_quantile_is_a_failure_is_slower_than_anything() -> None:
    found = compare_runs(np.array([100.0, math.inf, 100.0]), BASELINE, 0.05)
    assert (found.status, found.is_slower, found.change) == (Status.FAIL, True, None)
    assert "In 1 of 3 candidate runs" in found.reason


def test_a_baseline_whose_quantile_is_a_failure_compares_with_nothing() -> None:
    found = compare_runs(BASELINE, np.array([100.0, math.inf, 100.0]), 0.05)
    assert (found.status, found.is_slower) == (Status.INCONCLUSIVE, False)


def test_a_quantile_of_nothing_has_no_ratio() -> None:
    assert "0 ms" in compare_runs(np.array([0.0, 1.0, 1.0]), BASELINE, 0.05).reason


@pytest.mark.parametrize("margin", [0.0, 1.0, -0.1, 5.0])
def test_a_margin_that_is_no_share_is_refused(margin: float) -> None:
    with pytest.raises(ValueError, match="a margin lies between 0 and 1"):
        compare_runs(BASELINE, BASELINE, margin)


def test_each_repetition_has_its_quantile_with_failures_as_the_slowest() -> None:
    frame = pd.DataFrame(
        {
            "measurement_id": ["b"] * 3 + ["a"] * 4 + ["a"] * 2,
            "trial": [0] * 3 + [0] * 4 + [1] * 2,
            "latency_ms": [1.0, 2.0, 3.0, 5.0, 6.0, 7.0, 8.0, 1.0, 9.0],
            "service_ms": 0.5,
            "outcome": [Outcome.OK] * 8 + [Outcome.TIMEOUT],
        }
    )
    assert run_quantiles(frame, 0.5).tolist() == [6.0, 1.0, 2.0]
    assert run_quantiles(frame, 0.95).tolist() == [8.0, math.inf, 3.0]


def test_among_several_comparisons_a_slowdown_needs_more_to_be_proven() -> None:
    ours, theirs = np.array([10.3, 10.5, 10.6]), np.array([10.0, 10.1, 9.9, 10.2, 9.8])
    alone, among = compare_runs(ours, theirs, 0.05), compare_runs(ours, theirs, 0.05, sharing=200)
    assert (alone.status, among.status) == (Status.FAIL, Status.INCONCLUSIVE)
    assert (among.is_slower, among.lower, among.upper) == (True, alone.lower, alone.upper)
    assert among.reason.endswith("a slowdown if it stood alone, but not proven among 200 comparisons.")
    assert among.more_candidate_runs is not None
