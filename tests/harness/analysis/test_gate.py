"""The regression gate: like is compared with like, and what it finds counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.analysis import regression_shown
from harness.analysis.drawing import Drawing
from harness.analysis.gate import compare, comparison_frame
from harness.analysis.slo import Status
from harness.analysis.validity import Fault
from harness.errors import ExitCode
from harness.evaluation import Evaluation, load
from harness.sample import Mode
from harness.sampleset import NoSampleSet
from tests.harness.synthetic import WALL_NS, Plan, write_sample_set


def side(root: Path, name: str, levels: list[float], *, starts_s: int = 0, **plan: Any) -> list[Path]:
    """Write a measurement for each level; they start two minutes apart."""
    paths = []
    for number, level in enumerate(levels):
        one = Plan(runs=40, measurement_id=f"{name}{number:04d}", seed=hash_of(name) + number, **plan)
        one.create_ms, one.spawn_ms, one.snapshot_ms = 9.0 * level, 7.0 * level, 5.0 * level
        path = write_sample_set(root / name, one)
        manifest = json.loads((path / "manifest.json").read_bytes())
        for end in manifest["clock"].values():
            end["wall_ns"] += (starts_s + 120 * number) * 10**9
        (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        paths.append(path)
    return paths


def hash_of(name: str) -> int:
    return sum(map(ord, name)) * 100


def edit(path: Path, **values: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_bytes())
    for name, value in values.items():
        manifest[name] = manifest[name] | value
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def judged(samples: list[Path], baseline: Path) -> Evaluation:
    return load(samples, baseline=baseline)


def statuses(found: Evaluation) -> dict[str, Status]:
    return {one.name: one.verdict for one in found.verdicts if one.name.startswith("regression-")}


def test_a_candidate_twice_as_slow_fails_although_every_slo_is_met(tmp_path: Path) -> None:
    side(tmp_path, "base", [1.0] * 5)
    found = judged(side(tmp_path, "cand", [2.0] * 3, starts_s=7200), tmp_path / "base")
    assert set(statuses(found).values()) == {Status.FAIL}
    assert {one.verdict for one in found.verdicts if not one.name.startswith("regression-")} == {
        Status.PASS, Status.NOT_APPLICABLE,
    }  # fmt: skip
    assert (len(statuses(found)), found.exit_code) == (6, ExitCode.SLO_FAILED)


def test_a_candidate_half_as_slow_passes(tmp_path: Path) -> None:
    side(tmp_path, "base", [1.0] * 5)
    found = judged(side(tmp_path, "cand", [0.5] * 3, starts_s=7200), tmp_path / "base")
    assert (set(statuses(found).values()), found.exit_code) == ({Status.PASS}, ExitCode.PASSED)


def test_too_few_measurements_are_open_and_say_how_many_more(tmp_path: Path) -> None:
    side(tmp_path, "base", [1.0, 1.0])
    found = judged(side(tmp_path, "cand", [1.0], starts_s=7200), tmp_path / "base")
    assert (set(statuses(found).values()), found.exit_code) == ({Status.INCONCLUSIVE}, ExitCode.INCONCLUSIVE)
    assert all("3 baseline runs and 5 in all are needed" in one.reason for one in found.verdicts[-6:])


def test_measurements_made_in_turn_are_compared_in_pairs_in_the_order_of_their_starts(tmp_path: Path) -> None:
    shared = [1.0, 3.0, 1.5, 2.0, 4.0]  # what both sides met: far more than the margin
    side(tmp_path, "base", shared)
    found = judged(side(tmp_path, "cand", [2.0 * level for level in shared], starts_s=60), tmp_path / "base")
    assert found.baseline is not None
    pairs = compare(found.data, found.baseline)
    assert {one.found.is_paired for one in pairs} == {True}
    assert all(np.allclose(one.candidate_ms / one.baseline_ms, 2.0, rtol=0.5) for one in pairs)
    assert statuses(found)["regression-create-p50"] is Status.FAIL


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"machine": {"cpu": "another"}}, "The baseline was not measured on this machine"),
        ({"machine": {"cpu_count": 64}}, "make one here with `make baseline`"),
        ({"parameters": {"children": 3}}, "not measured with the same parameters: children is 3 in it and 1 in cand"),
    ],
)
def test_what_is_not_alike_is_not_compared(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    for path in side(tmp_path, "base", [1.0] * 5):
        edit(path, **changed)
    found = judged(side(tmp_path, "cand", [9.0] * 3, starts_s=7200), tmp_path / "base")
    (verdict,) = [one for one in found.verdicts if one.name.startswith("regression-")]
    assert (verdict.name, verdict.verdict, said in verdict.reason) == ("regression-all", Status.INCONCLUSIVE, True)


def test_a_baseline_may_have_had_another_number_of_runs(tmp_path: Path) -> None:
    for path in side(tmp_path, "base", [1.0] * 5):
        edit(path, parameters={"runs": 7})
    assert len(statuses(judged(side(tmp_path, "cand", [2.0] * 3, starts_s=7200), tmp_path / "base"))) == 6


def test_a_baseline_of_another_load_is_open(tmp_path: Path) -> None:
    side(tmp_path, "base", [1.0] * 3, mode=Mode.BURST)
    found = judged(side(tmp_path, "cand", [1.0]), tmp_path / "base")
    reason = "The baseline holds only burst load, which these samples do not hold."
    assert [one.reason for one in found.verdicts if one.name == "regression-all"] == [reason]


def test_a_measurement_cannot_vouch_for_itself(tmp_path: Path) -> None:
    paths = side(tmp_path, "base", [1.0] * 3)
    found = judged(paths[:1], tmp_path / "base")
    assert [finding.fault for finding in found.findings] == [Fault.MIXED_MEASUREMENTS]
    assert (found.verdicts, found.exit_code) == ((), ExitCode.INVALID)


def test_a_baseline_that_cannot_be_trusted_makes_the_comparison_invalid(tmp_path: Path) -> None:
    for path in side(tmp_path, "base", [1.0] * 3):
        edit(path, clock={"end": {"monotonic_ns": 10**13, "wall_ns": WALL_NS}})
    found = judged(side(tmp_path, "cand", [1.0]), tmp_path / "base")
    assert {finding.measurement_id[:4] for finding in found.findings} == {"base"}
    assert found.exit_code is ExitCode.INVALID


def test_an_empty_folder_is_no_baseline(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoSampleSet, match="holds no sample set"):
        judged(side(tmp_path, "cand", [1.0]), tmp_path / "empty")


def test_the_notebook_says_in_words_and_pictures_what_the_gate_found(tmp_path: Path) -> None:
    side(tmp_path, "base", [1.0] * 5)
    found = judged(side(tmp_path, "cand", [2.0] * 3, starts_s=7200), tmp_path / "base")
    assert str(regression_shown.conclusion(found.data, found.baseline)).startswith("FAIL. 6 of 6 comparisons show")
    drawn = [regression_shown.changes(found.data, found.baseline)]
    drawn += [regression_shown.measurements(found.data, found.baseline)]
    assert all(isinstance(one, Drawing) and "snapshot p95" in one.alt for one in drawn)
    assert found.baseline is not None
    frame = comparison_frame(compare(found.data, found.baseline))
    assert list(zip(frame["statistic"], frame["verdict"], strict=True))[:3] == [
        ("p50", "FAIL"), ("p95", "FAIL"), ("p99", ""),
    ]  # fmt: skip


def test_without_a_baseline_the_notebook_says_so(tmp_path: Path) -> None:
    found = load(side(tmp_path, "cand", [1.0]))
    shown = [regression_shown.conclusion(found.data, None), regression_shown.changes(found.data, None)]
    shown += [regression_shown.measurements(found.data, None)]
    assert [regression_shown.NONE in str(one) for one in shown] == [True, True, True]
    assert regression_shown.NONE in str(regression_shown.comparisons(found.data, None))
