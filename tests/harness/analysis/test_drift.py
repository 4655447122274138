from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from harness.analysis.dependence import Floats
from harness.analysis.drift import MINUTES_MIN, _understated, judge_drift, minute_medians, minutes_needed
from harness.analysis.slo import Status
from harness.sample import Outcome

MINUTE_NS = 60_000_000_000


def rows(per_minute: list[list[float]], failed: frozenset[int] = frozenset()) -> pd.DataFrame:
    """Return requests with the given latencies in each minute, evenly spaced; those of `failed` minutes failed."""
    made = [
        {
            "intended_at_ns": 7_000 + minute * MINUTE_NS + place * MINUTE_NS // max(len(latencies), 1),
            "sent_at_ns": None,
            "done_at_ns": None,
            "latency_ms": latency,
            "service_ms": latency,
            "outcome": (Outcome.TIMEOUT if minute in failed else Outcome.OK).value,
        }
        for minute, latencies in enumerate(per_minute)
        for place, latency in enumerate(latencies)
    ]
    frame = pd.DataFrame(made)
    return frame.astype(dict.fromkeys(("intended_at_ns", "sent_at_ns", "done_at_ns"), "Int64"))


def noisy(minutes: int, change: float, noise: float, seed: int = 1) -> Floats:
    """Return medians around a line that changes by `change` from start to end."""
    at = (np.arange(minutes) + 0.5) / minutes
    random = np.random.default_rng(seed)
    return np.asarray(20.0 * (1.0 + change) ** at * np.exp(noise * random.standard_normal(minutes)), dtype=np.float64)


def test_a_minute_has_the_median_of_its_requests_and_the_last_one_is_cut_off() -> None:
    found = minute_medians(rows([[3.0, 1.0, 2.0], [5.0, 4.0], [], [9.0], [7.0]]))
    assert found.tolist()[:2] == [2.0, 4.0]
    assert [math.isnan(found[2]), found[3], len(found)] == [True, 9.0, 4]


def test_a_minute_in_which_half_of_the_requests_failed_and_more_has_no_finite_median() -> None:
    assert minute_medians(rows([[1.0, 2.0], [1.0], [2.0]], frozenset({1}))).tolist() == [1.0, math.inf]


def test_no_request_gives_no_minute() -> None:
    assert minute_medians(rows([[1.0]]).iloc[:0]).tolist() == []


def test_a_still_soak_is_shown_to_hold_still() -> None:
    found = judge_drift(noisy(90, 0.0, 0.01), 0.05)
    assert (found.status, found.minutes, found.bins, found.more_minutes) == (Status.PASS, 90, 9, None)
    assert found.lower is not None
    assert found.upper is not None
    assert -0.05 < found.lower < found.upper < 0.05
    assert "within the margin of 5 %" in found.reason


@pytest.mark.parametrize("change", [0.2, -0.2])
def test_a_drift_beyond_the_margin_fails_in_either_direction(change: float) -> None:
    found = judge_drift(noisy(90, change, 0.01), 0.05)
    assert found.status is Status.FAIL
    assert found.change == pytest.approx(change, abs=0.02)
    assert found.change_robust == pytest.approx(change, abs=0.02)


def test_too_much_noise_leaves_it_open_and_asks_for_minutes() -> None:
    found = judge_drift(noisy(90, 0.0, 0.15), 0.05)
    assert found.status is Status.INCONCLUSIVE
    assert found.more_minutes is not None
    assert found.more_minutes > 90


def test_the_bounds_of_independent_minutes_are_those_of_a_line_through_the_logarithms_of_nine_bins() -> None:
    # Every other minute above the line and below: neighbours do not resemble each other, so nothing is widened.
    at = (np.arange(90) + 0.5) / 90
    wave = np.sin(np.arange(90) * 2.5) * 0.01 + np.repeat(np.random.default_rng(2).normal(0.0, 0.004, 9), 10)
    medians = np.exp(3.0 + 0.01 * at + wave)
    found = judge_drift(medians, 0.05)
    assert (found.correlation, found.bins) == (0.0, 9)
    means = np.log(medians).reshape(9, 10).mean(axis=1)
    middles = at.reshape(9, 10).mean(axis=1)
    apart = middles - middles.mean()
    slope = float((apart * means).sum() / (apart**2).sum())
    residuals = means - means.mean() - slope * apart
    error = math.sqrt(float((residuals**2).sum()) / 7 / float((apart**2).sum()))
    half = 1.894579 * error  # Student's t, 7 degrees of freedom, 95 %, from a printed table
    expected = [math.expm1(value) for value in (slope, slope - half, slope + half)]
    assert [found.change, found.lower, found.upper] == pytest.approx(expected, rel=1e-6)


def test_resembling_minutes_widen_the_bounds_and_are_put_in_six_bins() -> None:
    random = np.random.default_rng(3)
    noise = np.zeros(90)
    for minute in range(1, 90):
        noise[minute] = 0.9 * noise[minute - 1] + random.standard_normal()
    found = judge_drift(np.exp(3.0 + 0.005 * noise), 0.05)
    assert found.bins == 6
    assert found.correlation is not None
    assert found.correlation > 0.6
    assert found.upper is not None
    assert found.change is not None
    at, logs = (np.arange(90) + 0.5) / 90, 3.0 + 0.005 * noise
    fit = stats.linregress(at.reshape(6, 15).mean(axis=1), logs.reshape(6, 15).mean(axis=1))
    assert found.change == pytest.approx(math.expm1(fit.slope))
    assert math.log1p(found.upper) - fit.slope > stats.t.ppf(0.95, 4) * fit.stderr


def test_a_soak_too_short_is_refused_with_the_minutes_it_lacks() -> None:
    found = judge_drift(noisy(30, 0.0, 0.01), 0.05)
    assert (found.status, found.more_minutes, found.change) == (Status.INCONCLUSIVE, MINUTES_MIN - 30, None)
    assert found.reason == "30 whole minutes prove no drift and none: 80 are needed."


@pytest.mark.parametrize(
    ("minutes", "value", "status", "words"),
    [
        (slice(40, 43), math.inf, Status.FAIL, "In 3 of 90 minutes at least half of the requests failed"),
        (slice(None), math.inf, Status.INCONCLUSIVE, "there is no level to compare"),
        (slice(10, 30), math.nan, Status.INCONCLUSIVE, "20 of 90 minutes hold no request"),
        (slice(5, 6), 0.0, Status.INCONCLUSIVE, "A minute's median is 0 ms"),
    ],
)
def test_minutes_that_no_line_can_be_laid_through(minutes: slice, value: float, status: Status, words: str) -> None:
    medians = noisy(90, 0.0, 0.01)
    medians[minutes] = value
    found = judge_drift(medians, 0.05)
    assert (found.status, found.change) == (status, None)
    assert words in found.reason


def test_a_few_minutes_without_a_request_are_left_out() -> None:
    medians = noisy(90, 0.0, 0.01)
    medians[[4, 50]] = math.nan
    assert judge_drift(medians, 0.05).status is Status.PASS


def test_a_soak_of_one_value_holds_still() -> None:
    found = judge_drift(np.full(90, 12.0), 0.05)
    expected = dataclasses.replace(found, status=Status.PASS, change=0.0, lower=0.0, upper=0.0, change_robust=0.0)
    assert found == expected


def test_a_margin_that_is_no_share_is_refused() -> None:
    with pytest.raises(ValueError, match="a margin lies between 0 and 1, not 5"):
        judge_drift(noisy(90, 0.0, 0.01), 5.0)


def test_the_minutes_needed_grow_with_the_square_of_the_noise_until_a_week() -> None:
    # 12 * 0.05^2 * ((1.894579 + 1.644854) / ln 1.05)^2 = 157.9, by hand.
    assert minutes_needed(0.05, 0.0, 0.05) == 158
    assert minutes_needed(0.1, 0.0, 0.05) == 632
    assert minutes_needed(0.001, 0.0, 0.05) == MINUTES_MIN
    assert minutes_needed(0.5, 0.5, 0.05) is None


def test_bins_of_resembling_minutes_understate_the_error_as_the_autoregression_says() -> None:
    minutes = np.abs(np.subtract.outer(np.arange(90), np.arange(90)))
    average = np.kron(np.eye(6), np.full(15, 1 / 15))
    covariance = average @ 0.8**minutes @ average.T
    middles = (np.arange(6) - 2.5) / 6
    weights = middles / (middles @ middles)
    design = np.column_stack([np.ones(6), middles])
    leftover = np.eye(6) - design @ np.linalg.pinv(design)
    shown = np.trace(leftover @ covariance) / 4 / (middles @ middles)
    assert _understated(15.0, 6, 0.8) == pytest.approx(math.sqrt(weights @ covariance @ weights / shown))
    assert _understated(15.0, 6, 0.0) == 1.0


def test_a_week_of_minutes_is_judged_without_pairing_all_of_them() -> None:
    found = judge_drift(noisy(10_000, 0.0, 0.05), 0.05)
    assert (found.status, found.minutes) == (Status.PASS, 10_000)
    assert found.change_robust == pytest.approx(0.0, abs=0.02)
