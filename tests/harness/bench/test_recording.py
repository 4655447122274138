"""The sample set that is judged in the bench is a sound one."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.bench.load import LoadFailed
from harness.bench.recording import judge, make_sample_set, read
from harness.sampleset import MANIFEST


def test_a_synthetic_set_is_judged_as_a_real_one(tmp_path: Path) -> None:
    samples = make_sample_set(tmp_path, 500)
    assert (judge(samples).count, read(samples).count) == (500, 500)


def test_a_set_that_is_not_sound_is_refused(tmp_path: Path) -> None:
    samples = make_sample_set(tmp_path, 50)
    manifest = samples / MANIFEST
    manifest.write_text(manifest.read_text().replace('"planned_requests": 50', '"planned_requests": 51'))
    with pytest.raises(LoadFailed, match="1 row of 51 planned requests"):
        judge(samples)
