"""The fast share of `make calibrate` on intervals and on verdicts at a target; seeded, so always the same."""

import pytest

from tests.calibration.quantile_study import Cell, cover, judge_at_target
from tests.calibration.series_world import QUANTILES, Series, Tail


@pytest.mark.parametrize("tail", [Tail.LIGHT, Tail.BIMODAL])
def test_an_interval_that_is_given_covers_as_often_as_it_says(tail: Tail) -> None:
    for found in cover(Cell(Series(tail, 0.5), 2_000, 120)):
        assert found.is_carried
        assert found.share >= 0.9  # at 93 % fewer come once in eleven times, at 90 % and below far more often


def test_an_interval_that_the_sample_cannot_carry_is_refused() -> None:
    found = cover(Cell(Series(Tail.LIGHT, 0.9), 1_000, 100))
    assert [(one.q, one.answered) for one in found] == [(q, 0) for q in QUANTILES]


@pytest.mark.parametrize("rho", [0.5, 0.8])
def test_a_p95_at_its_target_passes_seldom_when_requests_come_in_waves(rho: float) -> None:
    for found in judge_at_target(Cell(Series(Tail.WAVES, rho), 320, 200)):
        assert found.false_pass <= 0.09  # 200 trials of a rate of 5 % show more than 18 once in a hundred
        assert found.false_fail <= 0.09
        assert found.independent > 0.12  # the comparison is one that could be lost
