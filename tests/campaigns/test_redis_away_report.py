"""The judge of the Redis campaign finds what is wrong: each test breaks a sound course of things in one way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from service.quota.limits import DEFAULT, Limit
from tests.campaigns.redis_away_report import Measured, Phase, Request, page

PHASES = [Phase("before", False, 0.0, 10.0, 0), Phase("is gone", True, 10.0, 20.0, 2)]


def sound() -> Measured:
    """Return ten seconds with Redis and ten without."""
    requests = [
        Request(kind, at_s + 0.1, 200, None, 5.0) for at_s in range(20) for kind in ("create", "poll", "greedy poll")
    ]
    sockets: list[tuple[float, int | None]] = [(at_s, None if at_s < 10 else 4503) for at_s in range(20)]
    return Measured(list(PHASES), requests, sockets, {"COMPLETED": 20}, 20, DEFAULT.rates[Limit.SNAPSHOT_POLL], 2)


def replace(measured: Measured, number: int, **changes: Any) -> None:
    measured.requests[number] = measured.requests[number]._replace(**changes)


def alarm(measured: Measured, number: int, processes: int) -> None:
    measured.phases[number] = dataclasses.replace(measured.phases[number], alarm=processes)


def hold_up(measured: Measured) -> None:
    replace(measured, 0, policy=Limit.RUN_CREATION, status=429)
    replace(measured, 1, late_ms=600.0, latency_ms=400.0)


def greed(measured: Measured) -> None:
    measured.requests += [Request("greedy poll", 15.0, 200, None, 5.0)] * 500


SPOILT: list[tuple[Callable[[Measured], None], list[str]]] = [
    (lambda m: None, []),
    (lambda m: m.statuses.update(COMPLETED=19, RUNNING=1), ["of 20 accepted runs: {'COMPLETED': 19, 'RUNNING': 1}"]),
    (lambda m: replace(m, 0, status=503), ["1 answers 503"]),
    (lambda m: replace(m, 0, status=-1), ["1 answers -1"]),
    (
        lambda m: replace(m, 0, policy=Limit.RUN_CREATION, status=429),
        ["before: 1 of 10 creates within the quota refused by the rate"],
    ),
    (lambda m: replace(m, 0, policy=Limit.LIVE_RUNS, status=429), []),
    (hold_up, []),
    (greed, ["is gone: 510 greedy polls admitted, 446 at most were due"]),
    (lambda m: alarm(m, 0, 1), ["before: 1 processes say that Redis is away"]),
    (lambda m: alarm(m, 1, 1), ["is gone: 1 processes say that Redis is away"]),
    (lambda m: m.sockets.append((5.0, 4503)), ["before: sockets {'4503': 1}"]),
    (lambda m: m.sockets.append((15.0, None)), ["is gone: sockets {'let in': 1}"]),
    (lambda m: m.sockets.append((11.0, None)), []),
]


@pytest.mark.parametrize(("spoil", "faults"), SPOILT)
def test_each_fault_is_found_and_nothing_else(spoil: Callable[[Measured], None], faults: list[str]) -> None:
    measured = sound()
    spoil(measured)
    assert measured.faults() == faults


def test_the_page_shows_every_phase_and_fault() -> None:
    measured = sound()
    measured.statuses = {"COMPLETED": 19}
    assert all(part in page(measured) for part in ("| before |", "| is gone |", "- of 20 accepted runs: "))
