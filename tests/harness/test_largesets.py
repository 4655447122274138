"""Latencies without reading a set into memory: the same numbers as the report's tables, wherever the files lie."""

from __future__ import annotations

import json
import math
from pathlib import Path

import fsspec
import pandas as pd
import pytest

from harness.__main__ import main
from harness.analysis.tables import latency_frame
from harness.errors import BadUsage
from harness.evaluation import load
from harness.largesets import QUANTILES, Latencies, read_latencies
from harness.sampleset import HashMismatch, NoSampleSet, SampleSetError, UnlistedFile, UnreadableFile
from tests.harness.synthetic import Plan, Spoil, change, write_sample_set


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLIMSOLL_DATA", str(tmp_path / "data"))


def write(root: Path, spoil: tuple[Spoil, ...] = ()) -> list[Path]:
    """Write two repetitions of one load."""
    return [
        write_sample_set(root, Plan(runs=70, seed=seed, measurement_id=f"019{seed}-part"), spoil if seed == 1 else ())
        for seed in (1, 2)
    ]


def assert_as_the_report_has_it(found: tuple[Latencies, ...], paths: list[Path]) -> None:
    """Compare every number that both hold with the table that pandas made."""
    frame = latency_frame(load(paths).data)
    assert {(one.mode, one.endpoint) for one in found} == set(zip(frame["mode"], frame["endpoint"], strict=True))
    for one in found:
        rows = frame[(frame["mode"] == one.mode) & (frame["endpoint"] == one.endpoint)].set_index("q")
        first = rows.iloc[0]
        assert (one.requests, one.failed) == (first["requests"], first["failed"])
        assert math.isclose(one.mean_ms or 0.0, first["mean_ms"], rel_tol=1e-9)
        for q in rows.index:
            expected = rows.loc[q, "latency_ms"]
            assert one.quantiles_ms[f"p{q * 100:g}"] == (None if pd.isna(expected) else expected)


def test_the_numbers_are_those_of_the_report(tmp_path: Path) -> None:
    paths = write(tmp_path / "sets")
    found = read_latencies([str(tmp_path / "sets")])
    assert_as_the_report_has_it(found, paths)
    assert [list(one.quantiles_ms) for one in found] == [[f"p{q * 100:g}" for q in QUANTILES]] * 3


def test_failures_are_slower_than_anything(tmp_path: Path) -> None:
    lost = tuple(change(place, outcome="timeout", status=None, error="no answer") for place in range(0, 60, 2))
    paths = write(tmp_path / "sets", lost)
    found = read_latencies([str(path) for path in paths])
    assert sum(one.failed for one in found) == 30
    assert any(value is None for one in found for value in one.quantiles_ms.values())
    assert_as_the_report_has_it(found, paths)


@pytest.mark.parametrize("ms", [0.0, 1e-9, 5.0, 3_600_000.0])
def test_requests_that_all_took_the_same_time_have_one_quantile(tmp_path: Path, ms: float) -> None:
    write_sample_set(tmp_path, Plan(runs=3), [change(place, latency_ms=ms) for place in range(12)])
    found = [value for one in read_latencies([str(tmp_path)]) for value in one.quantiles_ms.values()]
    assert found == pytest.approx([ms] * 12, rel=1e-6)


def test_sets_in_other_storage_are_read_where_they_lie(tmp_path: Path) -> None:
    paths = write(tmp_path / "sets")
    elsewhere = fsspec.filesystem("memory")
    elsewhere.put(str(tmp_path / "sets"), "/bucket", recursive=True)
    try:
        assert read_latencies(["memory://bucket"]) == read_latencies([str(path) for path in paths])
    finally:
        elsewhere.rm("/bucket", recursive=True)


def test_a_file_that_is_not_the_one_recorded_is_refused(tmp_path: Path) -> None:
    first, second = write(tmp_path / "sets")
    file, other = (path / "samples-00001.parquet" for path in (first, second))
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    with pytest.raises(UnreadableFile, match=r"samples-00001\.parquet cannot be read"):
        read_latencies([str(first)])
    file.write_bytes(other.read_bytes())
    with pytest.raises(SampleSetError, match="measurements are mixed"):
        read_latencies([str(first)])
    file.write_bytes(whole)
    (first / "samples-00002.parquet").write_bytes(whole)
    with pytest.raises(UnlistedFile, match="it was added afterwards"):
        read_latencies([str(first)])


@pytest.mark.parametrize(
    ("key", "value", "fault", "words"),
    [
        ("complete", False, SampleSetError, "was cut short"),
        ("planned_requests", 7, SampleSetError, "rows of 7 planned requests"),
        ("files", {"samples-00001.parquet": "0" * 64}, HashMismatch, "was altered"),
        ("files", {"samples-00009.parquet": "0" * 64}, UnreadableFile, "listed in the manifest and missing"),
    ],
)
def test_a_set_that_its_manifest_does_not_bear_out_is_refused(
    tmp_path: Path, key: str, value: object, fault: type[SampleSetError], words: str
) -> None:
    path = write_sample_set(tmp_path, Plan(runs=3), manifest={key: value})
    with pytest.raises(fault, match=words):
        read_latencies([str(path)])


@pytest.mark.parametrize(
    ("place", "memory_mb", "words"),
    [
        ("nowhere", 512, "nowhere does not exist"),
        ("nonsense://bucket/sets", 512, "Protocol not known: nonsense"),
        ("memory://bucket-that-is-not", 512, "does not exist"),
        ("nowhere", 1, "--memory-mb is from 128 to 1,000,000, not 1"),
    ],
)
def test_a_place_that_cannot_be_reached_is_bad_usage(place: str, memory_mb: int, words: str) -> None:
    with pytest.raises(BadUsage, match=words):
        read_latencies([place], memory_mb)


def test_a_folder_without_a_set_says_so(tmp_path: Path) -> None:
    with pytest.raises(NoSampleSet):
        read_latencies([str(tmp_path)])


def test_the_command_prints_a_table_or_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "sets")
    assert main(["latencies", str(tmp_path / "sets")]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["load", "endpoint", "requests", "failed", "mean", "ms", *(
        word for q in QUANTILES for word in (f"p{q * 100:g}", "ms"))]  # fmt: skip
    assert [row.split()[:3] for row in rows] == [
        ["smoke", "create", "140"], ["smoke", "snapshot", "280"], ["smoke", "spawn", "140"]
    ]  # fmt: skip
    assert main(["latencies", "--json", str(tmp_path / "sets")]) == 0
    told = json.loads(capsys.readouterr().out)["latencies"]
    assert [one["requests"] for one in told] == [140, 280, 140]


def test_bad_usage_of_the_command_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["latencies", str(tmp_path / "nowhere")]) == 64
    assert capsys.readouterr().err.count("\n") == 1
