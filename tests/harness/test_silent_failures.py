"""No fault ends in a pass: each is refused with its exit code, by name, and leaves no verdict that says PASS."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.silent_faults import FAULTS, Fault, inflict


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.told)
def test_a_fault_is_named_and_nothing_passes(tmp_path: Path, fault: Fault) -> None:
    ended = inflict(fault, tmp_path)
    assert (ended.code, fault.named in ended.said, "Traceback" in ended.said) == (fault.code, True, False), ended.said
    assert ended.verdict in {None, "INVALID"}


def test_without_a_fault_the_same_scene_is_judged(tmp_path: Path) -> None:
    ended = inflict(Fault("none", lambda scene: scene.notebook("samples"), 3, ""), tmp_path)
    assert (ended.code, ended.verdict) == (3, "INCONCLUSIVE")
