"""What windows of load prove: growth by arithmetic, verdicts by bounds."""

import math

import numpy as np
import pytest
from scipy import stats

from harness.analysis.bursts import Requirement
from harness.analysis.capacity import (
    GROWTH,
    Check,
    RateRequirement,
    Seen,
    Span,
    Window,
    _bounding_growth,
    judge_rate,
    more_windows,
    observe,
    rate_trials,
    served_per_s,
)
from harness.analysis.ratesets import bracket_of
from harness.analysis.slo import Op, Status
from harness.sample import Endpoint
from harness.search import capacity_ladder

REQUIREMENT = RateRequirement(Requirement(Endpoint.CREATE, Op.LT, 300.0, 0.05))
RATE = 100.0
SPAN = Span(lead_s=1.0, window_s=4.0)


def instants(seconds: list[float]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return (np.array(seconds) * 1e9).round().astype(np.int64)


def seen(*looks: tuple[float, float, float]) -> Seen:
    at, depth, age = (list(column) for column in zip(*looks, strict=True))
    return Seen(instants(at), np.array(depth), np.array(age))


def window(latency_ms: float = 10.0, *, slow: int = 0, failed: int = 0, late: int = 0, **growth: float) -> Window:
    latency = np.full(400, latency_ms)
    latency[:slow] = 1_000.0
    latency[slow : slow + failed] = np.inf
    told = dict.fromkeys(GROWTH, 0.0) | {Check(name): value for name, value in growth.items()}
    return Window(latency, told, 0.0, 0.0, (400 - failed) / 4.0, 500, late, 1.0)


def test_a_window_counts_what_is_due_after_the_lead_and_grows_by_what_is_under_way() -> None:
    due = instants([0.0, 0.5, 1.5, 2.0, 4.0, 4.9])
    sent = due.copy()
    sent[3] += 60_000_000
    done = instants([1.2, 0.6, 1.6, 2.2, 5.5, 6.0])
    ok = np.array([True, True, True, True, True, False])
    looks = seen((0.5, 9.0, 9.0), (1.0, 2.0, 0.1), (3.0, math.nan, math.nan), (5.0, 42.0, 0.5), (6.0, 99.0, 9.0))
    found = observe(due, sent, done, ok, looks, SPAN, 10.0)
    assert found.latency.tolist() == [100.0, 200.0, 1500.0, math.inf]
    # One is under way when the window begins and two when it ends; 40 are expected within.
    assert found.growth == pytest.approx({Check.UNDER_WAY: 1 / 40, Check.DEPTH: 40 / (4.0 * 10.0), Check.AGE: 0.1})
    assert (found.depth_max, found.age_s_max) == (42.0, 0.5)
    assert (found.sent, found.late, found.lag_ms_max) == (6, 1, 60.0)
    assert found.served_per_s == 3 / 4.0  # the first is answered within the window, though it was due before


def test_looks_that_are_too_close_or_too_late_tell_no_growth() -> None:
    due = instants([0.0, 2.0])
    for looks in (seen((1.0, 0.0, 0.0), (2.9, 5.0, 1.0)), seen((1.0, 0.0, 0.0), (5.3, 5.0, 1.0))):
        found = observe(due, due, due, np.array([True, True]), looks, SPAN, RATE)
        assert math.isnan(found.growth[Check.DEPTH])
        assert math.isnan(found.growth[Check.AGE])


def test_what_was_never_sent_is_failed_and_not_under_way() -> None:
    due = instants([0.0, 2.0])
    unknown = np.array([0, -1])
    found = observe(due, unknown, unknown, np.array([True, False]), seen((1.0, 0.0, 0.0)), SPAN, RATE)
    assert found.latency.tolist() == [math.inf]
    assert found.growth[Check.UNDER_WAY] == 0.0
    assert (found.sent, found.late) == (1, 0)


@pytest.mark.parametrize(
    ("made", "status", "check"),
    [
        (window(), Status.PASS, None),
        (window(slow=80), Status.FAIL, Check.LATENCY),
        (window(failed=12), Status.FAIL, Check.ERRORS),
        (window(under_way=0.2), Status.FAIL, Check.UNDER_WAY),
        (window(depth=0.2), Status.FAIL, Check.DEPTH),
        (window(age=0.2), Status.FAIL, Check.AGE),
        (window(depth=0.05), Status.INCONCLUSIVE, Check.DEPTH),
    ],
)
def test_a_rate_passes_only_if_latency_errors_and_queues_all_do(
    made: Window, status: Status, check: Check | None
) -> None:
    verdict = judge_rate([made] * 10, REQUIREMENT, RATE, SPAN.window_s, 10)
    assert verdict.status is status
    others = {each: finding.status for each, finding in verdict.findings.items() if each is not check}
    assert set(others.values()) == {Status.PASS}
    if check is not None:
        assert verdict.findings[check].status is status


def test_a_target_that_tells_no_queue_is_judged_by_its_requests() -> None:
    silent = window(depth=math.nan, age=math.nan)
    verdict = judge_rate([silent] * 10, REQUIREMENT, RATE, SPAN.window_s, 10)
    assert verdict.status is Status.PASS
    assert verdict.findings[Check.DEPTH].status is Status.NOT_APPLICABLE


def test_a_queue_that_was_told_in_too_few_windows_proves_nothing() -> None:
    mixed = [window()] * 9 + [window(depth=math.nan)]
    verdict = judge_rate(mixed, REQUIREMENT, RATE, SPAN.window_s, 10)
    assert (verdict.status, verdict.findings[Check.DEPTH].status) == (Status.INCONCLUSIVE, Status.INCONCLUSIVE)


def test_a_generator_that_was_late_is_never_the_services_failure() -> None:
    verdict = judge_rate([window(slow=200, late=10)] * 10, REQUIREMENT, RATE, SPAN.window_s, 10)
    assert (verdict.invalid, verdict.status) == (True, Status.INCONCLUSIVE)
    ladder = capacity_ladder(10.0, 1_000.0)
    good = judge_rate([window()] * 10, REQUIREMENT, RATE, SPAN.window_s, 10)
    # 20/s was late: what lies below it is still searched, nothing above it is.
    tried = {100: good, 200: verdict}
    for level in (125, 150, 175):
        assert bracket_of(ladder, tried).next_level == level
        tried[level] = good
    bracket = bracket_of(ladder, tried)
    assert (bracket.highest_pass, bracket.lowest_fail, bracket.next_level) == (175, None, None)


def test_between_two_looks_nothing_is_settled() -> None:
    assert judge_rate([window()] * 11, REQUIREMENT, RATE, SPAN.window_s, 20).status is Status.INCONCLUSIVE


def test_low_rates_get_more_trials() -> None:
    assert [rate_trials(rate, 4.0, 20) for rate in (2.0, 10.0, 100.0)] == [150, 30, 20]


def test_an_open_rate_says_how_many_trials_would_settle_it() -> None:
    random = np.random.default_rng(1)
    open_ones = [window(depth=float(value)) for value in random.normal(0.04, 0.03, 10)]
    more = more_windows(open_ones, REQUIREMENT, RATE, SPAN.window_s, 10)
    assert more is not None
    assert 5 < more < 400
    assert more_windows([window()] * 10, REQUIREMENT, RATE, SPAN.window_s, 10) is None


def test_the_lower_bound_of_what_is_served_is_students() -> None:
    windows = [window(failed=count) for count in (0, 4, 8)]
    mean, lower = served_per_s(windows)
    assert mean == 99.0
    assert lower == pytest.approx(99.0 - 2.919986 * 1.0 / math.sqrt(3))


def test_a_long_tail_of_growth_raises_the_upper_bound_and_leaves_the_lower_one() -> None:
    """Ten trials of one mean and one spread, with the tail on either side."""
    tailed = np.array([0.0] * 9 + [0.3])
    mirrored = 2.0 * tailed.mean() - tailed
    value, lower, upper = _bounding_growth(tailed, 0.0)(10, 0.025)
    same_value, same_lower, plain_upper = _bounding_growth(mirrored, 0.0)(10, 0.025)
    assert (same_value, same_lower) == pytest.approx((value, lower))
    t, error = stats.t.ppf(0.975, 9), 0.03  # spread 0.3 / sqrt(10), over sqrt(10)
    assert plain_upper == pytest.approx(0.03 + t * error)
    skew = np.sqrt(10.0)  # of one in ten, without its bias
    assert upper == pytest.approx(0.03 + (t + skew * (1.0 + 2.0 * t * t) / (6.0 * np.sqrt(10.0))) * error)
