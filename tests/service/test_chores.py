"""A chore, whatever it is: rung, stopped, drained, and logged when it fails."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from sqlalchemy.exc import OperationalError
from structlog.typing import EventDict

from service.chores import Chore


class Dishes(Chore):
    """Washes until it is let go."""

    def __init__(self, fault: Exception | None = None, *, deaf: bool = False) -> None:
        super().__init__("wash the dishes", "the dishes were not washed", "they are there tomorrow")
        self.begun = 0
        self.let_go = asyncio.Event()
        self._fault = fault
        self._deaf = deaf

    async def _do(self) -> None:
        self.begun += 1
        if self._fault is not None:
            raise self._fault
        while not self.let_go.is_set():
            with suppress(*([asyncio.CancelledError] if self._deaf else [])):
                await self.let_go.wait()


async def test_rings_while_one_is_going_on_are_one_and_the_next_ring_begins_another() -> None:
    dishes = Dishes()
    await dishes.idle()  # nothing is going on
    dishes.ring()
    dishes.ring()
    await asyncio.sleep(0)
    dishes.ring()
    dishes.let_go.set()
    await dishes.idle()
    assert dishes.begun == 1
    dishes.ring()
    await dishes.idle()
    assert dishes.begun == 2


async def test_told_to_stop_it_ends_what_it_does_and_begins_nothing_more() -> None:
    dishes = Dishes()
    dishes.ring()
    await asyncio.sleep(0)
    dishes.stop()
    dishes.let_go.set()
    await dishes.idle()
    dishes.ring()
    await dishes.idle()
    assert dishes.begun == 1


@pytest.mark.parametrize("rung", [True, False], ids=["going on", "never rung"])
async def test_draining_waits_for_what_is_going_on(rung: bool) -> None:
    dishes = Dishes()
    if rung:
        dishes.ring()
        await asyncio.sleep(0)
    asyncio.get_running_loop().call_soon(dishes.let_go.set)
    await dishes.drain(60.0)
    dishes.ring()
    await dishes.idle()
    assert dishes.begun == rung
    assert dishes._task is None or not dishes._task.cancelled()


async def test_draining_gives_up_what_takes_too_long() -> None:
    dishes = Dishes()
    dishes.ring()
    await asyncio.sleep(0)
    await dishes.drain(0.0)
    assert dishes._task is not None
    assert dishes._task.cancelled()


async def test_draining_leaves_behind_what_cannot_even_be_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.chores.CANCEL_S", 0.0)
    dishes = Dishes(deaf=True)
    dishes.ring()
    await asyncio.sleep(0)
    await dishes.drain(0.0)
    assert dishes._task is not None
    assert not dishes._task.done()
    dishes.let_go.set()
    await dishes.idle()


async def test_an_outage_is_one_line_and_a_bug_has_its_traceback(logged: list[EventDict]) -> None:
    outage, bug = OperationalError("SELECT 1", {}, ConnectionRefusedError("nobody there")), KeyError("spoon")
    for fault in (outage, bug):
        dishes = Dishes(fault)
        dishes.ring()
        await dishes.idle()
    assert logged == [
        {
            "event": "the dishes were not washed; they are there tomorrow",
            "log_level": "warning",
            "fault": "nobody there",
        },
        {"event": "the dishes were not washed", "log_level": "error", "exc_info": bug},
    ]
