"""The fast share of `make calibrate` on the regression gate. Seeded: the counts are always the same."""

import pytest

from tests.calibration.gate_study import MARGIN, Comparison, study

TRIALS = 300


@pytest.mark.parametrize(
    "same", [Comparison(3, 10, False, 0.03, 0.0, 0.0, TRIALS), Comparison(5, 5, True, 0.03, 0.05, 0.0, TRIALS)]
)
def test_identical_systems_alarm_as_seldom_as_is_said(same: Comparison) -> None:
    assert study(same).failed <= 0.083  # 300 trials of a rate of 5 % show more than 25 once in a hundred


def test_a_slowdown_of_ten_percent_is_found_with_three_runs_against_ten() -> None:
    assert study(Comparison(3, 10, False, 0.03, 0.0, 0.1, TRIALS)).failed >= 0.95


def test_a_slowdown_of_three_percent_is_found_with_five_pairs_and_not_without_pairing() -> None:
    assert study(Comparison(5, 5, True, 0.01, 0.05, 0.03, TRIALS)).slower >= 0.9
    assert study(Comparison(5, 5, False, 0.01, 0.05, 0.03, TRIALS)).slower < 0.3


def test_a_slowdown_of_the_whole_margin_seldom_passes() -> None:
    assert study(Comparison(3, 10, False, 0.01, 0.0, MARGIN, TRIALS)).passed <= 0.083
