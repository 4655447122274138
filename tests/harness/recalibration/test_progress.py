"""What a killed recalibration leaves behind, and what of it still counts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.errors import BadUsage
from harness.recalibration.progress import MOST_AGE_S, STATE, AlreadyAtWork, Progress, alone, forget, read, write

WISH = {"url": None, "trials": 10}


@pytest.fixture
def begun(tmp_path: Path) -> Progress:
    """A recalibration of which one step is done."""
    (tmp_path / "set").mkdir()
    (tmp_path / "report").mkdir()
    progress = Progress(WISH, 1000.0, 7, {"burst-limits": str(tmp_path / "set")}, str(tmp_path / "report"))
    write(tmp_path, progress)
    return progress


def test_what_was_begun_is_gone_on_with_under_the_same_wish(tmp_path: Path, begun: Progress) -> None:
    assert read(tmp_path, dict(WISH), 1000.0 + MOST_AGE_S) == begun


@pytest.mark.parametrize(
    ("wish", "now_s"),
    [({**WISH, "trials": 20}, 1001.0), (WISH, 1000.1 + MOST_AGE_S), (WISH, 999.0)],
    ids=["another wish", "too long ago", "begun in the future"],
)
def test_what_is_of_another_kind_or_time_is_begun_anew(
    tmp_path: Path, begun: Progress, wish: dict[str, object], now_s: float
) -> None:
    assert read(tmp_path, wish, now_s) == Progress(wish, now_s)


def test_a_step_whose_folder_is_gone_is_to_be_done_again(tmp_path: Path, begun: Progress) -> None:
    (tmp_path / "set").rmdir()
    (tmp_path / "report").rmdir()
    assert read(tmp_path, WISH, 1001.0) == Progress(WISH, 1000.0, 7)


def test_a_file_that_was_cut_short_and_one_that_was_forgotten_are_none(tmp_path: Path, begun: Progress) -> None:
    (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:40])
    assert read(tmp_path, WISH, 1001.0) == Progress(WISH, 1001.0)
    forget(tmp_path)
    forget(tmp_path)
    assert read(tmp_path, WISH, 1001.0) == Progress(WISH, 1001.0)


def test_two_at_once_in_one_checkout_are_told_apart_and_the_second_goes(tmp_path: Path) -> None:
    told = rf"at work in this checkout \(process {os.getpid()}\)$"
    with alone(tmp_path / "recalibration"), pytest.raises(AlreadyAtWork, match=told):
        alone(tmp_path / "recalibration").__enter__()
    with alone(tmp_path / "recalibration"):
        pass


def test_a_folder_that_cannot_be_made_is_bad_usage(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadUsage, match="set PLIMSOLL_DATA to a folder that can be written"):
        alone(tmp_path / "file" / "recalibration").__enter__()
