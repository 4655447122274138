from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from harness.analysis.dependence import Floats, effective_size, exceedance_correlation, series_inflation
from harness.analysis.quantiles import share_bounds


def autocorrelated(n: int, rho: float, random: np.random.Generator) -> Floats:
    """Return normal values (n,) of which neighbours correlate by `rho`."""
    noise = random.standard_normal(n) * np.sqrt(1.0 - rho**2)
    values = np.empty(n)
    values[0] = random.standard_normal()
    for index in range(1, n):
        values[index] = rho * values[index - 1] + noise[index]
    return values


@pytest.mark.parametrize("rho", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("share", [0.5, 0.05])
def test_the_correlation_of_exceeding_is_that_of_the_bivariate_normal(rho: float, share: float) -> None:
    z = stats.norm.ppf(share)  # both below -z is as likely as both above z
    both = stats.multivariate_normal.cdf([z, z], cov=[[1.0, rho], [rho, 1.0]])
    expected = (both - share**2) / (share * (1 - share))
    assert exceedance_correlation(np.array([rho]), share)[0] == pytest.approx(expected, abs=1e-4)


def test_perfect_correlation_stays_perfect_and_none_stays_none() -> None:
    assert exceedance_correlation(np.array([0.0, 1.0, -0.7]), 0.05) == pytest.approx([0.0, 1.0, 0.0], abs=5e-3)


@given(st.lists(st.booleans(), min_size=1, max_size=80), st.floats(0.01, 0.5))
def test_a_sample_is_worth_at_least_one_request_and_at_most_all(is_slow: list[bool], share: float) -> None:
    seen = np.array(is_slow)
    latency = np.where(seen, 400.0, np.arange(1.0, len(seen) + 1))
    worth = effective_size(seen, share, np.arange(len(seen)) // 2, latency)
    assert 1.0 <= worth <= len(seen)


def test_nothing_is_worth_nothing() -> None:
    assert effective_size(np.array([], dtype=np.bool_), 0.05, np.array([], dtype=np.int64)) == 0.0


def test_groups_that_share_one_fate_are_worth_one_request_each() -> None:
    is_slow = np.repeat([True, False, False, True], 10)
    assert effective_size(is_slow, 0.05, np.repeat(np.arange(4), 10)) == pytest.approx(4.0, rel=0.5)


def test_a_series_of_one_value_has_no_inflation() -> None:
    assert series_inflation(np.full(100, 3.0)) == 1.0


def test_a_slow_first_wave_far_from_the_target_does_not_hide_what_the_rest_proves() -> None:
    random = np.random.default_rng(5)
    latency = random.lognormal(1.5, 0.2, 140)
    latency[:20] *= 3.0
    worth = effective_size(latency >= 375.0, 0.05, np.arange(140) // 2, latency)
    assert share_bounds(latency >= 375.0, worth)[1] <= 0.05


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_a_p95_at_its_very_target_passes_and_fails_seldom_however_requests_repeat_each_other(rho: float) -> None:
    random = np.random.default_rng(11)
    limit, passed, failed = stats.norm.ppf(0.95), 0, 0
    for _ in range(150):
        latency = autocorrelated(400, rho, random)
        worth = effective_size(latency >= limit, 0.05, np.arange(400), np.exp(latency))
        low, high = share_bounds(latency >= limit, worth)
        passed, failed = passed + (high <= 0.05), failed + (low > 0.05)
    # 5 % of 150 are 7.5; more than 14 come once in a hundred.
    assert (passed <= 14, failed <= 14) == (True, True)
