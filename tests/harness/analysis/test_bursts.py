"""What trials at one burst size prove. How often it is wrong: tests/calibration."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest

from harness.analysis.bursts import (
    ALPHA,
    COLUMNS,
    LevelVerdict,
    Look,
    Requirement,
    judge,
    level_table,
    looks,
    more_trials,
    requests_of,
    trials_at,
)
from harness.analysis.dependence import Floats
from harness.analysis.slo import Op, Status
from harness.sample import Endpoint

CREATE = Requirement(Endpoint.CREATE, Op.LT, 300.0, 0.05)


def even(trials: int, burst: int, slowest_ms: float) -> Floats:
    """Bursts that are all alike: their requests end at even distances up to `slowest_ms`."""
    return np.tile(np.linspace(slowest_ms / burst, slowest_ms, burst), (trials, 1))


@pytest.mark.parametrize(
    ("trials", "expected"),
    [
        (10, [Look(10, 0.025, 0.025)]),
        (19, [Look(19, 0.025, 0.025)]),
        (20, [Look(10, 0.005, 0.005), Look(20, 0.02, 0.02)]),
        (50, [Look(10, 0.0, 0.005 / 3), Look(20, 0.0, 0.005 / 3), Look(25, 0.005, 0.005 / 3), Look(50, 0.02, 0.02)]),
    ],
)
def test_a_level_may_fail_early_and_pass_halfway_and_its_errors_add_up(trials: int, expected: list[Look]) -> None:
    found = looks(trials)
    assert list(found) == [
        Look(one.trials, pytest.approx(one.alpha_pass), pytest.approx(one.alpha_fail))  # type: ignore[arg-type]
        for one in expected
    ]
    assert sum(look.alpha_pass for look in found) == pytest.approx(ALPHA)
    assert sum(look.alpha_fail for look in found) == pytest.approx(ALPHA)


def test_fewer_than_ten_trials_prove_nothing() -> None:
    with pytest.raises(ValueError, match="9 trials prove nothing: at least 10 are needed"):
        looks(9)


def test_a_small_burst_gets_more_trials_so_that_they_hold_enough_requests() -> None:
    assert [trials_at(level, 20) for level in (1, 8, 31, 32, 500)] == [640, 80, 21, 20, 20]
    assert trials_at(8, 100) == 100


def test_clearly_fast_bursts_pass_after_ten_trials_and_clearly_slow_ones_fail() -> None:
    assert judge(even(10, 100, 200.0), CREATE, 20).status is Status.PASS
    assert judge(even(10, 100, 600.0), CREATE, 20).status is Status.FAIL


def test_a_share_at_its_limit_is_open_and_no_number_of_trials_is_promised() -> None:
    latency = even(20, 100, 300.0 * 100 / 95.5)
    verdict = judge(latency, CREATE, 20)
    assert (verdict.status, verdict.share) == (Status.INCONCLUSIVE, 0.05)
    assert more_trials(latency, CREATE, 20) is None


def test_an_open_level_says_how_many_trials_more_would_settle_it() -> None:
    random = np.random.default_rng(1)
    latency = even(20, 100, 305.0) * np.exp(0.1 * random.standard_normal((20, 1)))
    assert judge(latency, CREATE, 20).status is Status.INCONCLUSIVE
    more = more_trials(latency, CREATE, 20)
    assert more is not None
    again = np.tile(latency, (1 + math.ceil(more / 20), 1))
    assert judge(again, CREATE, len(again)).status is not Status.INCONCLUSIVE


def test_after_a_number_of_trials_at_which_nobody_looks_the_answer_is_open() -> None:
    assert judge(even(11, 100, 200.0), CREATE, 20).status is Status.INCONCLUSIVE


def test_requests_that_share_the_fate_of_their_burst_are_worth_few() -> None:
    alike, torn = np.full((20, 100), 100.0), np.full((20, 100), 100.0)
    alike[:, :2] = 400.0  # two slow requests in every burst
    torn[:1, :40] = 400.0  # forty in one burst
    settled = judge(alike, CREATE, 20)
    assert (settled.lower, settled.upper) == pytest.approx((0.0138, 0.0278), abs=1e-3)
    assert settled == LevelVerdict(Status.PASS, 0.02, settled.lower, settled.upper, 20, 2000.0)
    verdict = judge(torn, CREATE, 20)
    assert (verdict.status, verdict.share) == (Status.INCONCLUSIVE, 0.02)
    assert verdict.effective < 100.0


def test_fast_requests_are_worth_few_too_where_their_tail_came_from_few_bursts() -> None:
    """Nothing was slow in either; but in the second, two bursts came near the limit together."""
    calm = np.full((20, 40), 100.0)
    calm[:, 0] = 290.0
    stormy = np.full((20, 40), 100.0)
    stormy[:2, :20] = 290.0
    assert judge(calm, CREATE, 20).status is Status.PASS
    assert judge(stormy, CREATE, 20).status is Status.INCONCLUSIVE


def test_a_large_spread_far_below_the_limit_is_no_reason_for_doubt() -> None:
    random = np.random.default_rng(2)
    spread = np.exp(0.5 * random.standard_normal((20, 1)))
    assert judge(even(20, 32, 10.0) * spread, CREATE, 20).status is Status.PASS
    assert judge(even(20, 32, 150.0) * spread, CREATE, 20).status is Status.INCONCLUSIVE


def test_failures_are_slow() -> None:
    latency = even(20, 100, 100.0)
    latency[:, :10] = np.inf
    verdict = judge(latency, CREATE, 20)
    assert (verdict.status, verdict.share) == (Status.FAIL, 0.1)


@pytest.mark.parametrize(("op", "slow"), [(Op.LT, [False, True, True]), (Op.LTE, [False, False, True])])
def test_a_latency_at_the_limit_is_slow_where_it_must_lie_below(op: Op, slow: list[bool]) -> None:
    requirement = Requirement(Endpoint.SPAWN, op, 200.0, 0.05)
    assert requirement.is_slow(np.array([199.9, 200.0, np.inf])).tolist() == slow
    assert requirement.words == f"p95 {op.sign} 200 ms"


def rows(
    endpoint: str,
    level: int,
    trial: int,
    latency_ms: Sequence[float | None],
    outcome: str = "ok",
    at_ns: int = 1_000_000,
) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "endpoint": endpoint,
            "level": float(level),
            "trial": trial,
            "latency_ms": pd.array(latency_ms, dtype="Float64"),
            "outcome": outcome,
            "intended_at_ns": pd.array([at_ns] * len(latency_ms), dtype="Int64"),
            "done_at_ns": pd.array([at_ns + 800_000] * len(latency_ms), dtype="Int64"),
            "sent_at_ns": pd.array([at_ns + 500_000] * len(latency_ms), dtype="Int64"),
        }
    )
    return frame.astype({"endpoint": "string", "outcome": "string", "level": "Float64"})


def test_requests_are_sorted_into_trials_and_a_trial_cut_short_is_left_out() -> None:
    samples = pd.concat(
        [
            rows("create", 2, 1, [3.0, 4.0]),
            rows("create", 2, 0, [1.0, 2.0]),
            rows("create", 2, 2, [9.0]),  # the harness was ended within it
            rows("create", 3, 0, [7.0, 7.0, 7.0]),
            rows("spawn", 2, 0, [8.0, 8.0]),
            rows("create", 2, 3, [5.0, None], outcome="timeout"),
        ]
    )
    expected = np.array([[1.0, 2.0], [3.0, 4.0], [np.inf, np.inf]])
    np.testing.assert_array_equal(requests_of(samples, Endpoint.CREATE, 2), expected)


def test_the_table_has_a_row_for_each_level_with_its_bounds_and_the_queue_that_it_left() -> None:
    fast = [rows("create", 40, trial, [10.0] * 39 + [20.0]) for trial in range(10)]
    lost = [rows("create", 80, trial, [None] * 80, outcome="timeout", at_ns=9_000_000) for trial in range(10)]
    resources = pd.DataFrame(
        {
            "at_ns": [500_000, 2_000_000, 8_000_000, 9_900_000],  # only the first after a burst says what it left
            "queue_depth": pd.array([99.0, 7.0, 3.0, None], dtype="Float64"),
            "oldest_due_tick_s": pd.array([9.0, 0.25, 0.5, None], dtype="Float64"),
        }
    )
    table = level_table(pd.concat([*lost, *fast]), resources, [CREATE], 20)
    assert tuple(table.columns) == COLUMNS
    first, second = table.to_dict("records")
    assert first == {
        "endpoint": "create",
        "level": 40,
        "verdict": "PASS",
        "trials": 10,
        "requests": 400,
        "failed": 0,
        "slow": 0,
        "slow_share": 0.0,
        "slow_share_lower": 0.0,
        "slow_share_upper": pytest.approx(0.0132, abs=1e-4),
        "effective_requests": 400.0,
        "latency_ms_p50": 10.0,
        "latency_ms_p95": 10.0,
        "latency_ms_max": 20.0,
        "send_lag_ms_max": 0.5,
        "served_per_s": 2000.0,
        "queue_depth_max": 7.0,
        "oldest_due_tick_s_max": 0.25,
        "more_trials": None,
    }
    assert (second["level"], second["verdict"], second["failed"]) == (80, "FAIL", 800)
    assert all(math.isnan(second[name]) for name in ("latency_ms_p95", "served_per_s", "queue_depth_max"))


def test_a_table_of_nothing_has_its_columns() -> None:
    none = rows("create", 8, 0, []), pd.DataFrame({"at_ns": [], "queue_depth": [], "oldest_due_tick_s": []})
    assert tuple(level_table(*none, [CREATE], 20).columns) == COLUMNS
