"""HdrHistogram logs, against those that its own tests read (format 1.2; the files are in the public domain, CC0)."""

from __future__ import annotations

import base64
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from harness.importers.formats import Format, Unit
from harness.importers.hdr_codec import HEAD, decode, slot_bounds
from harness.importers.source import Unusable
from harness.sample import Endpoint, Outcome
from tests.harness.importers.reading import FILES, imported, rows_of, sample, written

JHICCUP = FILES / "jHiccup-2.0.7S.logV2.hlog"
TAGGED = FILES / "tagged-non-monotonic.hlog"
START_NS = 1_441_753_532_570_000_000


def encoded(
    counts: bytes, digits: int = 3, lowest: int = 1, highest: int = 3_600_000_000, cookie: int = 0x1C849313
) -> str:
    """Return a packed histogram with these encoded counts."""
    payload = HEAD.pack(cookie, len(counts), 0, digits, lowest, highest, 1.0) + counts
    packed = zlib.compress(payload)
    return base64.b64encode(struct.pack(">ii", 0x1C849314, len(packed)) + packed).decode()


def in_three_digits(low: int) -> int:
    """Return the highest value that three significant digits do not tell from `low`."""
    width = 1 << max(low.bit_length() - 11, 0)
    return low | (width - 1)


def test_the_published_log_holds_what_its_authors_count_in_it() -> None:
    """The figures are those of HistogramLogReaderWriterTest.jHiccupV2Log, which sums up in three digits."""
    intervals, values = 0, Counter[int]()
    for line in JHICCUP.read_text().splitlines()[4:]:
        slots = list(decode(line.split(",")[3]).slots())
        highest_ms = max(high for _, high, _ in slots) / 1e6
        assert f"{highest_ms:.3f}" == line.split(",")[2]
        intervals += 1
        for low, _, count in slots:
            values[in_three_digits(low)] += count
    ordered = np.repeat(sorted(values), [values[value] for value in sorted(values)])
    assert intervals == 38
    assert len(ordered) == 30_874
    assert ordered[int(np.ceil(0.999 * len(ordered))) - 1] == 956_825_599
    assert ordered[-1] == 981_991_423


def test_each_counted_value_is_a_row_with_the_highest_value_of_its_slot(tmp_path: Path) -> None:
    found = imported(Format.HDR_LOG, JHICCUP, tmp_path)
    rows = rows_of(found)
    assert len(rows) == 30_874
    expected: Counter[tuple[str, float]] = Counter()
    for number, line in enumerate(JHICCUP.read_text().splitlines()[4:], start=1):
        for _, high, count in decode(line.split(",")[3]).slots():
            expected[f"interval-{number}", high / 1e6] += count
    assert Counter((row.run_key, row.service_ms) for row in rows) == expected
    assert rows[0] == sample(
        run_key="interval-1",
        endpoint=Endpoint.OTHER,
        service_ms=rows[0].service_ms,
        done_at_ns=START_NS + 1_133_000_000,
    )
    assert {"outcome", "status", "sent_at_ns"} <= set(found.manifest.source.cannot_know)


def test_tags_name_scenarios_and_a_log_without_a_start_counts_from_its_own_zero(tmp_path: Path) -> None:
    found = imported(Format.HDR_LOG, TAGGED, tmp_path)
    assert Counter(row.scenario for row in rows_of(found)).keys() == {"A", "B", "C"}
    assert found.manifest.clock.start.wall_ns == 1_134_000_000
    assert found.manifest.source.notes[-1] == "The log says not when it began: instants count from its own zero."


def test_a_tag_that_is_an_endpoint_names_it(tmp_path: Path) -> None:
    text = TAGGED.read_text().replace("Tag=A", "Tag=create").replace("Tag=B", "Tag=spawn")
    found = imported(Format.HDR_LOG, written(tmp_path / "a.hlog", text), tmp_path)
    assert {row.endpoint for row in rows_of(found)} == {Endpoint.CREATE, Endpoint.SPAWN, Endpoint.OTHER}


def test_the_unit_that_is_given_is_that_of_the_values(tmp_path: Path) -> None:
    line = f"1700000000.000,1.000,0.005,{encoded(bytes([9, 4]))}"  # five empty slots, then the value 5 twice
    found = imported(Format.HDR_LOG, written(tmp_path / "a.hlog", ["#[x]", line]), tmp_path, unit=Unit.US)
    one = sample(
        run_key="interval-1", endpoint=Endpoint.OTHER, service_ms=0.005, done_at_ns=1_700_000_001 * 10**9,
        outcome=Outcome.OK,
    )  # fmt: skip
    assert rows_of(found) == [one, one]
    assert found.manifest.source.notes[2] == "The unit of the values, us, was given."


@pytest.mark.parametrize(
    ("slot", "bounds"),
    [(0, (0, 0)), (2047, (2047, 2047)), (2048, (2048, 2049)), (3071, (4094, 4095)), (3072, (4096, 4099))],
)
def test_a_slot_of_three_digits_covers(slot: int, bounds: tuple[int, int]) -> None:
    assert slot_bounds(slot, 11, 0) == bounds


def test_a_count_of_nine_bytes_is_read_whole() -> None:
    counts = bytes([0x80, 0x80, 0x80, 0x80, 0x80, 0x01])  # 2^35, ZigZag: 2^34
    assert list(decode(encoded(counts)).slots()) == [(0, 0, 2**34)]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("HIST!", "is no base64"),
        (base64.b64encode(b"\x1c\x84").decode(), "is too short"),
        (base64.b64encode(struct.pack(">ii", 0x1C849312, 0)).decode(), "is in version 1"),
        (base64.b64encode(struct.pack(">ii", 0x0C72124F, 0)).decode(), "is a DoubleHistogram"),
        (base64.b64encode(struct.pack(">ii", 0x01020304, 0)).decode(), "does not begin as an HdrHistogram"),
        (encoded(bytes([2]))[:-8], "is shorter or longer than it says"),
        (base64.b64encode(struct.pack(">ii", 0x1C849314, 4) + b"abcd").decode(), "cannot be inflated"),
        (encoded(bytes([2]), digits=9), "has a head that cannot be"),
        (encoded(bytes([0x80])), "ends within a count"),
        (encoded(bytes([199, 199, 7, 2]), highest=2), "counts values beyond its highest"),
        (encoded(bytes([0xFE] + [0xFF] * 6 + [0x01])), "equal values, which cannot be"),
    ],
)
def test_a_damaged_histogram_is_refused(text: str, fault: str) -> None:
    with pytest.raises(Unusable, match=fault):
        list(decode(text).slots())
