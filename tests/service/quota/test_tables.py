"""A revision as a file: what is read, what is refused and with which words, and that writing is exact."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import Invalid
from service.quota.limits import CAPS, DEFAULT, LIFTED, RATES, Limit, Rate
from service.quota.tables import FIRST, ClassTable, RateValue, parse, quota_of, table_of, write
from tests.quotatables import tables


def changed(path: str, value: Any) -> bytes:
    """Return the first revision's file with one place changed; a value of ... takes the place out."""
    file = json.loads(write(FIRST))
    *folders, name = path.split(".")
    place = file
    for folder in folders:
        place = place[folder]
    if value is ...:
        del place[name]
    else:
        place[name] = value
    return json.dumps(file).encode()


def test_the_first_table_is_the_users() -> None:
    assert (quota_of(FIRST.default), quota_of(FIRST.calibration)) == (DEFAULT, LIFTED)


def test_every_limit_has_a_place_in_the_file_in_one_order() -> None:
    assert list(ClassTable.__struct_fields__) == [*RATES, *CAPS]
    assert set(RATES) | set(CAPS) == set(Limit)


def test_what_is_written_is_read_back_and_written_alike() -> None:
    content = write(tables(live_runs=13, tick=None))
    assert write(parse(content).limits) == content


@given(thousandths=st.integers(1, 1_000_000_000), burst=st.integers(1, 1_000_000))
def test_a_rate_survives_the_file_exactly(thousandths: int, burst: int) -> None:
    quota = msgspec.structs.replace(FIRST.default, run_creation=RateValue(float(Fraction(thousandths, 1000)), burst))
    read = msgspec.json.decode(msgspec.json.encode(quota), type=ClassTable)
    assert quota_of(read).rates[Limit.RUN_CREATION] == Rate(Fraction(thousandths, 1000), burst)
    assert table_of(quota_of(read)) == quota


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("limits.default.tick", ..., "limits.default.tick: object missing required field `tick`"),
        ("limits.calibration", ..., "limits.calibration: object missing required field `calibration`"),
        ("limits.default.tock", 1, "limits.default.tock: object contains unknown field `tock`"),
        ("limits.default.live_runs", -1, "limits.default.live_runs: expected `int` >= 0"),
        ("limits.default.live_runs", 2.5, "limits.default.live_runs: expected `int | null`, got `float`"),
        ("limits.default.live_runs", "12", "limits.default.live_runs: expected `int | null`, got `str`"),
        ("limits.default.live_runs", 2**31, "limits.default.live_runs: expected `int` <= 2147483647"),
        ("limits.default.tick.per_s", 0, "limits.default.tick.per_s: expected `float` > 0.0"),
        ("limits.default.tick.per_s", -3, "limits.default.tick.per_s: expected `float` > 0.0"),
        ("limits.default.tick.per_s", 1e9, "limits.default.tick.per_s: expected `float` <= 1000000.0"),
        ("limits.default.tick.per_s", 0.0005, "limits.default.tick.per_s: give a multiple of 0.001, not 0.0005"),
        ("limits.default.tick.burst", 0, "limits.default.tick.burst: expected `int` >= 1"),
        ("limits.default.tick.burst", ..., "limits.default.tick.burst: object missing required field `burst`"),
        ("limits.default.tick", 41, "limits.default.tick: expected `object | null`, got `int`"),
        ("format", "plimsoll.quota_revision/2", "format: invalid enum value 'plimsoll.quota_revision/2'"),
        ("provenance", {"samples": {"a": "x"}}, "provenance.samples[...]: expected `str` matching regex"),
        ("provenance", {"measured_at": "2026-01-01T00:00:00"}, "provenance.measured_at: expected `datetime` with a"),
        ("provenance", {"note": "\0"}, "provenance: must not contain the character U+0000"),
        ("provenance", {"autor": "x"}, "provenance.autor: object contains unknown field `autor`"),
    ],
)
def test_a_bad_file_is_refused_with_the_field(path: str, value: Any, sentence: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse(changed(path, value))
    assert caught.value.detail.startswith(sentence)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "file: is not valid JSON: Input data was truncated"),
        (write(FIRST)[:100], "file: is not valid JSON: Input data was truncated"),
        (b"[]", "file: expected `object`, got `array`"),
        (write(FIRST).replace(b"10.29", b"NaN"), "file: is not valid JSON: JSON is malformed: invalid character"),
        (b"\xff", "file: is not valid JSON: JSON is malformed: invalid character"),
        (b'{"format": "\xff"}', "file: is not valid JSON: "),
        (b'{"format": ' + b"[" * 100_000, "format: expected `str`, got `array`"),
        (b" " * (2**20 + 1), "file: has 1048577 bytes; at most 1048576 are read"),
        (write(FIRST).replace(b'"tick": {', b'"tick": null, "tick": {', 1), "tick: is there twice in one object"),
        (write(FIRST).replace(b'"burst": 11', b'"burst": 11, "b\\u0075rst": 9'), "burst: is there twice in one object"),
    ],
)
def test_what_is_no_such_file_is_refused_in_a_sentence(content: bytes, sentence: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse(content)
    assert caught.value.detail.startswith(sentence)
