"""The fast share of `make calibrate` on histories. Seeded: the counts are always the same."""

from tests.calibration.history_study import Noise, Reports, study


def test_a_history_without_a_change_is_flagged_as_seldom_as_is_said() -> None:
    assert study(Reports(Noise.NORMAL, 0.0, 0, 200)).flagged <= 0.15  # of a rate of 10 %, more come once in a hundred


def test_a_step_of_ten_percent_is_found_where_it_is() -> None:
    assert study(Reports(Noise.NORMAL, 0.1, 50, 100)).found >= 0.85
    assert study(Reports(Noise.NORMAL, 0.1, 2, 100)).found >= 0.75  # of a rate of 85 %, fewer come once in a hundred
