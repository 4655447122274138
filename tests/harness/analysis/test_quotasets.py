"""From recorded searches to the rows that quotas are made from, on servers that are known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from harness.analysis.quotas import Throughput, quota_rows
from harness.analysis.quotasets import counted, quota_frame, throughputs
from harness.analysis.ratesets import capacities
from harness.analysis.slo import Status
from harness.evaluation import load
from harness.sample import Endpoint
from harness.sampleset import UnreadableFile
from service.quota.limits import RATES, Limit
from service.quota.tables import FIRST
from tests.harness.synthetic_capacity import SPAN, write_capacity
from tests.harness.synthetic_search import write_search

CREATE = {Endpoint.CREATE: 640.0}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a search for capacity of creates and spawns, and one for burst limits of creates."""
    root = tmp_path_factory.mktemp("searched")
    return write_capacity(root, CREATE | {Endpoint.SPAWN: 480.0}, most=800.0), write_search(root)


def by_limit(*paths: Path) -> dict[Limit, Throughput]:
    return {one.limit: one for one in throughputs(load(paths).data)}


def test_every_rate_is_told_in_the_order_of_the_limits_and_why_one_was_not_measured(
    searched: tuple[Path, Path],
) -> None:
    found = by_limit(*searched)
    assert tuple(found) == RATES
    told = {limit: one.absent for limit, one in found.items() if not len(one.served)}
    assert told == {
        Limit.SNAPSHOT_POLL: "No search for its capacity is among these samples",
        Limit.TICK: "No search measures the turns of workers",
    }


def test_a_throughput_is_what_the_highest_passing_rate_s_trials_served(searched: tuple[Path, Path]) -> None:
    data = load(searched).data
    create = by_limit(*searched)[Limit.RUN_CREATION]
    (answer,) = (one for one in capacities(data) if one.requirement.latency.endpoint is Endpoint.CREATE)
    assert answer.highest_pass_per_s is not None
    rows = data.samples[(data.samples["endpoint"] == "create") & (data.samples["level"] == answer.highest_pass_per_s)]
    begins = rows.groupby("trial")["intended_at_ns"].transform("min") + round(SPAN.lead_s * 1e9)
    within = (rows["done_at_ns"] > begins) & (rows["done_at_ns"] <= begins + round(SPAN.window_s * 1e9))
    served = rows[within].groupby("trial").size()
    waited = rows.loc[rows["intended_at_ns"] >= begins, "latency_ms"].mean()
    assert create.served == pytest.approx(served.to_numpy(dtype=np.float64))
    assert create.seconds.tolist() == [SPAN.window_s] * len(served)
    assert create.waited_ms_mean == pytest.approx(waited)
    assert create.offered_per_s == answer.highest_pass_per_s < 640.0
    assert create.burst_shown == 40


def test_a_burst_that_was_not_searched_for_is_none(searched: tuple[Path, Path]) -> None:
    assert by_limit(*searched)[Limit.SUBRUN_SPAWN].burst_shown is None


def test_of_two_searches_the_one_that_showed_less_counts(tmp_path: Path) -> None:
    paths = [
        write_capacity(tmp_path, {Endpoint.CREATE: per_s}, most=800.0, measurement_id=name)
        for name, per_s in (("0190-good", 640.0), ("0191-poor", 300.0))
    ]
    found = counted(load(paths).data)
    assert {limit: one.measurement_id for limit, one in found.items()} == {Limit.RUN_CREATION: "0191-poor"}


def test_a_search_that_showed_nothing_is_the_least_of_all(tmp_path: Path) -> None:
    paths = [
        write_capacity(tmp_path, {Endpoint.CREATE: per_s}, most=200.0, measurement_id=name)
        for name, per_s in (("0190-good", 640.0), ("0191-none", 5.0))
    ]
    create = by_limit(*paths)[Limit.RUN_CREATION]
    assert (len(create.served), create.absent) == (0, "No rate was shown to be sustained")
    (row,) = quota_rows([create], FIRST.default)
    assert (row.status, row.quota_per_s, row.throughput_per_s) == (Status.INCONCLUSIVE, 10.29, None)


def test_of_two_searches_for_bursts_the_smaller_limit_counts_and_none_is_smaller_than_any(tmp_path: Path) -> None:
    capacity = write_capacity(tmp_path, CREATE, most=200.0)
    good = write_search(tmp_path)
    poor = write_search(tmp_path, service_ms=20.0, measurement_id="0191-bursts")
    none = write_search(tmp_path, most=8, service_ms=400.0, measurement_id="0192-bursts")
    shown = [by_limit(capacity, *more)[Limit.RUN_CREATION].burst_shown for more in ((good,), (good, poor))]
    assert shown[0] is not None
    assert shown[1] is not None
    assert shown[1] < shown[0]
    assert by_limit(capacity, good, none)[Limit.RUN_CREATION].burst_shown is None


def test_the_table_holds_what_was_measured_and_nothing_else(searched: tuple[Path, Path]) -> None:
    data = load(searched).data
    rows = quota_rows(throughputs(data), FIRST.default)
    frame = quota_frame(rows, data)
    assert frame["limit"].tolist() == ["run_creation", "subrun_spawn"]
    assert frame["measurement_id"].unique().tolist() == ["0190-capacity-1"]
    assert frame["quota_per_s"].tolist() == [rows[0].quota_per_s, rows[1].quota_per_s]
    assert quota_frame([dataclasses.replace(rows[3])], data).empty


def test_a_search_whose_manifest_forgot_its_question_is_refused(tmp_path: Path) -> None:
    path = write_capacity(tmp_path, CREATE, most=100.0)
    manifest = json.loads((path / "manifest.json").read_bytes())
    del manifest["parameters"]["window_s"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UnreadableFile, match="its parameters are no search for capacity"):
        throughputs(load([path]).data)
