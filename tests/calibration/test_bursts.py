"""The fast share of `make calibrate`: searches in worlds whose limit is known, and single levels at the limit itself.

Seeded, so the counts are the same every time.
"""

import numpy as np
import pytest

from tests.calibration.burst_study import at_the_limit, doubling_and_bisection, search, worlds
from tests.calibration.burst_world import REQUIREMENT, World, world_with_limit

SPREADS = (0.02, 0.05, 0.1)


def test_a_hundred_searches_hold_the_limit_claim_too_much_in_no_more_than_five_and_cost_less_than_bisection() -> None:
    random = np.random.default_rng(20)
    drawn = list(worlds(random, 100, SPREADS))
    found = [search(world, random, 20) for world in drawn]
    assert sum(result.contains for result in found) >= 95
    assert sum(result.overclaimed for result in found) <= 5
    assert sum(result.found and result.steps_off <= 1 for result in found) >= 90
    rival = [doubling_and_bisection(world, random, 20, to_one=False) for world in drawn]
    assert sum(result.requests for result in found) < sum(result.requests for result in rival)
    assert sum(result.contains for result in rival) < 95  # the comparison is one that could be lost


@pytest.mark.parametrize(("spread", "noise"), [(0.05, 0.2), (0.2, 0.02)])
def test_right_at_the_limit_a_level_is_judged_wrongly_no_more_often_than_it_claims(spread: float, noise: float) -> None:
    judged = at_the_limit(world_with_limit(60, 2, spread, noise), np.random.default_rng(21), 20, 200)
    # 2.5 % is claimed; 200 repeats of a rate of 2.5 % exceed 11 with a probability of 1 %.
    assert judged.false_pass <= 11 / 200
    assert judged.false_fail <= 11 / 200
    assert judged.false_pass_observed > 0.1


def test_the_limit_of_a_world_is_what_its_trials_show() -> None:
    world = World(servers=2, service_ms=10.0, spread=0.1, noise=0.1, failing=0.01)
    latency = world.trials(np.random.default_rng(22), 20_000, 50)
    assert float(REQUIREMENT.is_slow(latency).mean()) == pytest.approx(world.slow_share(50), abs=2e-3)
    assert world.slow_share(world.limit) <= REQUIREMENT.slow_share < world.slow_share(world.limit + 1)


def test_a_world_without_spread_has_the_limit_that_arithmetic_gives() -> None:
    """Two servers of 9.99 ms answer 60 requests below 300 ms; 63 is the largest burst of which 60 are 95 %."""
    world = World(servers=2, service_ms=9.99, spread=1e-9, noise=1e-9)
    assert world.limit == 63


def test_a_world_can_be_made_for_a_limit() -> None:
    assert [world_with_limit(limit, 1, 0.1, 0.1).limit for limit in (16, 41, 200)] == [16, 41, 200]
