"""`python -m harness bench`, as a person runs it, with short cells."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from harness.bench.results import Bench

pytestmark = pytest.mark.acceptance

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def data() -> Iterator[Path]:
    """A data folder of the test's own that PostgreSQL's user can reach."""
    folder = Path(tempfile.mkdtemp(prefix="plimsoll-test-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


def bench(data: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603
        [sys.executable, "-m", "harness", "bench", *arguments],
        cwd=CHECKOUT, env={**os.environ, "PLIMSOLL_DATA": str(data)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_path_is_measured_beside_its_floor_and_nothing_is_left_running(data: Path) -> None:
    ended = bench(data, "--quick", "--only", "304")
    assert ended.returncode == 0, ended.stderr
    (file,) = (data / "bench").glob("*/bench.json")
    assert ended.stdout.splitlines()[-1] == f"bench: {file}"
    assert ended.stdout.startswith(file.with_suffix(".md").read_text())
    found = msgspec.json.decode(file.read_bytes(), type=Bench)
    assert [(one.name, one.connections, one.floor, len(one.repeats)) for one in found.figures] == [
        (name, connections, floor, 2)
        for connections in (32, 128)
        for name, floor in (("bare GET", True), ("bare small GET", True), ("304", False))
    ]
    assert all(repeat.count > 0 for one in found.figures for repeat in one.repeats)
    assert [(one.name, one.floor, one.connections, len(one.repeats)) for one in found.ratios] == [
        ("304", floor, connections, 2) for connections in (32, 128) for floor in ("bare small GET", "bare GET")
    ]
    assert [one.reached is None for one in found.aims] == [True, True, True, True, False, True]
    assert {path.name for path in data.iterdir()} == {"bench", "stack"}
    assert not [process for process in psutil.process_iter(["cwd"]) if str(data) in str(process.info["cwd"])]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only", "everything"], "--only 'everything' is not known: give some of create, spawn, snapshot, 304"),
        (["--seconds", "0"], "argument --seconds: '0' is not usable: give seconds from 0.1 to 60"),
        (["--repeats", "none"], "argument --repeats: 'none' is not usable: give a whole number from 1 to 100"),
    ],
    ids=["an unknown path", "no time", "no number"],
)
def test_bad_usage_is_one_line_that_names_the_flag(data: Path, arguments: list[str], sentence: str) -> None:
    ended = bench(data, *arguments)
    assert (ended.returncode, ended.stdout) == (64, "")
    assert ended.stderr.startswith(f"python -m harness bench: {sentence}")
    assert ended.stderr.count("\n") == 1
