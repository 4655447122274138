from __future__ import annotations

import numpy as np
import pytest

from harness.analysis.dependence import Floats
from harness.analysis.scalability import fit_scalability, throughput_at

LAW = (100.0, 0.03, 0.0004)  # peak at sqrt(0.97 / 0.0004) = 49.2
PEAK = 49.2443


def runs(loads: list[float], noise: float = 0.0) -> tuple[Floats, Floats]:
    """Return three runs at each load."""
    load = np.repeat(np.array(loads), 3)
    random = np.random.default_rng(1)
    return load, throughput_at(load, *LAW) * np.exp(noise * random.standard_normal(len(load)))


def test_a_peak_that_the_load_went_past_is_found() -> None:
    load, throughput = runs([1, 5, 20, 40, 60, 80], noise=0.02)
    found = fit_scalability(load, throughput, seed=1)
    assert found.peak_load == pytest.approx(PEAK, rel=0.1)
    assert found.peak_load_interval is not None
    assert found.peak_load_interval[0] < PEAK < found.peak_load_interval[1]
    assert found.peak_throughput == pytest.approx(float(throughput_at(np.array([PEAK]), *LAW)[0]), rel=0.05)
    assert fit_scalability(load, throughput, seed=1) == found


def test_without_noise_the_law_itself_is_found() -> None:
    found = fit_scalability(*runs([1, 5, 20, 40, 60, 80]), seed=1)
    assert (found.per_one, found.contention, found.coherence) == pytest.approx(LAW, rel=1e-3)


def test_a_load_below_the_peak_gives_a_lower_bound_and_no_peak() -> None:
    found = fit_scalability(*runs([1, 5, 10, 20, 40], noise=0.02), seed=1)
    assert (found.peak_load, found.peak_load_interval, found.peak_throughput) == (None, None, None)
    assert found.load_max == 40
    assert found.reason == "The load did not go past the peak: 40 is a lower bound of it."


def test_three_loads_are_too_few_for_the_curve() -> None:
    found = fit_scalability(*runs([1, 20, 60]), seed=1)
    assert found.reason == "3 different loads say nothing of the curve between them: 4 are needed."
    assert (found.per_one, found.load_max) == (None, 60)


def test_no_run_is_no_curve() -> None:
    found = fit_scalability(np.empty(0), np.empty(0), seed=1)
    assert (found.per_one, found.load_max, found.throughput_at_load_max) == (None, None, None)
