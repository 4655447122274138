from __future__ import annotations

import math

import numpy as np
import pytest

from harness.analysis.history import POINTS_MIN, change_points


def test_a_step_is_found_where_it_is_with_its_size() -> None:
    values = 100.0 * np.exp(0.02 * np.random.default_rng(1).standard_normal(60))
    values[40:] *= 1.2
    found = change_points(values)
    assert [change.index for change in found.changes] == [40]
    before, after = np.exp(np.log(values[:40]).mean()), np.exp(np.log(values[40:]).mean())
    assert (found.changes[0].before, found.changes[0].after) == pytest.approx((before, after))
    assert found.changes[0].change == pytest.approx(after / before - 1.0)
    assert found.noise == pytest.approx(0.02, rel=0.4)


def test_one_report_that_is_far_off_is_no_change() -> None:
    values = 100.0 * np.exp(0.02 * np.random.default_rng(2).standard_normal(60))
    values[30] *= 3.0
    assert change_points(values).changes == ()


def test_a_figure_that_never_moves_has_no_change() -> None:
    assert change_points(np.full(30, 7.0)).changes == ()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.ones(POINTS_MIN - 1), "9 reports are too few to tell noise from change: 10 are needed"),
        (np.array([1.0] * 12 + [math.inf]), "a report's figure is no finite number above 0"),
        (np.array([1.0] * 12 + [0.0]), "a report's figure is no finite number above 0"),
    ],
)
def test_a_series_that_tells_nothing_is_refused(
    values: np.ndarray[tuple[int], np.dtype[np.float64]], words: str
) -> None:
    found = change_points(values)
    assert (found.refusal, found.changes, found.noise) == (words, (), None)
