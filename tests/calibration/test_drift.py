"""The fast share of `make calibrate` on drift. Seeded: the counts are always the same."""

import dataclasses

import pytest

from tests.calibration.drift_study import MARGIN, Soak, study


@pytest.mark.parametrize("correlation", [0.0, 0.8])
@pytest.mark.parametrize("change", [MARGIN, -MARGIN])
def test_a_drift_of_the_margin_is_judged_either_way_as_seldom_as_is_said(correlation: float, change: float) -> None:
    found = study(Soak(90, change, correlation, 0.005, 200))
    assert max(found.no_drift, found.drift) <= 0.125  # 200 trials of a rate of 8 % show more than 25 once in a hundred


def test_a_soak_that_holds_still_is_shown_to_or_asks_for_the_minutes_that_show_it() -> None:
    quiet = Soak(90, 0.0, 0.5, 0.02, 200)
    assert study(quiet).no_drift >= 0.85
    noisy = study(dataclasses.replace(quiet, noise=0.05))
    assert noisy.no_drift < 0.5
    assert noisy.minutes_asked > 200
    assert noisy.settled_then >= 0.7
