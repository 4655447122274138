"""Each guardrail by a table of what it lets through and what it says to the rest."""

from __future__ import annotations

import datetime as dt
from typing import Any

import msgspec
import pytest

from service.quota.guardrails import GUARDRAILS, Finding, ask, implausible, stale_input, step_limit
from service.quota.tables import FIRST, Provenance, RateValue
from tests.quotatables import rate, tables

NOW = dt.datetime(2026, 11, 23, 12, tzinfo=dt.UTC)
NOBODY = Provenance()
DIGEST = "0" * 64


@pytest.mark.parametrize(
    "default",
    [
        {},
        {"run_creation": rate(12.348, 13)},  # exactly 20 % more
        {"run_creation": rate(8.232, 9)},  # exactly 20 % less
        {"live_parent_runs": 6, "websockets": 24, "live_runs": 10},
        {"pending_tool_calls_per_run": 2},  # doubled, but by one
        {"pending_subruns": 3},  # a quarter less, but by one
    ],
)
def test_a_step_within_20_percent_or_of_one_is_allowed(default: dict[str, Any]) -> None:
    assert step_limit(FIRST, tables(**default), NOBODY, NOW) is None


@pytest.mark.parametrize(
    ("default", "sentence"),
    [
        ({"run_creation": rate(12.349, 11)}, "default.run_creation.per_s 10.29 -> 12.349 (+20.0%)"),
        ({"run_creation": rate(8.231, 11)}, "default.run_creation.per_s 10.29 -> 8.231 (-20.0%)"),
        ({"tick": rate(41, 50)}, "default.tick.burst 41 -> 50 (+22.0%)"),
        ({"live_runs": 15}, "default.live_runs 12 -> 15 (+25.0%)"),
        ({"live_runs": None}, "default.live_runs 12 -> lifted"),
        ({"tick": None}, "default.tick.per_s 41 -> lifted; default.tick.burst 41 -> lifted"),
        (
            {"live_parent_runs": 50, "live_runs": 120},
            "default.live_parent_runs 5 -> 50 (+900.0%); default.live_runs 12 -> 120 (+900.0%)",
        ),
    ],
)
def test_a_larger_step_is_refused_with_its_numbers(default: dict[str, Any], sentence: str) -> None:
    assert step_limit(FIRST, tables(**default), NOBODY, NOW) == f"{sentence}: at most 20% in one revision"


def test_a_lifted_limit_of_calibration_that_is_set_is_a_step_without_a_size() -> None:
    proposed = msgspec.structs.replace(FIRST, calibration=msgspec.structs.replace(FIRST.calibration, live_runs=12))
    assert step_limit(FIRST, proposed, NOBODY, NOW) == (
        "calibration.live_runs lifted -> 12: at most 20% in one revision"
    )


@pytest.mark.parametrize(
    ("default", "words"),
    [
        ({"live_runs": 0}, "default.live_runs 0 (plausible: 1 to 100000)"),
        ({"websockets": 100_001}, "default.websockets 100001 (plausible: 1 to 100000)"),
        ({"tick": rate(0.001, 1)}, "default.tick.per_s 0.001 (plausible: 0.01 to 100000)"),
        ({"tick": rate(200_000, 1)}, "default.tick.per_s 200000 (plausible: 0.01 to 100000)"),
        ({"tick": RateValue(float("nan"), 1)}, "default.tick.per_s nan (plausible: 0.01 to 100000)"),
        ({"tick": RateValue(-1.0, 0)}, "default.tick.burst 0 (plausible: 1 to 100000)"),
        ({"tick": RateValue(float("inf"), 1)}, "default.tick.per_s inf (plausible: 0.01 to 100000)"),
        ({"live_parent_runs": 13}, "default.live_parent_runs is above default.live_runs"),
        ({"pending_subruns": 13}, "default.pending_subruns is above default.live_runs"),
        ({"websockets_per_user": 21}, "default.websockets_per_user is above default.websockets"),
        ({"pending_tool_calls_per_run": 7}, "default.pending_tool_calls_per_run is above default.pending_tool_calls"),
    ],
)
def test_values_under_which_nothing_works_are_implausible(default: dict[str, Any], words: str) -> None:
    assert words in (implausible(FIRST, tables(**default), NOBODY, NOW) or "")


def test_the_users_table_is_plausible() -> None:
    assert implausible(FIRST, FIRST, NOBODY, NOW) is None


@pytest.mark.parametrize(
    ("provenance", "refusal"),
    [
        (Provenance(), None),
        (Provenance(author="me", note="more for everybody"), None),
        (Provenance(samples={"m": DIGEST}, measured_at=NOW), None),
        (Provenance(measured_at=NOW - dt.timedelta(days=7)), None),
        (Provenance(measured_at=NOW + dt.timedelta(minutes=5)), None),
        (Provenance(measured_at=NOW - dt.timedelta(days=7, hours=12)), "measured 7.5 days ago; at most 7 days"),
        (Provenance(measured_at=NOW + dt.timedelta(minutes=6)), "measured 360 s in the future"),
        (
            Provenance(samples={"m": DIGEST}),
            "1 sample sets are named and not when they were taken (measured_at)",
        ),
    ],
)
def test_only_a_measurement_can_be_stale(provenance: Provenance, refusal: str | None) -> None:
    assert stale_input(FIRST, FIRST, provenance, NOW) == refusal


def test_what_is_implausible_cannot_be_forced_and_the_rest_can() -> None:
    findings = ask(GUARDRAILS, FIRST, tables(live_runs=0), Provenance(samples={"m": DIGEST}), NOW, force=True)
    assert [(each.guardrail, each.forced) for each in findings] == [
        ("implausible values", False),
        ("step limit", True),
        ("stale input", True),
    ]


def test_who_does_not_force_hears_the_same_and_is_refused() -> None:
    assert ask(GUARDRAILS, FIRST, tables(live_runs=20), NOBODY, NOW, force=False) == (
        Finding("step limit", "default.live_runs 12 -> 20 (+66.7%): at most 20% in one revision", False),
    )
