"""Each doubt by what it lets through and what it says to the rest."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from service.quota.guardrails import Finding
from service.quota.limits import Limit
from service.quota.recalibration_evidence import Known, doubts_about, is_same_kind
from service.quota.tables import FORMAT, Measured, Provenance, RateValue, RevisionFile
from tests.measuredtables import MACHINE, NOW, OTHER_MACHINE, measured, measured_file
from tests.quotatables import tables

CREATE = Limit.RUN_CREATION
WEEK = dt.timedelta(days=7)
KNOWN = Known(Provenance(measured={CREATE: measured(40.0, measured_at=NOW - WEEK)}), NOW)
UNMEASURED = Known(Provenance(), NOW)


def doubts(each: Measured, known: Known = KNOWN) -> dict[str, str]:
    """Return what is doubted of a file that holds this alone."""
    return {found.guardrail: found.refusal for found in doubts_about(measured_file({CREATE: each}), known)}


@pytest.mark.parametrize(
    "each",
    [
        measured(40.0),
        measured(79.0),  # not quite twice as much as before
        measured(20.1),
        measured(40.0, late_share=0.01),
        measured(40.0, measured_at=NOW - dt.timedelta(days=6.9)),
        measured(40.0, machine=MACHINE | {"release": "6.9", "memory_bytes": 7_700_000_000}),
        measured(40.0, requests_planned=20_000, requests_recorded=20_000),  # 33 a second
        measured(40.0, verdict="INCONCLUSIVE"),  # a gap, no doubt
    ],
)
def test_sound_evidence_is_not_doubted(each: Measured) -> None:
    assert doubts(each) == {}


@pytest.mark.parametrize(
    ("changed", "name", "words"),
    [
        ({"per_s": 0.0}, "numbers", "run_creation is 0/s [38, 42] in 600 s: every figure must be a number above 0"),
        ({"per_s": math.nan}, "numbers", "run_creation is nan/s [38, 42] in 600 s: every figure must be a number"),
        ({"upper_per_s": math.inf}, "numbers", "every figure must be a number above 0"),
        ({"seconds": 0.0}, "numbers", "every figure must be a number above 0"),
        ({"lower_per_s": 41.0}, "numbers", "lower bound, rate and upper bound are not in order"),
        ({"upper_per_s": 1e6}, "numbers", "plausible is 0.04 to 400000"),
        ({"measured_at": NOW - WEEK * 1.1}, "fresh", "was measured 7.7 days ago; at most 7 days"),
        ({"measured_at": NOW + dt.timedelta(hours=1)}, "fresh", "was measured 3600 s in the future"),
        ({"measured_at": NOW - WEEK}, "fresh", "was measured at 2026-11-16 12:00:00Z, not after what is in force"),
        ({"requests_recorded": 23_999}, "whole", "has rows of 23,999 of 24,000 planned requests"),
        ({"requests_planned": 0, "requests_recorded": 0}, "whole", "has rows of 0 of 0 planned requests"),
        ({"samples": {}}, "whole", "names no samples"),
        ({"seconds": 10.0}, "units", "said to carry 40/s, but 24,000 requests in 10 s are 2400/s"),
        ({"late_share": 0.02}, "generator", "was measured with 2.0% of requests sent late; at most 1%"),
        ({"late_share": math.nan}, "generator", "was measured with nan% of requests sent late; at most 1%"),
        ({"machine": {}}, "machine", "does not say on which machine it was measured"),
        (
            {"machine": OTHER_MACHINE},
            "machine",
            "was measured on 16 x a faster processor, the value in force on 2 x a processor",
        ),
    ],
)
def test_each_doubt_says_what_is_wrong(changed: Mapping[str, Any], name: str, words: str) -> None:
    assert words in doubts(msgspec.structs.replace(measured(40.0), **changed))[name]


@pytest.mark.parametrize(("per_s", "ratio"), [(81.0, "2.02"), (19.0, "0.475"), (2_400.0, "60")])
def test_more_than_twice_or_half_of_before_is_a_persons_to_look_at(per_s: float, ratio: str) -> None:
    assert doubts(measured(per_s)) == {
        "change": f"run_creation is {ratio} times what was measured before (40/s); at most 2 times"
    }
    assert doubts(measured(per_s), UNMEASURED) == {}  # then only its own requests and seconds can tell


def test_another_machine_is_believed_when_somebody_says_what_it_is_worth() -> None:
    told = Known(KNOWN.in_force, NOW, machine_worth=0.25)
    faster = measured(160.0, machine=OTHER_MACHINE)
    assert doubts(faster, told) == {}
    assert told.worth_of(CREATE, faster) == 0.25
    assert told.worth_of(CREATE, measured(40.0)) == 1.0
    later = Known(Provenance(measured={CREATE: msgspec.structs.replace(faster, worth=0.25)}), NOW + WEEK)
    again = measured(170.0, machine=OTHER_MACHINE, measured_at=NOW + WEEK)
    assert (doubts(again, later), later.worth_of(CREATE, again)) == ({}, 0.25)


def test_values_without_a_measurement_are_a_persons() -> None:
    nothing = RevisionFile(FORMAT, tables(run_creation=RateValue(10.0, 10)), Provenance(author="somebody"))
    assert doubts_about(nothing, KNOWN) == (
        Finding("measured", "the file holds no measurement, only values", forced=False),
    )


def test_only_rates_are_measured() -> None:
    assert "live_runs: not a rate" in str(doubts_about(measured_file({Limit.LIVE_RUNS: measured(40.0)}), KNOWN))


def test_a_value_that_its_evidence_does_not_bear_out_is_doubted() -> None:
    file = measured_file({CREATE: measured(40.0)})
    default = msgspec.structs.replace(file.limits.default, run_creation=RateValue(10.0, 10))
    apart = msgspec.structs.replace(file, limits=msgspec.structs.replace(file.limits, default=default))
    assert [each.refusal for each in doubts_about(apart, KNOWN)] == [
        "run_creation is 10/s in the table, and 25% of its lower bound is 9.5/s"
    ]


def test_one_doubt_is_told_once_for_all_limits() -> None:
    file = measured_file({limit: measured(40.0, samples={}) for limit in (CREATE, Limit.TICK)})
    assert doubts_about(file, UNMEASURED) == (
        Finding("whole", "run_creation names no samples; tick names no samples", forced=False),
    )


def test_machines_of_one_kind_may_differ_in_kernel_and_a_little_memory() -> None:
    assert is_same_kind(MACHINE, MACHINE | {"release": "9"})
    assert not is_same_kind(MACHINE, MACHINE | {"memory_bytes": 16_000_000_000})
    assert not is_same_kind(MACHINE, {name: value for name, value in MACHINE.items() if name != "memory_bytes"})
