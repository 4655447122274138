"""Clocks of senders on several machines: what they may be off by, and when that spoils a measurement."""

import dataclasses

import pytest

from harness.analysis.alignment import misalignments, misplaced_ms
from harness.sampleset import Clock, Instant, Manifest, SenderClock, Source

NOW = Instant(0, 0)
SOUND = SenderClock(
    worker=3, offset_us=5e9, uncertainty_us=800.0, round_trips=32, end_offset_us=5e9 + 900.0, end_uncertainty_us=400.0,
    machine={},
)  # fmt: skip


def told(sender: SenderClock) -> list[str]:
    manifest = Manifest(
        measurement_id="m", mode="open", parameters={}, planned_requests=0, attempt=1, commit=None, versions={},
        machine={}, quota_revision=None, clock=Clock(NOW, NOW), files={}, complete=True, source=Source(),
        senders=(sender,),
    )  # fmt: skip
    return list(misalignments(manifest))


@pytest.mark.parametrize(
    ("sender", "off_ms"),
    [
        pytest.param(SOUND, 0.8, id="within both uncertainties nothing has moved for sure"),
        pytest.param(dataclasses.replace(SOUND, end_offset_us=5e9 - 3_200.0), 2.8, id="beyond them it has, either way"),
        pytest.param(dataclasses.replace(SOUND, end_offset_us=None, end_uncertainty_us=None), 0.8, id="not known"),
    ],
)
def test_a_clock_is_off_by_its_uncertainty_and_what_it_moved_for_sure(sender: SenderClock, off_ms: float) -> None:
    assert misplaced_ms(sender) == pytest.approx(off_ms)
    assert told(sender) == []


def test_more_than_fifty_milliseconds_are_told_with_their_cause() -> None:
    ran_away = dataclasses.replace(SOUND, end_offset_us=5e9 + 61_200.0)
    (sentence,) = told(ran_away)
    assert sentence == (
        "The clock of sender 3 was known to ±0.8 ms and moved by 60 ms or more during the load: its arrivals may be"
        " 60.8 ms off, more than 50 ms."
    )
    assert told(dataclasses.replace(SOUND, uncertainty_us=50_100.0)) != []
