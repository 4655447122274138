"""From a file to a closed sample set: what vouches for it, and that no row is lost on the way."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness import recorder, tablefiles
from harness.errors import BadUsage
from harness.importers import intake
from harness.importers.formats import Format, Unit
from harness.importers.importer import CLOCK, FROM_SEND
from harness.importers.intake import import_file
from harness.importers.shown import shown
from harness.importers.source import Lines
from harness.importers.vegeta import VegetaCsv
from harness.measurement import Interrupted
from harness.sample import Sample
from harness.sampleset import Clock, Instant, read_sample_set
from tests.harness.importers.reading import FILES, SECOND_NS, imported, rows_of, written

MS = 1_000_000
LINE = "{},200,1000000,0,10,,,load,{}"


def results(count: int) -> list[str]:
    """Return so many results of Vegeta, a millisecond apart."""
    return [LINE.format(SECOND_NS + number * MS, number) for number in range(count)]


def test_the_manifest_says_where_the_rows_come_from(tmp_path: Path) -> None:
    path = FILES / "vegeta.csv"
    manifest = imported(Format.VEGETA_CSV, path, tmp_path).manifest
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (manifest.mode, manifest.complete, manifest.planned_requests, manifest.attempt) == ("import", True, 6, 1)
    assert manifest.parameters == {
        "from": "vegeta-csv", "file": "vegeta.csv", "sha256": sha256, "bytes": path.stat().st_size,
    }  # fmt: skip
    assert (manifest.commit, manifest.machine, manifest.quota_revision) == (None, {}, None)
    assert manifest.clock == Clock(
        Instant(SECOND_NS, SECOND_NS), Instant(SECOND_NS + 30_030 * MS, SECOND_NS + 30_030 * MS)
    )
    assert manifest.source.tool == "vegeta"
    assert manifest.source.notes[:2] == (FROM_SEND, CLOCK)
    assert {"intended_at_ns", "latency_ms", "first_byte_at_ns"} <= set(manifest.source.cannot_know)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Format.K6_CSV, "k6.csv"), (Format.K6_JSON, "k6.json"), (Format.VEGETA_CSV, "vegeta.csv"),
        (Format.VEGETA_JSON, "vegeta.json"), (Format.LOCUST_CSV, "locust.csv"), (Format.JMETER_JTL, "jmeter.csv"),
        (Format.JMETER_JTL, "jmeter.xml"), (Format.HDR_LOG, "tagged-non-monotonic.hlog"),
    ],
)  # fmt: skip
def test_a_gzipped_file_and_one_with_a_byte_order_mark_give_the_same_rows(
    kind: Format, name: str, tmp_path: Path
) -> None:
    content = (FILES / name).read_bytes()
    plain = rows_of(imported(kind, FILES / name, tmp_path / "a"))
    assert rows_of(imported(kind, written(tmp_path / "b.file", gzip.compress(content)), tmp_path / "b")) == plain
    assert rows_of(imported(kind, written(tmp_path / "c.file", b"\xef\xbb\xbf" + content), tmp_path / "c")) == plain
    dos = content.replace(b"\n", b"\r\n") if name != "jmeter.csv" else content  # its message spans two lines
    assert rows_of(imported(kind, written(tmp_path / "d.file", dos.rstrip()), tmp_path / "d")) == plain


def test_the_same_content_is_the_same_measurement_whatever_its_file_is_called(tmp_path: Path) -> None:
    content = (FILES / "locust.csv").read_bytes()
    first = imported(Format.LOCUST_CSV, FILES / "locust.csv", tmp_path)
    again = imported(Format.LOCUST_CSV, written(tmp_path / "other.csv", content), tmp_path)
    more = imported(Format.LOCUST_CSV, written(tmp_path / "more.csv", content + content.splitlines(True)[1]), tmp_path)
    assert first.manifest.measurement_id == again.manifest.measurement_id != more.manifest.measurement_id


def test_rows_are_written_part_by_part_and_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tablefiles, "PART_ROWS", 7)
    monkeypatch.setattr(intake, "PART_ROWS", 7)
    found = imported(Format.VEGETA_CSV, written(tmp_path / "a.csv", results(21)), tmp_path)
    assert sorted(name for name in found.manifest.files if name.startswith("samples")) == [
        f"samples-{number:05d}.parquet" for number in (1, 2, 3)
    ]
    assert [row.sent_at_ns for row in rows_of(found)] == [SECOND_NS + number * MS for number in range(21)]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 60), part=st.integers(1, 25))
def test_as_many_rows_are_written_as_the_file_has(
    count: int, part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tablefiles, "PART_ROWS", part)
    monkeypatch.setattr(intake, "PART_ROWS", part)
    path = written(tmp_path / "a.csv", results(count))
    made = import_file(Format.VEGETA_CSV, path, tmp_path / f"{count}-{part}")
    found = read_sample_set(Path(made.samples))
    assert (made.rows, len(found.samples), found.manifest.planned_requests) == (count, count, count)
    assert [row.sent_at_ns for row in rows_of(found)] == [SECOND_NS + number * MS for number in range(count)]


REQUESTS = st.lists(
    st.tuples(st.integers(0, 10**9), st.sampled_from([0, 200, 503]), st.sampled_from(["1", "2", ""]), st.booleans()),
    min_size=1, max_size=90,
)  # fmt: skip


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=REQUESTS, dropped=st.integers(0, 5))
def test_as_many_rows_are_written_as_k6_made_requests_and_dropped_iterations(
    requests: list[tuple[int, int, str, bool]], dropped: int, tmp_path: Path
) -> None:
    lines = ["metric_name,timestamp,metric_value,check,scenario,status,url,metadata"]
    for after_ns, status, vu, passed in requests:
        tags = f",main,{status},http://x.test/,{vu and f'vu={vu}'}"
        at_ns = SECOND_NS + after_ns
        lines += [f"http_reqs,{at_ns},1,{tags}", f"http_req_duration,{at_ns},2.5,{tags}"]
        lines += [f"checks,{at_ns},{int(passed)},ok{tags}"]
    lines += [f"dropped_iterations,{SECOND_NS},{dropped},,main,,,"]
    rows = rows_of(imported(Format.K6_CSV, written(tmp_path / "a.csv", lines), tmp_path))
    answered = [row for row in rows if row.done_at_ns is not None]
    assert sorted(row.done_at_ns or 0 for row in answered) == sorted(SECOND_NS + one[0] for one in requests)
    assert len(rows) - len(answered) == dropped
    assert len({row.run_key for row in rows}) == len(rows)


class _Stopped(VegetaCsv):
    """An import that is interrupted after four rows."""

    def rows(self, lines: Lines) -> Iterator[Sample]:
        for number, row in enumerate(super().rows(lines)):
            if number == 4:
                raise KeyboardInterrupt
            yield row


def test_an_interrupted_import_leaves_a_readable_set_that_is_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(intake.IMPORTERS, Format.VEGETA_CSV, _Stopped)
    with pytest.raises(Interrupted) as stopped:
        import_file(Format.VEGETA_CSV, written(tmp_path / "a.csv", results(9)), tmp_path / "samples")
    kept = read_sample_set(stopped.value.path)
    assert (len(kept.samples), kept.manifest.complete) == (4, False)


def test_a_unit_is_refused_where_the_file_tells_it(tmp_path: Path) -> None:
    with pytest.raises(BadUsage, match="--unit is for hdr-log only: vegeta-csv says"):
        import_file(Format.VEGETA_CSV, FILES / "vegeta.csv", tmp_path, unit=Unit.MS)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadUsage, match="give --out a folder that can be written"):
        import_file(Format.VEGETA_CSV, FILES / "vegeta.csv", written(tmp_path / "file", "") / "samples")


def test_without_a_terminal_a_long_import_tells_how_far_it_is_in_plain_lines() -> None:
    now_s = iter([0.0, 5.0, 11.0, 11.0, 12.0])
    stream = io.StringIO()
    with shown(1000, stream, lambda: next(now_s)) as tell:
        tell(100, 20)
        tell(250, 40)
        tell(500, 80)
    assert stream.getvalue() == "25% read: 40 rows\n"


def test_a_disk_that_is_full_in_the_end_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(recorder.Recorder, "finish", full)
    with pytest.raises(BadUsage, match=r"cannot write samples to .*No space left on device"):
        import_file(Format.VEGETA_CSV, FILES / "vegeta.csv", tmp_path / "samples")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_an_import_shows_how_far_it_is() -> None:
    stream = _Terminal()
    with shown(1000, stream) as tell:
        tell(1000, 1234)
    assert "1,234 rows" in stream.getvalue()
