"""Alarms ring at absolute instants, never before."""

import asyncio
import time
from collections.abc import Callable

import pytest

from harness.pacing import Alarm, LoopAlarm, TimerFd, alarm

KINDS: list[Callable[[Callable[[], None]], Alarm]] = [TimerFd, LoopAlarm, alarm]


@pytest.mark.parametrize("kind", KINDS)
async def test_an_alarm_rings_once_at_its_instant_and_never_before(kind: Callable[[Callable[[], None]], Alarm]) -> None:
    rung: list[int] = []
    over = asyncio.Event()

    def wake() -> None:
        rung.append(time.monotonic_ns())
        if len(rung) < 5:
            clock.set(due[len(rung)])
        else:
            over.set()

    begin = time.monotonic_ns()
    due = [begin - 5_000_000, *(begin + step * 3_300_000 for step in range(1, 5))]  # the first has passed
    clock = kind(wake)
    clock.set(due[0])
    await over.wait()
    clock.close()
    assert len(rung) == 5
    assert all(at >= wanted for at, wanted in zip(rung, due, strict=True))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_new_instant_replaces_the_one_before_and_a_closed_alarm_is_silent(
    kind: Callable[[Callable[[], None]], Alarm],
) -> None:
    rung: list[int] = []
    heard = asyncio.Event()

    def wake() -> None:
        rung.append(time.monotonic_ns())
        heard.set()

    clock = kind(wake)
    silent = kind(lambda: rung.append(-1))
    now = time.monotonic_ns()
    silent.set(now + 1_000_000)
    silent.close()
    silent.close()  # twice is once
    clock.set(now + 3_600 * 10**9)
    clock.set(now + 5_000_000)
    await heard.wait()
    clock.close()
    assert len(rung) == 1
    assert rung[0] >= now + 5_000_000
