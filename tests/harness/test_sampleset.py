"""A sample set is read back as it was recorded, or refused with the name of the file at fault."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness import tablefiles
from harness.errors import BadUsage, ExitCode
from harness.recorder import Recorder, require_writable
from harness.sample import Endpoint, Mode, Outcome, ResourceSample, RunRecord, Sample, arrow_schema
from harness.samplebuffer import _DTYPE, _PACK, NAN, UNKNOWN, SampleBuffer, run_key
from harness.sampleset import (
    HashMismatch,
    ManifestMissing,
    MixedMeasurements,
    NoSampleSet,
    SampleSetError,
    SampleSetNotFound,
    UnknownSchemaVersion,
    UnlistedFile,
    UnreadableFile,
    newest_sample_set,
    read_sample_set,
)

TIMING = (1.0, 2.0, 3.0, 4.0)
RUN = RunRecord(
    run_key="1", run_id="r1", parent_run_key=None, workspace_id="w1", trial=0, worker=0, created_at_ns=5,
    last_unfinished_at_ns=6, first_finished_at_ns=7, server_completion_ms=0.5, final_status="COMPLETED",
    poll_timed_out=False, ticks=2, steps=2, events=5, subruns=0,
)  # fmt: skip
SECOND = ResourceSample(
    at_ns=9, cpu_percent=12.5, load1=0.5, service_rss_bytes=None, service_cpu_percent=None, harness_cpu_percent=3.0,
    queue_depth=0.0, oldest_due_tick_s=0.0, ticks_per_s=None, redis_publish_lag_ms=None, db_write_ms=1.5,
    iowait_percent=0.25, generator_lag_ms=0.125,
)  # fmt: skip


def append_ok(samples: SampleBuffer, run: int, child: int = 0, endpoint: Endpoint = Endpoint.CREATE) -> None:
    at = run * 1_000_000
    samples.append(
        run, child, endpoint, NAN, 0, 3, at, at + 1_000, at + 2_000, at + 500_000, 200, Outcome.OK, None,
        TIMING, 321, 7,
    )  # fmt: skip


def recorded(root: Path, rows: int = 3, *, complete: bool = True) -> Path:
    recorder = Recorder(root, Mode.SMOKE, "scenario", {"runs": rows})
    recorder.plan(rows)
    for run in range(1, rows + 1):
        append_ok(recorder.samples, run)
    recorder.add_run(RUN)
    recorder.add_resources(SECOND)
    recorder.finish(complete=complete)
    return recorder.path


def test_what_is_packed_is_what_is_read() -> None:
    assert _PACK.size == _DTYPE.itemsize
    assert len(_PACK.unpack(bytes(_PACK.size))) == len(_DTYPE.names or ())


def test_every_column_of_a_row_is_read_back_as_it_was_recorded(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, Mode.BURST, "create-spawn-poll", {})
    recorder.plan(2)
    recorder.samples.append(
        12, 2, Endpoint.SPAWN, 20.0, 4, 3, 1_000_000, 2_000_000, 3_000_000, 4_500_000, 429, Outcome.HTTP_ERROR,
        "quota", (1.0, 2.0, NAN, 4.0), 99, 5,
    )  # fmt: skip
    recorder.samples.append(
        12, 0, Endpoint.SNAPSHOT, NAN, 0, 0, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, Outcome.NOT_SENT, None,
        (NAN, NAN, NAN, NAN), UNKNOWN, UNKNOWN,
    )  # fmt: skip
    recorder.finish(complete=True)
    measured = read_sample_set(recorder.path)
    refused = Sample(
        scenario="create-spawn-poll", mode=Mode.BURST,
        run_key="12.2", endpoint=Endpoint.SPAWN, level=20.0, trial=4, worker=3, intended_at_ns=1_000_000,
        sent_at_ns=2_000_000, first_byte_at_ns=3_000_000, done_at_ns=4_500_000, latency_ms=3.5, service_ms=2.5,
        status=429, outcome=Outcome.HTTP_ERROR, error="quota", server_db_ms=1.0, server_quota_ms=2.0,
        server_publish_ms=None, server_app_ms=4.0, response_bytes=99, connection_id=5,
    )  # fmt: skip
    unsent = Sample(
        scenario="create-spawn-poll", mode=Mode.BURST,
        run_key="12", endpoint=Endpoint.SNAPSHOT, level=None, trial=0, worker=0, intended_at_ns=None,
        sent_at_ns=None, first_byte_at_ns=None, done_at_ns=None, latency_ms=None, service_ms=None, status=None,
        outcome=Outcome.NOT_SENT, error=None, server_db_ms=None, server_quota_ms=None, server_publish_ms=None,
        server_app_ms=None, response_bytes=None, connection_id=None,
    )  # fmt: skip
    assert measured.samples.to_pylist() == [dataclasses.asdict(refused), dataclasses.asdict(unsent)]
    assert measured.samples.schema.equals(arrow_schema(Sample, measured.manifest.measurement_id), check_metadata=True)


def test_runs_and_seconds_are_read_back_as_they_were_recorded(tmp_path: Path) -> None:
    measured = read_sample_set(recorded(tmp_path))
    assert measured.runs.to_pylist() == [dataclasses.asdict(RUN)]
    assert measured.resources.to_pylist() == [dataclasses.asdict(SECOND)]


def test_the_manifest_says_what_was_asked_and_vouches_for_every_file(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    manifest = json.loads((path / "manifest.json").read_bytes())
    assert list(manifest) == [
        "measurement_id", "mode", "parameters", "planned_requests", "attempt", "commit", "versions", "machine",
        "quota_revision", "clock", "files", "complete", "source", "senders", "stored",
    ]  # fmt: skip
    assert sorted(manifest["files"]) == ["resources.parquet", "runs.parquet", "samples-00001.parquet"]
    assert sorted(entry.name for entry in path.iterdir()) == ["manifest.json", *sorted(manifest["files"])]
    assert (manifest["complete"], manifest["planned_requests"], manifest["parameters"]) == (True, 3, {"runs": 3})
    assert manifest["source"] == {"tool": "plimsoll", "cannot_know": [], "notes": []}
    start, end = manifest["clock"]["start"], manifest["clock"]["end"]
    assert start["monotonic_ns"] <= end["monotonic_ns"]
    assert path.name.endswith(f"Z-smoke-{manifest['measurement_id'][:8]}")


def test_repeating_the_same_measurement_shows_in_its_attempt(tmp_path: Path) -> None:
    attempts = [read_sample_set(recorded(tmp_path, rows)).manifest.attempt for rows in (2, 2, 3, 2)]
    assert attempts == [1, 2, 1, 3]


def test_a_plan_with_a_row_missing_is_never_complete(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, Mode.SMOKE, "scenario", {})
    recorder.plan(2)
    append_ok(recorder.samples, 1)
    assert not recorder.finish(complete=True).complete


def test_many_rows_are_closed_in_parts_and_runs_end_as_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tablefiles, "PART_ROWS", 10)
    recorder = Recorder(tmp_path, Mode.SOAK, "scenario", {})
    for run in range(1, 26):
        recorder.plan(1)
        append_ok(recorder.samples, run)
        recorder.add_run(dataclasses.replace(RUN, run_key=run_key(run)))
        if run % 5 == 0:
            recorder.write(recorder.collect())
    during = read_sample_set(recorder.path)
    assert sorted(during.manifest.files) == [
        "runs-00001.parquet", "runs-00002.parquet", "samples-00001.parquet", "samples-00002.parquet",
    ]  # fmt: skip
    recorder.finish(complete=True)
    after = read_sample_set(recorder.path)
    assert sorted(after.manifest.files) == [
        "resources.parquet", "runs.parquet", "samples-00001.parquet", "samples-00002.parquet", "samples-00003.parquet",
    ]  # fmt: skip
    keys = [run_key(run) for run in range(1, 26)]
    for measured in (during, after):
        assert measured.samples["run_key"].to_pylist() == keys
        assert measured.runs["run_key"].to_pylist() == keys
    assert sorted(entry.name for entry in recorder.path.iterdir()) == ["manifest.json", *sorted(after.manifest.files)]


def test_parts_that_a_kill_left_beside_the_merged_file_are_not_counted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tablefiles, "PART_ROWS", 2)
    recorder = Recorder(tmp_path, Mode.SOAK, "scenario", {})
    for run in range(1, 6):
        recorder.add_run(dataclasses.replace(RUN, run_key=run_key(run)))
        recorder.write(recorder.collect())
    part = (recorder.path / "runs-00001.parquet").read_bytes()
    recorder.finish(complete=False)
    (recorder.path / "runs-00001.parquet").write_bytes(part)
    assert read_sample_set(recorder.path).runs["run_key"].to_pylist() == ["1", "2", "3", "4", "5"]


def test_runs_that_are_still_live_are_on_disk_and_replaced_when_they_end(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, Mode.SMOKE, "scenario", {})
    live = [dataclasses.replace(RUN, final_status=None)]
    recorder.live_runs = lambda: live
    recorder.write(recorder.collect())
    assert read_sample_set(recorder.path).runs["final_status"].to_pylist() == [None]
    live.clear()
    recorder.add_run(RUN)
    recorder.write(recorder.collect())
    assert read_sample_set(recorder.path).runs["final_status"].to_pylist() == ["COMPLETED"]


def test_more_rows_than_one_chunk_of_the_buffer_keep_their_order_and_their_errors() -> None:
    samples = SampleBuffer()
    for run in range(10_000):
        samples.append(
            run, 0, Endpoint.CREATE, NAN, 0, 0, run, run, run, run, 500, Outcome.HTTP_ERROR, f"error {run % 3}",
            TIMING, 1, 1,
        )  # fmt: skip
    batch = samples.take()
    assert [used for _, used in batch.chunks] == [4096, 4096, 1808]
    assert batch.errors == ["error 0", "error 1", "error 2"]
    assert samples.take().chunks == []
    assert samples.rows == 10_000


def test_rows_that_come_while_an_empty_collection_is_written_are_written_once(tmp_path: Path) -> None:
    recorder, other = Recorder(tmp_path, Mode.OPEN, "request", {}), SampleBuffer()
    recorder.plan(1)
    collected = recorder.collect()  # written by a thread, which may begin late
    append_ok(other, 1)
    recorder.samples.absorb(other.drain())
    recorder.write(collected)
    assert recorder.finish(complete=True).complete
    assert read_sample_set(recorder.path).samples["run_key"].to_pylist() == ["1"]


def truncate(path: Path) -> None:
    file = path / "samples-00001.parquet"
    file.write_bytes(file.read_bytes()[:-20])


def garble(path: Path) -> None:
    (path / "runs.parquet").write_bytes(b"this is no parquet")


def exchange_rows(path: Path) -> None:
    file = path / "resources.parquet"
    table = pq.read_table(file)
    pq.write_table(pa.concat_tables([table, table]), file)


def remove_runs(path: Path) -> None:
    (path / "runs.parquet").unlink()


def remove_samples(path: Path) -> None:
    (path / "samples-00001.parquet").unlink()


def add_part(path: Path) -> None:
    (path / "samples-00002.parquet").write_bytes((path / "samples-00001.parquet").read_bytes())


def relabel(name: str, key: str, value: str | None) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        table = pq.read_table(path / name)
        metadata = {entry.decode(): text.decode() for entry, text in table.schema.metadata.items()}
        del metadata[key]
        pq.write_table(table.replace_schema_metadata(metadata | ({key: value} if value else {})), path / name)

    return change


def drop_column(path: Path) -> None:
    file = path / "runs.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["ticks"]), file)


def break_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"measurement_id": ')


def shorten_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("{}")


def remove_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


Damage = tuple[Callable[[Path], None], type[SampleSetError], str]

# What the file itself gives away, whether or not the manifest vouches for it.
EVIDENT: list[Damage] = [
    (truncate, UnreadableFile, "samples-00001.parquet"),
    (garble, UnreadableFile, "runs.parquet"),
    (remove_runs, UnreadableFile, "runs.parquet"),
    (remove_samples, UnreadableFile, "samples-00001.parquet"),
    (relabel("runs.parquet", "plimsoll.schema_version", "99"), UnknownSchemaVersion, "runs.parquet"),
    (relabel("runs.parquet", "plimsoll.schema_version", None), UnknownSchemaVersion, "runs.parquet"),
    (relabel("resources.parquet", "plimsoll.measurement_id", "other"), MixedMeasurements, "resources.parquet"),
    (drop_column, UnreadableFile, "runs.parquet"),
    (break_manifest, UnreadableFile, "manifest.json"),
    (shorten_manifest, UnreadableFile, "manifest.json"),
    (remove_manifest, ManifestMissing, "manifest.json"),
]
# What only a manifest that vouches for every file gives away.
CONCEALED: list[Damage] = [
    (exchange_rows, HashMismatch, "resources.parquet"),
    (add_part, UnlistedFile, "samples-00002.parquet"),
]
CASES = [(True, *damage) for damage in EVIDENT + CONCEALED] + [(False, *damage) for damage in EVIDENT]


@pytest.mark.parametrize(("complete", "damage", "error", "name"), CASES)
def test_a_damaged_set_is_refused_with_the_name_of_the_file(
    tmp_path: Path, complete: bool, damage: Callable[[Path], None], error: type[SampleSetError], name: str
) -> None:
    path = recorded(tmp_path)
    if not complete:
        manifest = json.loads((path / "manifest.json").read_bytes())
        (path / "manifest.json").write_text(json.dumps(manifest | {"complete": False, "files": {}}))
    damage(path)
    with pytest.raises(error) as refused:
        read_sample_set(path)
    assert (refused.value.path, refused.value.name, refused.value.exit_code) == (path, name, ExitCode.INVALID)
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_path_that_does_not_exist_is_bad_usage(tmp_path: Path) -> None:
    with pytest.raises(SampleSetNotFound) as refused:
        read_sample_set(tmp_path / "nothing")
    assert refused.value.exit_code is ExitCode.USAGE


def test_the_newest_set_is_the_one_begun_last(tmp_path: Path) -> None:
    paths = [recorded(tmp_path) for _ in range(3)]
    (tmp_path / "99999999-no-set").mkdir()
    assert newest_sample_set(tmp_path) == max(paths)


@pytest.mark.parametrize(("name", "error"), [("", NoSampleSet), ("nothing", SampleSetNotFound)])
def test_a_folder_without_a_set_has_no_newest(tmp_path: Path, name: str, error: type[SampleSetError]) -> None:
    with pytest.raises(error):
        newest_sample_set(tmp_path / name)


def test_a_folder_that_cannot_be_written_is_refused_with_the_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    root = tmp_path / "file" / "samples"
    for attempt in (lambda: require_writable(root), lambda: Recorder(root, Mode.SMOKE, "scenario", {})):
        with pytest.raises(BadUsage) as refused:
            attempt()
        assert str(refused.value) == (
            f"cannot write samples to {root} (Not a directory): give --out a folder that can be written"
        )


def test_unknown_numbers_do_not_become_zero() -> None:
    assert UNKNOWN < 0
    assert math.isnan(NAN)


def test_a_set_from_before_a_column_was_added_is_read_with_nulls_in_it(tmp_path: Path) -> None:
    path = recorded(tmp_path, complete=False)  # of an incomplete set, a file's hash is not known yet
    file = path / "resources.parquet"
    manifest = json.loads((path / "manifest.json").read_bytes())
    (path / "manifest.json").write_text(json.dumps(manifest | {"files": {}}))
    table = pq.read_table(file).drop_columns(["steal_percent", "generator_gc_ms"])
    pq.write_table(table, file)
    assert read_sample_set(path).resources["steal_percent"].null_count == len(table) == 1
    pq.write_table(table.drop_columns(["load1"]), file)  # one that was always there
    with pytest.raises(UnreadableFile, match=r"resources\.parquet cannot be read"):
        read_sample_set(path)


def test_rows_of_another_buffer_are_taken_over_with_their_own_errors(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, Mode.OPEN, "request", {})
    for part in range(3):
        other = SampleBuffer()
        for row in range(2):
            error = None if row else f"fault {part % 2}"
            other.append(
                10 * part + row + 1, 0, Endpoint.OTHER, NAN, 0, part, 1, 2, 3, 4, 200, Outcome.OK, error, TIMING, 5, 6
            )  # fmt: skip
        recorder.samples.absorb(other.drain())
        append_ok(recorder.samples, 10 * part + 3)
        assert other.drain().rows().size == 0
    recorder.plan(9)
    recorder.finish(complete=True)
    rows = read_sample_set(recorder.path).samples.to_pylist()
    assert {row["run_key"]: row["error"] for row in rows} == {
        "1": "fault 0", "2": None, "3": None,
        "11": "fault 1", "12": None, "13": None,
        "21": "fault 0", "22": None, "23": None,
    }  # fmt: skip
