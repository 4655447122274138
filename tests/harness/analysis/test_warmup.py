from __future__ import annotations

import math

import numpy as np
from scipy import special

from harness.analysis.warmup import WarmUp, find_warm_up


def test_a_slow_start_is_cut_off_and_little_more() -> None:
    latency = np.random.default_rng(1).lognormal(2.0, 0.3, 400)
    latency[:60] *= 4.0
    found = find_warm_up(latency)
    assert found.is_steady
    assert found.cut is not None
    assert 55 <= found.cut <= 100


def test_a_latency_that_rises_to_the_end_never_becomes_steady() -> None:
    latency = np.exp(np.linspace(1.0, 4.0, 400) + 0.05 * np.random.default_rng(2).standard_normal(400))
    assert find_warm_up(latency) == WarmUp(
        None, 400, is_steady=False, reason="It never became steady: what is left still rises or falls."
    )


def test_failures_at_the_start_are_warm_up_as_slow_requests_are() -> None:
    latency = np.random.default_rng(3).lognormal(2.0, 0.3, 400)
    latency[:40] = math.inf
    assert (find_warm_up(latency).cut or 0) >= 40


def test_one_value_has_no_warm_up_and_few_requests_cannot_show_one() -> None:
    assert (find_warm_up(np.ones(200)).cut, find_warm_up(np.ones(200)).is_steady) == (0, True)
    assert find_warm_up(np.ones(99)).reason == "99 requests are too few to see a warm-up: 100 are needed."


def test_the_place_is_the_one_with_the_smallest_standard_error_of_the_rest() -> None:
    latency = np.exp(np.random.default_rng(4).standard_normal(150))
    latency[:20] *= 10.0
    order = np.argsort(np.argsort(latency))
    means = special.ndtri((order + 0.5) / 150).reshape(30, 5).mean(axis=1)
    errors = [float(np.var(means[place:])) / (30 - place) for place in range(25)]
    assert find_warm_up(latency).cut == 5 * int(np.argmin(errors))
