"""Verdicts on whole synthetic measurements: what is promised, what was measured, what that proves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from harness.analysis.judges import judge_all
from harness.analysis.slo import Interval, Measure, Op, Slo, Statistic, Status, Verdict, overall
from harness.errors import ExitCode
from harness.evaluation import load
from harness.sample import Endpoint, Mode, Outcome
from tests.harness.synthetic import Plan, Rows, Spoil, change, write_sample_set


def verdict(path: Path, name: str, plan: Plan, spoil: Sequence[Spoil] = ()) -> Verdict:
    evaluation = load([write_sample_set(path, plan, spoil)])
    assert evaluation.findings == ()
    promise = next(slo for slo in evaluation.slos if slo.name == name)
    if promise.measure is Measure.LATENCY:  # the judges know every load, whichever the shipped promises name
        promise = msgspec.structs.replace(promise, modes=(plan.mode,))
    return judge_all([promise], evaluation.data)[0]


def fail_some(endpoint: Endpoint, count: int, outcome: Outcome = Outcome.HTTP_ERROR, every: int = 1) -> Spoil:
    """Return a spoil that turns so many requests of an endpoint into failures, one in `every`."""

    def spoil(rows: Rows) -> None:
        places = [index for index, row in enumerate(rows.samples) if row.endpoint is endpoint][::every][:count]
        status = 503 if outcome is Outcome.HTTP_ERROR else None
        for index in places:
            change(index, outcome=outcome, status=status, error="made to fail")(rows)

    return spoil


@pytest.mark.parametrize(
    ("name", "plan", "spoil", "expected"),
    [
        # 64 runs far below 300 ms
        ("create-mean", Plan(), [], Status.PASS),
        # 5 runs are enough for a mean that far below
        ("create-mean", Plan(runs=5), [], Status.PASS),
        # two runs tell nothing of their spread
        ("create-mean", Plan(runs=2), [], Status.INCONCLUSIVE),
        # 64 runs around 900 ms
        ("create-mean", Plan(create_ms=900.0), [], Status.FAIL),
        # 5 runs around the target itself
        ("create-mean", Plan(runs=5, create_ms=290.0), [], Status.INCONCLUSIVE),
        # one create that never succeeded waited without end
        ("create-mean", Plan(), [fail_some(Endpoint.CREATE, 1, Outcome.TIMEOUT)], Status.FAIL),
        # bursts are the unit, and five of them are enough here
        ("create-mean", Plan(mode=Mode.BURST, runs=100, side_by_side=20), [], Status.PASS),
        # 100 runs in two bursts are two units
        ("create-mean", Plan(mode=Mode.BURST, runs=100, side_by_side=50), [], Status.INCONCLUSIVE),
        ("spawn-mean", Plan(), [], Status.PASS),
        ("spawn-mean", Plan(children=3), [], Status.PASS),
        ("spawn-mean", Plan(spawn_ms=700.0), [], Status.FAIL),
        # the load had no children, though its mode is there
        ("spawn-mean", Plan(children=0), [], Status.INCONCLUSIVE),
        # 128 polls without a slow one
        ("snapshot-p95", Plan(), [], Status.PASS),
        # 10 polls without a slow one prove nothing about 5 %
        ("snapshot-p95", Plan(runs=5), [], Status.INCONCLUSIVE),
        ("snapshot-p95", Plan(snapshot_ms=700.0), [], Status.FAIL),
        # a fifth of the polls failed, all along: slower than any target
        ("snapshot-p95", Plan(), [fail_some(Endpoint.SNAPSHOT, 26, every=5)], Status.FAIL),
        # as many in one go may have been one event
        ("snapshot-p95", Plan(), [fail_some(Endpoint.SNAPSHOT, 26)], Status.INCONCLUSIVE),
        # ten of ten polls were slow: few, and yet proof
        ("snapshot-p95", Plan(runs=5, snapshot_ms=1000.0), [], Status.FAIL),
        ("no-failed-responses", Plan(runs=5), [], Status.PASS),
        ("no-failed-responses", Plan(), [fail_some(Endpoint.SNAPSHOT, 1)], Status.FAIL),
        ("no-failed-responses", Plan(), [fail_some(Endpoint.CREATE, 1, Outcome.CONNECTION_ERROR)], Status.FAIL),
        # 500 requests without an error bound their share below 1 %
        ("burst-errors", Plan(mode=Mode.BURST, runs=100, children=2, side_by_side=20), [], Status.PASS),
        # 200 do not
        ("burst-errors", Plan(mode=Mode.BURST, runs=40, children=2, side_by_side=20), [], Status.INCONCLUSIVE),
        (
            "burst-errors",
            Plan(mode=Mode.BURST, runs=100, children=2, side_by_side=20),
            [fail_some(Endpoint.SPAWN, 60)],
            Status.FAIL,
        ),
        # an open loop meets or misses what any steady load does
        ("create-mean", Plan(mode=Mode.OPEN), [], Status.PASS),
        ("snapshot-p95", Plan(mode=Mode.OPEN, runs=200), [], Status.PASS),
        ("spawn-mean", Plan(mode=Mode.OPEN, spawn_ms=500.0), [], Status.FAIL),
        ("no-failed-responses", Plan(mode=Mode.OPEN), [fail_some(Endpoint.CREATE, 1)], Status.FAIL),
        # a search for limits goes beyond them on purpose
        ("no-failed-responses", Plan(mode=Mode.CAPACITY), [], Status.NOT_APPLICABLE),
        # smoke samples do not hold the burst plan
        ("burst-errors", Plan(), [], Status.NOT_APPLICABLE),
        ("burst-completion", Plan(), [], Status.NOT_APPLICABLE),
    ],
)
def test_verdicts(tmp_path: Path, name: str, plan: Plan, spoil: list[Spoil], expected: Status) -> None:
    assert verdict(tmp_path, name, plan, spoil).verdict is expected


def test_an_open_p95_says_how_many_polls_would_settle_it(tmp_path: Path) -> None:
    found = verdict(tmp_path, "snapshot-p95", Plan(runs=5))
    assert found == Verdict(
        name="snapshot-p95", title="Snapshot poll", mode=Mode.SMOKE, verdict=Status.INCONCLUSIVE,
        statistic=Statistic.P95, requirement="p95 < 375 ms", target=375.0, margin=0.0, unit="ms",
        measured=found.measured,
        interval=Interval("share of slow snapshot requests", "share", 0.0, 0.0, 0.258866, 0.05),
        sample_size=10, sample_unit="snapshot requests", effective_size=10.0,
        reason=(
            "0 of 10 snapshot requests took 375 ms or longer; at an effective sample size of 10, the share of slow "
            "requests is between 0 % and 25.9 % with 95 % confidence, and 5 % are allowed. 49 more snapshot requests "
            "like these would settle it: 30 runs of this load instead of 5, --runs 30 (make report REPORT_RUNS=30)."
        ),
        more_needed=49, shown={},
    )  # fmt: skip


def test_a_failed_create_leaves_the_mean_without_a_bound_and_says_so(tmp_path: Path) -> None:
    found = verdict(tmp_path, "create-mean", Plan(), [fail_some(Endpoint.CREATE, 2)])
    assert (found.measured, found.interval, found.sample_size) == (None, None, 64)
    assert found.reason.startswith("2 of 64 requests failed: a request that never succeeded waited without end")


def test_failed_responses_are_counted_by_kind(tmp_path: Path) -> None:
    spoil = [fail_some(Endpoint.CREATE, 1), fail_some(Endpoint.SNAPSHOT, 2, Outcome.TIMEOUT)]
    found = verdict(tmp_path, "no-failed-responses", Plan(), spoil)
    assert found.reason == (
        "3 failed responses among 256 requests of this sample, every one counted. http_error 503: 1; timeout: 2."
    )


def test_repetitions_in_sets_of_their_own_are_judged_together(tmp_path: Path) -> None:
    plans = [Plan(runs=5, seed=seed, measurement_id=f"set-{seed}") for seed in range(12)]
    found = load([write_sample_set(tmp_path, plan) for plan in plans])
    sizes = {one.name: (one.verdict, one.sample_size) for one in found.verdicts if one.sample_size}
    assert sizes == {
        "create-mean": (Status.PASS, 60),
        "spawn-mean": (Status.PASS, 60),
        "snapshot-p95": (Status.PASS, 120),
        "tick-throughput": (Status.PASS, 60),
        "no-failed-responses": (Status.PASS, 240),
    }


def test_each_mode_is_judged_on_its_own(tmp_path: Path) -> None:
    smoke = write_sample_set(tmp_path, Plan(measurement_id="one"))
    burst = write_sample_set(tmp_path, Plan(mode=Mode.BURST, runs=60, side_by_side=20, measurement_id="two"))
    found = load([smoke, burst])
    assert [one.mode for one in found.verdicts if one.name == "tick-throughput"] == [Mode.SMOKE, Mode.BURST]


def test_a_margin_moves_the_limit_outwards() -> None:
    below = Slo("a", "A", (Mode.SMOKE,), Measure.LATENCY, Endpoint.CREATE, Statistic.MEAN, Op.LT, 300.0, 0.05)
    above = Slo("b", "B", (Mode.SMOKE,), Measure.TICKS, None, Statistic.PER_BUSY_SECOND, Op.GTE, 5.0, 0.2)
    assert (below.limit, above.limit) == (315.0, 4.0)
    assert (below.requirement, above.requirement) == ("mean < 300 ms (margin 5 %)", "ticks ≥ 5/s (margin 20 %)")


@pytest.mark.parametrize(
    ("statuses", "valid", "expected"),
    [
        ([Status.PASS, Status.NOT_APPLICABLE], True, ExitCode.PASSED),
        ([Status.PASS, Status.INCONCLUSIVE], True, ExitCode.INCONCLUSIVE),
        ([Status.INCONCLUSIVE, Status.FAIL], True, ExitCode.SLO_FAILED),
        ([Status.NOT_APPLICABLE], True, ExitCode.INCONCLUSIVE),
        ([], True, ExitCode.INCONCLUSIVE),
        ([Status.FAIL], False, ExitCode.INVALID),
    ],
)
def test_the_first_that_holds_gives_the_exit_code(
    any_verdict: Verdict, statuses: list[Status], valid: bool, expected: ExitCode
) -> None:
    verdicts = [msgspec.structs.replace(any_verdict, verdict=status) for status in statuses]
    assert overall(verdicts, valid=valid) is expected


@pytest.fixture
def any_verdict(tmp_path: Path) -> Verdict:
    return verdict(tmp_path, "create-mean", Plan(runs=5))


def test_slow_requests_from_an_import_without_intended_times_say_that_they_count_from_sending(tmp_path: Path) -> None:
    def forget_intended(rows: Rows) -> None:
        rows.samples[:] = [dataclasses.replace(row, intended_at_ns=None, latency_ms=None) for row in rows.samples]

    found = verdict(tmp_path, "snapshot-p95", Plan(), [forget_intended])
    assert found.reason.endswith("Latencies are from send; coordinated omission not excluded.")
