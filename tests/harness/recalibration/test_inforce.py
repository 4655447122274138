"""The process that holds the place of whoever measures: how it is let go."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness.recalibration import inforce
from harness.recalibration.inforce import Place

HOLDS = """
import pathlib, sys, time
print('{"recalibration": 1}', flush=True)
words = sys.stdin.buffer.read()
time.sleep(0.5)  # as on a busy machine
pathlib.Path(sys.argv[1]).write_bytes(words)
"""


def held(done: Path) -> Place:
    """A place whose process writes down what it was told, after its input has ended."""
    process = subprocess.Popen(  # noqa: S603 - our own words
        [sys.executable, "-c", HOLDS, str(done)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    place = Place(process)
    place.wait_until_held()
    return place


def test_a_process_that_is_to_give_its_place_up_is_not_killed_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inforce, "END_TIMEOUT_S", 0.0)
    place = held(tmp_path / "done")
    place.give_up()
    place.leave()
    assert (tmp_path / "done").read_bytes() == inforce.GIVEN_UP
