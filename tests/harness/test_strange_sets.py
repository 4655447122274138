"""Sets whose bytes are in order and whose content no harness of ours would write."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from harness.analysis.validity import Fault
from harness.evaluation import load
from harness.sampleset import UnreadableFile, read_sample_set
from harness.slofile import SloFileError, read_slos
from tests.harness.synthetic import Plan, change, write_sample_set


def test_an_outcome_that_nobody_knows_is_no_measurement(tmp_path: Path) -> None:
    path = write_sample_set(tmp_path, Plan(), [change(3, outcome="excellent")])
    findings = load([path]).findings
    assert [finding.fault for finding in findings] == [Fault.OUTCOME_MISMATCH]
    assert findings[0].detail == "1 request ended in no outcome that is known: excellent."


def test_a_quota_revision_that_no_table_can_hold_is_refused(tmp_path: Path) -> None:
    path = write_sample_set(tmp_path, Plan())
    manifest = json.loads((path / "manifest.json").read_bytes())
    (path / "manifest.json").write_text(json.dumps({**manifest, "quota_revision": 10**30}))
    with pytest.raises(UnreadableFile, match="quota_revision"):
        read_sample_set(path)


def test_a_target_without_end_is_refused_before_anything_is_judged(tmp_path: Path) -> None:
    shipped = Path("data/slo.yaml").read_text()
    endless = tmp_path / "slo.yaml"
    endless.write_text(re.sub(r"value: [0-9.]+", "value: .inf", shipped, count=1))
    with pytest.raises(SloFileError, match="document 1"):
        read_slos(endless)
