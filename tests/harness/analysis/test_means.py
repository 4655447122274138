from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from harness.analysis.means import RatioBounds, more_for_ratio, ratio_bounds

VALUES = st.lists(st.floats(0.1, 1000.0), min_size=3, max_size=19)


@given(VALUES)
def test_bounds_of_a_mean_are_those_of_the_t_test(values: list[float]) -> None:
    found = ratio_bounds(np.array(values), np.ones(len(values)))
    expected = stats.t.interval(0.9, len(values) - 1, np.mean(values), stats.sem(values)) if np.ptp(values) else None
    assert (found.lower, found.upper) == pytest.approx(expected or (values[0], values[0]), rel=1e-6, abs=1e-6)


@given(VALUES)
def test_a_ratio_lies_between_its_bounds(values: list[float]) -> None:
    found = ratio_bounds(np.array(values), np.arange(1.0, len(values) + 1))
    assert found.lower is not None
    assert found.upper is not None
    assert found.lower <= found.estimate <= found.upper


def test_two_units_give_an_estimate_and_no_bounds() -> None:
    found = ratio_bounds(np.array([1.0, 3.0]), np.ones(2))
    assert (found.estimate, found.lower, found.upper, math.isnan(found.error_per_unit)) == (2.0, None, None, True)
    assert more_for_ratio(found, 10.0) == 1


def test_the_units_still_needed_are_enough_and_not_one_too_many() -> None:
    found = ratio_bounds(np.array([250.0, 350.0, 280.0, 260.0]), np.ones(4))
    more = more_for_ratio(found, 300.0)
    assert more is not None

    def half_width(n: int) -> float:
        return float(stats.t.ppf(0.95, n - 1)) * found.error_per_unit / math.sqrt(n)

    assert half_width(4 + more) < 300.0 - found.estimate <= half_width(3 + more)


def test_a_mean_on_the_target_is_never_settled() -> None:
    assert more_for_ratio(RatioBounds(300.0, 290.0, 310.0, 5, 5.0, 10.0), 300.0) is None


def test_neighbours_that_repeat_each_other_widen_the_bounds() -> None:
    random = np.random.default_rng(2)
    shuffled = np.repeat(random.normal(100.0, 10.0, 10), 10)
    ordered = ratio_bounds(shuffled, np.ones(100))
    mixed = ratio_bounds(random.permutation(shuffled), np.ones(100))
    assert ordered.effective < 0.5 * mixed.effective
