"""The fast share of the simulation of recalibrations. Seeded, so the counts are the same every time."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from service.db import Database
from service.quota.guardrails import LARGEST_STEP
from tests.calibration.recalibration_study import (
    Rollbacks,
    loss,
    poisoned,
    rollbacks,
    steady,
    wandering,
    watch,
)
from tests.calibration.recalibration_world import Noise

PLAIN = Noise(0.1, 0.02)


def test_of_a_hundred_recalibrations_of_steady_services_no_more_than_two_change_a_rate() -> None:
    found = steady(np.random.default_rng(30), PLAIN, 100)
    assert max(found.young, found.chain) <= 2
    worse = steady(np.random.default_rng(30), Noise(0.2, 0.1), 100)
    assert worse.young > 2  # the count is one that could be larger


def test_no_poisoned_file_changes_a_table_where_every_sound_one_does() -> None:
    found = poisoned(np.random.default_rng(31), PLAIN, 12)
    assert dict.fromkeys(found.tried, 0) == found.applied == found.believed
    assert found.sound_applied == found.sound == 12


def test_a_loss_of_thirty_percent_is_followed_within_three_cycles_in_steps_of_at_most_twenty() -> None:
    found = loss(np.random.default_rng(32), PLAIN, 60)
    assert found.followed[2] == 60
    assert found.followed[0] < 10  # one step cannot do it
    assert found.largest_step == LARGEST_STEP


def test_a_service_in_use_that_wanders_is_followed_but_never_below_its_use() -> None:
    found = wandering(np.random.default_rng(33), PLAIN, 150)
    assert (found.below_use, found.held_by_use > 5, found.changes > 15) == (0, True, True)
    assert Fraction(0) < found.largest_step <= LARGEST_STEP


async def test_each_rollback_gives_back_the_row_that_was_in_force(database_url: str) -> None:
    database = Database(database_url)
    try:
        found = await rollbacks(database, np.random.default_rng(34), PLAIN, 6)
    finally:
        await database.close()
    assert found == Rollbacks(activated=6, exact=6)


@pytest.mark.parametrize(("before", "during", "taken_back"), [(0.05, 0.05, 0.0), (0.005, 0.05, 1.0), (0.0, 0.05, 1.0)])
def test_a_rise_of_refusals_is_seen_within_a_day_and_a_steady_share_is_none(
    before: float, during: float, taken_back: float
) -> None:
    found = watch(np.random.default_rng(35), before, during, 20, 5)
    assert found.taken_back == taken_back
