from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from harness.analysis.slo import Status
from harness.errors import ExitCode
from harness.evaluation import BASELINE, load
from harness.sample import Mode
from harness.sampleset import SampleSetError
from tests.harness.synthetic import Plan, write_sample_set

SLOS = Path(__file__).parents[2] / "data" / "slo.yaml"


def test_without_paths_the_newest_set_of_the_checkout_is_read_from_within_its_notebooks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_sample_set(tmp_path / "data" / "samples", Plan(runs=5, measurement_id="older"))
    written.rename(written.with_name("20250101T000000Z-smoke-older"))
    write_sample_set(tmp_path / "data" / "samples", Plan(runs=5, measurement_id="newer"))
    shutil.copy(SLOS, tmp_path / "data" / "slo.yaml")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert load().measurement_ids == ("newer",)


def test_a_baseline_that_nobody_measured_yet_compares_nothing_and_any_other_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_sample_set(tmp_path / "data" / "samples", Plan(runs=5))
    monkeypatch.chdir(tmp_path)
    assert load([path], SLOS, baseline=str(BASELINE)).baseline is None
    with pytest.raises(SampleSetError, match=r"data/baselines/other does not exist"):
        load([path], SLOS, baseline="data/baselines/other")
    write_sample_set(BASELINE, Plan(runs=5, measurement_id="older"))
    found = load([path], SLOS, baseline=str(BASELINE)).baseline
    assert found is not None
    assert [manifest.measurement_id for manifest in found.manifests] == ["older"]


def test_a_truncated_file_is_refused_with_its_name(tmp_path: Path) -> None:
    path = write_sample_set(tmp_path)
    file = path / "runs.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SampleSetError, match=r"runs\.parquet") as refusal:
        load([path], SLOS)
    assert refusal.value.exit_code is ExitCode.INVALID


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    path = write_sample_set(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    (path / "manifest.json").write_text(json.dumps(manifest | {"mode": "smoek"}), encoding="utf-8")
    with pytest.raises(SampleSetError, match="its mode is 'smoek', this program knows smoke, burst"):
        load([path], SLOS)


def test_a_set_of_no_rows_leaves_every_promise_open(tmp_path: Path) -> None:
    found = load(
        [write_sample_set(tmp_path, Plan(runs=1), [lambda rows: rows.samples.clear()], {"planned_requests": 0})]
    )
    assert (found.findings, found.exit_code) == ((), ExitCode.INCONCLUSIVE)


def test_an_open_loop_is_judged_by_what_any_steady_load_must_meet(tmp_path: Path) -> None:
    found = load([write_sample_set(tmp_path, Plan(mode=Mode.OPEN, runs=200))], SLOS)
    assert found.findings == ()
    assert {each.name: each.verdict for each in found.verdicts if each.mode is Mode.OPEN} == {
        "create-mean": Status.PASS,
        "spawn-mean": Status.PASS,
        "snapshot-p95": Status.PASS,
        "no-failed-responses": Status.PASS,
    }
    assert found.exit_code is ExitCode.PASSED
