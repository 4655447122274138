"""The auditor finds what is wrong with a trace: each test breaks a sound one in one way."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest

from tests.campaigns.quota_audit import Behaviour, Cell, Told, faults_of
from tests.campaigns.quota_trace import Trace, read_traces
from tests.service.quota.exact import ExactLimiter

PER_S, BURST, S = Fraction("10.29"), 11, 1_000_000
START_US = 1_800_000_000 * S


def sound(behaviour: Behaviour, rate: Fraction) -> Cell:
    """Return a minute of requests at a steady rate, decided by the reference."""
    limiter, trace, told, number = ExactLimiter(), Trace(), Told(), 0
    while (at_us := START_US + int(number * S / rate)) <= START_US + 60 * S:
        number += 1
        trace.asked_us.append(at_us)
        refused = any(limiter.take(at_us, [("a", PER_S, BURST)]))
        (trace.refused_us if refused else trace.admitted_us).append(at_us)
    told.admitted, told.refused = len(trace.admitted_us), len(trace.refused_us)
    told.first_retries = 1 if behaviour is Behaviour.OBEDIENT else 0
    return Cell("run_creation", behaviour, 1, PER_S, BURST, trace, told)


def greedy() -> Cell:
    return sound(Behaviour.GREEDY, 3 * PER_S)


def steady() -> Cell:
    return sound(Behaviour.STEADY, PER_S * Fraction("0.99"))


def obedient() -> Cell:
    return sound(Behaviour.OBEDIENT, 3 * PER_S)


@pytest.mark.parametrize("make", [greedy, steady, obedient])
def test_nothing_is_found_in_what_the_reference_decides(make: Callable[[], Cell]) -> None:
    assert faults_of(make(), 58) == []


def test_a_greedy_client_gets_exactly_what_is_due() -> None:
    assert greedy().entitled() == (627, 627)


def admit_two_more(cell: Cell) -> None:
    for at_us in cell.trace.refused_us[100:102]:
        admit(cell, at_us)


def admit(cell: Cell, at_us: int) -> None:
    cell.trace.refused_us.remove(at_us)
    cell.trace.admitted_us = sorted([*cell.trace.admitted_us, at_us])
    cell.told.admitted, cell.told.refused = cell.told.admitted + 1, cell.told.refused - 1


def refuse(cell: Cell, numbers: range) -> None:
    for at_us in [cell.trace.admitted_us[number] for number in numbers]:
        cell.trace.admitted_us.remove(at_us)
        cell.trace.refused_us = sorted([*cell.trace.refused_us, at_us])
        cell.told.admitted, cell.told.refused = cell.told.admitted - 1, cell.told.refused + 1


def keep_silent_for_two_seconds(cell: Cell) -> None:
    asked_us = [at_us for at_us in cell.trace.asked_us if not 30 * S < at_us - START_US < 32 * S]
    cell.trace, limiter = Trace(asked_us), ExactLimiter()
    for at_us in asked_us:
        refused = any(limiter.take(at_us, [("a", PER_S, BURST)]))
        (cell.trace.refused_us if refused else cell.trace.admitted_us).append(at_us)
    cell.told.admitted, cell.told.refused = len(cell.trace.admitted_us), len(cell.trace.refused_us)


def let_everything_pass(cell: Cell) -> None:
    cell.trace.admitted_us, cell.trace.refused_us = list(cell.trace.asked_us), []
    cell.told.admitted, cell.told.refused = len(cell.trace.asked_us), 0


def end_after_half_a_minute(cell: Cell) -> None:
    trace = cell.trace
    for stamps in (trace.asked_us, trace.admitted_us, trace.refused_us):
        stamps[:] = [at_us for at_us in stamps if at_us - START_US < 30 * S]
    cell.told.admitted, cell.told.refused = len(trace.admitted_us), len(trace.refused_us)


@pytest.mark.parametrize(
    ("make", "spoil", "found"),
    [
        (greedy, admit_two_more, ["a window admits", "629 admitted, 627 due"]),
        (greedy, lambda cell: refuse(cell, range(20, 22)), ["625 admitted, 627 due"]),
        (greedy, keep_silent_for_two_seconds, ["every token was asked for during 28.0 s only, not 58"]),
        (greedy, let_everything_pass, ["a window admits", "every token was asked for during 0.0 s only, not 58"]),
        (
            greedy,
            end_after_half_a_minute,
            ["asked for 30.0 s only", "every token was asked for during 30.0 s only, not 58"],
        ),
        (greedy, lambda cell: setattr(cell.told, "failed", 1), ["1 requests failed"]),
        (greedy, lambda cell: setattr(cell.told, "admitted", 1), ["Redis admitted 628, but clients were told of 1"]),
        (greedy, lambda cell: setattr(cell.told, "refused", 1), ["Redis refused"]),
        (
            steady,
            lambda cell: refuse(cell, range(5, 6)),
            ["1 of a client at 0.99 R refused (they reached Redis up to 0.00 s late"],
        ),
        (obedient, lambda cell: setattr(cell.told, "first_retries_refused", 1), ["1 of 1 first retries refused"]),
        (obedient, lambda cell: setattr(cell.told, "first_retries", 0), ["nobody had to retry"]),
    ],
)
def test_each_fault_is_found(make: Callable[[], Cell], spoil: Callable[[Cell], None], found: list[str]) -> None:
    cell = make()
    spoil(cell)
    faults = faults_of(cell, 58)
    assert len(faults) == len(found)
    assert all(start in fault for fault, start in zip(faults, found, strict=True)), faults


def test_a_pause_at_the_beginning_shortens_what_is_looked_at() -> None:
    cell = greedy()
    trace = cell.trace
    trace.asked_us = [trace.asked_us[0] - 5 * S, *trace.asked_us]
    trace.admitted_us = [trace.asked_us[0], *trace.admitted_us]
    cell.told.admitted += 1
    assert cell.entitled() == (627, 627)
    assert faults_of(cell, 58) == []


def test_a_greedy_client_may_be_off_by_one() -> None:
    cell = greedy()
    refuse(cell, range(20, 21))
    assert faults_of(cell, 58) == []


def test_what_monitor_tells_is_read_as_requests_and_admissions() -> None:
    key = '"plimsoll:rate:{aaaa-1}:run_creation"'
    other = '"plimsoll:rate:{bbbb-2}:subrun_spawn"'
    asked = '[0 unix:/tmp/redis.sock] "EVALSHA" "abc" "1"'
    lines = f"""
+1800000000.000010 {asked} {key} "10290" "11"
+1800000000.000012 [0 lua] "TIME"
+1800000000.000014 [0 lua] "HMGET" {key} "level" "at" "rate"
+1800000000.000016 [0 lua] "HSET" {key} "level" "1000000000" "at" "1800000000000012" "rate" "10290"
+1800000000.000020 {asked} {key} "10290" "11"
+1800000000.000022 [0 lua] "HMGET" {key} "level" "at" "rate"
+1800000000.000030 {asked} {other} "2140" "5"
+1800000000.000032 [0 lua] "HSET" {other} "level" "1000000000" "at" "1800000000000031" "rate" "2140"
+1800000000.000040 [0 127.0.0.1:1] "PUBLISH" "plimsoll:events:{{aaaa-1}}" "x"
+1800000000.000050 {asked} {other} "2140" "5"
""".encode().splitlines()
    at = 1_800_000_000 * S
    assert read_traces(lines) == {
        ("aaaa-1", "run_creation"): Trace([at + 10, at + 20], [at + 12], [at + 20]),
        ("bbbb-2", "subrun_spawn"): Trace([at + 30, at + 50], [at + 31], [at + 50]),
    }
