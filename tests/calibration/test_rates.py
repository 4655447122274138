"""The fast share of `make calibrate` for capacities: searches on queues whose capacity is arithmetic.

Seeded, so the counts are the same every time.
"""

import numpy as np
import pytest

from harness.analysis.capacity import Check
from harness.analysis.slo import Status
from tests.calibration.rate_study import by_observed_p95, judge_level, search, worlds
from tests.calibration.rate_world import RateWorld, served


def test_twenty_searches_hold_the_capacity_where_the_observed_p95_claims_too_much() -> None:
    random = np.random.default_rng(30)
    drawn = list(worlds(random, 20, (0.02, 0.05)))
    found = [search(world, random, 10) for world in drawn]
    # A service that falls behind by more than the growth allowed and what windows can tell sustains nothing; one that
    # is busy for less than nine tenths of the time sustains its rate. Between the two, only `make calibrate` counts.
    assert [one for one in found if (one.highest_pass_per_s or 0.0) > 1.15 * one.world.capacity_per_s] == []
    assert [one for one in found if (one.lowest_fail_per_s or 1e9) < 0.75 * one.world.capacity_per_s] == []
    assert sum(one.found for one in found) >= 15
    rival = [by_observed_p95(world, random, 10) for world in drawn[:8]]
    assert any((one.highest_pass_per_s or 0.0) > 1.15 * one.world.capacity_per_s for one in rival)


def test_a_service_that_falls_behind_slowly_fails_for_its_queue_while_every_answer_is_in_time() -> None:
    world = RateWorld(servers=4, service_ms=4.0, workers=1, run_ms=10.0, spread=0.02)  # 1,000 and 100 a second
    verdict = judge_level(world, np.random.default_rng(31), 20, 125.0)
    assert verdict.status is Status.FAIL
    assert verdict.findings[Check.LATENCY].status is Status.PASS
    assert verdict.findings[Check.DEPTH].status is Status.FAIL
    # Fluid limit: 125 come and 100 go, so a fifth of what comes stays.
    assert verdict.findings[Check.DEPTH].value == pytest.approx(0.2, abs=0.03)
    assert verdict.findings[Check.AGE].value == pytest.approx(0.2, abs=0.05)


def test_a_service_that_refuses_every_request_has_no_queue() -> None:
    world = RateWorld(servers=1, service_ms=4.0, workers=1, run_ms=10.0, spread=0.0, failing=1.0)
    seen = world.window(np.random.default_rng(33), 20.0)
    assert (seen.depth_max, seen.age_s_max, seen.served_per_s) == (0.0, 0.0, 0.0)


def test_dealing_requests_to_servers_in_turn_is_serving_them_in_order() -> None:
    due = np.sort(np.random.default_rng(32).uniform(0.0, 10.0, 400))
    free = [0.0] * 3
    expected = []
    for at in due:
        free.sort()
        free[0] = max(free[0], at) + 0.07
        expected.append(free[0])
    np.testing.assert_allclose(served(due, 3, 0.07), expected)
