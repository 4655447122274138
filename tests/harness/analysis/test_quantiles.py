from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from harness.analysis.quantiles import (
    QuantileEstimate,
    estimate_quantile,
    more_for_share,
    quantile,
    share_bounds,
)

LATENCIES = st.lists(st.floats(0.1, 1e4), min_size=1, max_size=200)


def slow(count: int, of: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    return np.arange(of) < count


@given(LATENCIES, st.floats(0.001, 1.0))
def test_a_quantile_is_the_smallest_value_that_enough_values_do_not_exceed(values: list[float], q: float) -> None:
    found = quantile(np.array(values), q)
    enough = [value for value in sorted(values) if sum(other <= value for other in values) >= q * len(values) - 1e-9]
    assert found == enough[0]


@given(LATENCIES, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_a_quantile_agrees_with_the_inverted_distribution_of_numpy(values: list[float], q: float) -> None:
    assert quantile(np.array(values), q) == np.quantile(values, q, method="inverted_cdf")


@given(st.lists(st.floats(0.1, 1e4), min_size=1, max_size=50), st.integers(0, 50))
def test_failures_never_make_a_quantile_smaller(values: list[float], failures: int) -> None:
    answered = np.array(values)
    assert quantile(np.append(answered, [math.inf] * failures), 0.95) >= quantile(answered, 0.95)


@given(st.integers(1, 400), st.data())
def test_share_bounds_of_independent_requests_are_the_exact_binomial_ones(n: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, n))
    below = stats.binomtest(count, n, alternative="less").proportion_ci(0.95)
    above = stats.binomtest(count, n, alternative="greater").proportion_ci(0.95)
    assert share_bounds(slow(count, n), float(n)) == pytest.approx((above.low, below.high), abs=1e-9)


@pytest.mark.parametrize(("n", "proven"), [(58, False), (59, True)])
def test_no_slow_request_proves_a_p95_from_59_independent_ones_on(n: int, proven: bool) -> None:
    assert (share_bounds(slow(0, n), float(n))[1] <= 0.05) is proven


@pytest.mark.parametrize(
    ("count", "n", "limit", "expected"),
    [
        (0, 10, 0.05, 49),  # 59 without a slow one prove a p95
        (0, 20, 0.01, 279),  # 299 prove a p99
        (5, 100, 0.05, None),  # the limit itself: no number would settle it
    ],
)
def test_the_number_of_requests_still_needed_is_told(count: int, n: int, limit: float, expected: int | None) -> None:
    assert more_for_share(slow(count, n), float(n), limit) == expected


@given(st.integers(0, 30), st.integers(31, 300))
def test_the_requests_still_needed_are_enough_and_not_one_too_many(count: int, n: int) -> None:
    is_slow = slow(count, n)
    more = more_for_share(is_slow, float(n), 0.05)
    low, high = share_bounds(is_slow, float(n))
    if high <= 0.05 or low > 0.05:
        assert more == 0
    elif more is None:
        assert count / n == 0.05
    else:
        share, enough, too_few = count / n, n + more, n + more - 1

        def settled(total: int) -> bool:
            slow_ones = share * total
            if share < 0.05:
                return bool(stats.beta.ppf(0.95, slow_ones + 1, total - slow_ones) <= 0.05)
            return bool(stats.beta.ppf(0.05, slow_ones, total - slow_ones + 1) > 0.05)

        assert (settled(enough), settled(too_few)) == (True, False)


def test_an_interval_of_independent_requests_covers_the_true_quantile_as_often_as_it_says() -> None:
    random = np.random.default_rng(7)
    covered = 0
    for _ in range(300):
        found = estimate_quantile(np.exp(random.normal(2.0, 0.5, 1000)), 0.95, np.arange(1000))
        assert found.lower_ms is not None
        assert found.upper_ms is not None
        covered += found.lower_ms <= math.exp(2.0 + 0.5 * stats.norm.ppf(0.95)) <= found.upper_ms
    assert covered >= 276  # 92 % of 300; at a true 95 % fewer come once in a hundred


def test_an_interval_is_refused_where_the_sample_cannot_carry_it() -> None:
    few = np.random.default_rng(4).permutation(np.arange(1.0, 101.0))
    found = estimate_quantile(few, 0.5, np.arange(100))
    assert (found.value_ms, found.lower_ms, found.upper_ms, found.requests) == (50.0, None, None, 100)
    assert found.refusal == f"effective sample size for the p50 is {found.effective:.0f}; an interval needs 300"


def test_an_interval_of_a_far_quantile_needs_ten_requests_in_its_tail() -> None:
    found = estimate_quantile(np.random.default_rng(3).permutation(np.arange(1.0, 501.0)), 0.99, np.arange(500))
    assert (found.lower_ms, found.upper_ms) == (None, None)
    assert "for the p99 is 498; its interval needs 1000" in (found.refusal or "")


def test_a_quantile_among_the_failures_has_no_value() -> None:
    found = estimate_quantile(np.array([1.0, 2.0, math.inf]), 0.95, np.arange(3))
    assert found.value_ms is None


def test_no_request_gives_no_quantile() -> None:
    nothing = QuantileEstimate(0.95, None, None, None, 0, 0.0, "no such request")
    assert estimate_quantile(np.array([]), 0.95, np.array([], dtype=np.int64)) == nothing
