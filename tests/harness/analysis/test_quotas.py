from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from harness.analysis.quotas import (
    Throughput,
    differences,
    oversubscription,
    quota_rows,
    revision_bytes,
    revision_of,
    served_per_window,
)
from harness.analysis.slo import Status
from service.quota.limits import Limit
from service.quota.tables import FIRST, Provenance, RateValue, parse

CREATE = Throughput(
    Limit.RUN_CREATION, np.array([1180.0, 1230.0, 1190.0, 1210.0, 1190.0]), np.full(5, 30.0), 25.0, burst_shown=256
)


def test_a_quota_is_a_quarter_of_the_lower_bound_by_hand() -> None:
    (row,) = quota_rows([CREATE], FIRST.default)
    rates = CREATE.served / 30.0
    # Student's t, 4 degrees of freedom, 95 %, from a printed table.
    lower = rates.mean() - 2.131847 * rates.std(ddof=1) / math.sqrt(5)
    assert row.status is Status.PASS
    assert row.throughput_per_s == pytest.approx(40.0)
    assert row.throughput_per_s_lower == pytest.approx(lower)
    assert row.quota_per_s == math.floor(lower * 250) / 1000
    assert row.quota_per_s_observed == pytest.approx(10.0)
    assert row.burst == math.ceil(lower / 4)
    assert row.concurrency == pytest.approx((row.quota_per_s or 0.0) * 0.025)
    assert row.concurrency_capacity == pytest.approx(lower * 0.025)
    assert row.change == pytest.approx((row.quota_per_s or 0.0) / 10.29 - 1)


def test_the_fraction_is_a_parameter() -> None:
    (half,) = quota_rows([CREATE], FIRST.default, fraction=0.5)
    assert half.quota_per_s_observed == pytest.approx(20.0)
    with pytest.raises(ValueError, match="a fraction lies above 0 and at most at 1, not 25"):
        quota_rows([CREATE], FIRST.default, fraction=25)


@pytest.mark.parametrize(
    ("served", "words"),
    [
        ([], "Nothing was served"),
        ([0.0] * 5, "Nothing was served"),
        ([1200.0, 1200.0], "2 trials have no lower bound, 3 are needed"),
        ([1.0, 1.0, 9000.0], "differ so much"),
    ],
)
def test_a_limit_that_was_not_measured_keeps_its_value(served: list[float], words: str) -> None:
    poor = dataclasses.replace(CREATE, served=np.array(served), seconds=np.full(len(served), 30.0))
    (row,) = quota_rows([poor], FIRST.default)
    assert (row.status, row.quota_per_s, row.burst, row.change) == (Status.INCONCLUSIVE, 10.29, 11, None)
    assert words in row.reason
    assert revision_of([row], FIRST, Provenance()).limits == FIRST


def test_a_spawn_s_burst_serves_every_parent_that_may_live() -> None:
    slow = dataclasses.replace(CREATE, limit=Limit.SUBRUN_SPAWN, served=CREATE.served / 10.0)
    (row,) = quota_rows([slow], FIRST.default)
    assert row.burst == 5


@pytest.mark.parametrize(
    ("shown", "burst", "words"),
    [
        # a quarter of the highest burst that met the SLO, so that four tenants fit
        (24, 6, "measured)."),
        # nothing is less than one
        (2, 1, "measured)."),
        # a second's worth, however large a burst was shown
        (4096, 10, "measured)."),
        # without one the value in force
        (None, 11, "what may come at once stays."),
    ],
)
def test_what_may_come_at_once_was_shown_to_be_served(shown: int | None, burst: int, words: str) -> None:
    (row,) = quota_rows([dataclasses.replace(CREATE, burst_shown=shown)], FIRST.default)
    assert (row.status, row.burst, row.reason.endswith(words)) == (Status.PASS, burst, True)


def test_nobody_is_promised_more_than_was_asked_of_the_system() -> None:
    (row,) = quota_rows([dataclasses.replace(CREATE, offered_per_s=20.0)], FIRST.default)
    assert (row.throughput_per_s_lower, row.quota_per_s) == (20.0, 5.0)


def test_the_revision_is_one_that_the_service_reads_and_changes_the_measured_rates_alone() -> None:
    rows = quota_rows([CREATE], FIRST.default)
    file = revision_of(rows, FIRST, Provenance(author="a notebook", samples={"0190-x": "0" * 64}))
    written = revision_bytes(file)
    assert parse(written) == file
    assert revision_bytes(file) == written
    value = RateValue(rows[0].quota_per_s or 0.0, rows[0].burst or 0)
    assert differences(file.limits, FIRST) == {"run_creation": (RateValue(10.29, 11), value)}


@pytest.mark.parametrize(
    ("tenants", "busy_share", "expected"), [(20, 0.05, 0.0026), (50, 0.05, 0.1036), (100, 0.02, 0.0508), (4, 1.0, 0.0)]
)
def test_how_likely_more_than_four_are_busy(tenants: int, busy_share: float, expected: float) -> None:
    found = oversubscription(tenants, busy_share)
    by_hand = 1.0 - sum(math.comb(tenants, k) * busy_share**k * (1 - busy_share) ** (tenants - k) for k in range(5))
    assert found.tenants_carried == 4
    assert found.independent == pytest.approx(expected, abs=1e-4)
    assert found.independent == pytest.approx(by_hand, abs=1e-12)
    assert found.surging >= found.independent


def test_a_common_surge_is_what_independence_leaves_out() -> None:
    found = oversubscription(20, 0.01, surge_share=0.1, surge_busy_share=0.9)
    assert found.independent < 1e-5
    assert found.surging == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize(("tenants", "busy_share"), [(0, 0.1), (5, 1.5), (5, -0.1)])
def test_shares_that_are_none_are_refused(tenants: int, busy_share: float) -> None:
    with pytest.raises(ValueError, match="out of range"):
        oversubscription(tenants, busy_share)


def test_windows_of_one_long_measurement_are_its_trials() -> None:
    done = np.array([0.0, 0.5, 1.2, 2.1, 2.2, 2.9, 3.4]) * 1e9
    served, seconds = served_per_window(done, 1.0)
    assert (served.tolist(), seconds.tolist()) == ([2.0, 1.0, 3.0], [1.0, 1.0, 1.0])
    assert [part.tolist() for part in served_per_window(np.empty(0), 1.0)] == [[], []]
