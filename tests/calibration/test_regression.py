"""The fast share of `make calibrate` on the regression gate. Seeded: the counts are always the same."""

import numpy as np
import pytest

from harness.analysis.regression import compare_runs
from harness.analysis.slo import Status
from tests.calibration.gate_study import MARGIN, SIX, Comparison, Gate, alarms_of, study

TRIALS = 300


@pytest.mark.parametrize(
    "same", [Comparison(3, 10, False, 0.03, 0.0, 0.0, TRIALS), Comparison(5, 5, True, 0.03, 0.05, 0.0, TRIALS)]
)
def test_identical_systems_alarm_as_seldom_as_is_said(same: Comparison) -> None:
    assert study(same).failed <= 0.083  # 300 trials of a rate of 5 % show more than 25 once in a hundred


@pytest.mark.parametrize("alike", [0.0, 0.9])
def test_a_whole_gate_alarms_on_identical_systems_as_seldom_as_one_comparison(alike: float) -> None:
    assert alarms_of(Gate(Comparison(3, 10, False, 0.03, 0.0, 0.0, TRIALS, SIX), alike)) <= 0.083


def test_comparisons_that_shared_no_error_would_alarm_too_often() -> None:
    alone = Comparison(3, 10, False, 0.03, 0.0, 0.0, TRIALS)
    random = np.random.default_rng(1)
    several = [[compare_runs(*alone.draw(random), MARGIN).status for _ in range(SIX)] for _ in range(TRIALS)]
    assert sum(Status.FAIL in found for found in several) / TRIALS > 0.12


def test_a_slowdown_of_ten_percent_is_found_with_three_runs_against_ten() -> None:
    assert study(Comparison(3, 10, False, 0.03, 0.0, 0.1, TRIALS, SIX)).failed >= 0.93  # 95 % of 300, less chance


def test_a_slowdown_of_three_percent_is_found_with_five_pairs_and_not_without_pairing() -> None:
    assert study(Comparison(5, 5, True, 0.01, 0.05, 0.03, TRIALS)).slower >= 0.9
    assert study(Comparison(5, 5, False, 0.01, 0.05, 0.03, TRIALS)).slower < 0.3


def test_a_slowdown_of_the_whole_margin_seldom_passes() -> None:
    assert study(Comparison(3, 10, False, 0.01, 0.0, MARGIN, TRIALS)).passed <= 0.083
