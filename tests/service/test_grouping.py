"""Calls that wait together travel together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from service.grouping import Grouping


class Echo:
    """Answers each call with ten times its number and remembers the groups."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def perform(self, calls: Sequence[int]) -> Sequence[int | Exception]:
        self.groups.append(list(calls))
        await self.gate.wait()
        if any(call < 0 for call in calls):
            raise ValueError("a negative call spoils its group")
        return [ValueError(f"refused {call}") if call == 13 else call * 10 for call in calls]


async def test_calls_of_one_turn_are_one_group() -> None:
    echo = Echo()
    grouping = Grouping(echo.perform)
    assert await asyncio.gather(*(grouping.submit(n) for n in range(5))) == [0, 10, 20, 30, 40]
    assert echo.groups == [[0, 1, 2, 3, 4]]


async def test_calls_gather_while_a_group_is_on_its_way() -> None:
    echo = Echo()
    echo.gate.clear()
    grouping = Grouping(echo.perform)
    first = grouping.submit(1)
    await asyncio.sleep(0)
    later = [grouping.submit(n) for n in (2, 3)]
    echo.gate.set()
    assert await asyncio.gather(first, *later) == [10, 20, 30]
    assert echo.groups == [[1], [2, 3]]


async def test_a_group_is_never_larger_than_most() -> None:
    echo = Echo()
    grouping = Grouping(echo.perform, most=2)
    await asyncio.gather(*(grouping.submit(n) for n in range(5)))
    assert echo.groups == [[0, 1], [2, 3], [4]]


async def test_a_refused_call_leaves_its_neighbours_alone() -> None:
    grouping = Grouping(Echo().perform)
    answers = await asyncio.gather(*(grouping.submit(n) for n in (1, 13, 2)), return_exceptions=True)
    assert [repr(answer) for answer in answers] == ["10", "ValueError('refused 13')", "20"]


async def test_a_call_that_spoils_its_group_is_found_by_performing_each_alone() -> None:
    echo = Echo()
    grouping = Grouping(echo.perform, retry_alone=lambda fault: isinstance(fault, ValueError))
    answers = await asyncio.gather(*(grouping.submit(n) for n in (1, -1, 2)), return_exceptions=True)
    assert [answers[0], answers[2]] == [10, 20]
    assert isinstance(answers[1], ValueError)
    assert echo.groups == [[1, -1, 2], [1], [-1], [2]]


async def test_without_leave_to_retry_the_whole_group_sees_the_fault() -> None:
    grouping = Grouping(Echo().perform)
    answers = await asyncio.gather(*(grouping.submit(n) for n in (1, -1)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [ValueError, ValueError]


async def test_a_caller_that_went_away_does_not_disturb_the_group() -> None:
    echo = Echo()
    echo.gate.clear()
    grouping = Grouping(echo.perform)
    gone, stays = grouping.submit(1), grouping.submit(2)
    await asyncio.sleep(0)
    gone.cancel()
    echo.gate.set()
    assert await stays == 20
    with pytest.raises(asyncio.CancelledError):
        await gone


async def test_drain_returns_when_every_call_is_answered() -> None:
    echo = Echo()
    grouping = Grouping(echo.perform, lanes=2)
    calls = [grouping.submit(n) for n in range(4)]
    await grouping.drain()
    assert [call.result() for call in calls] == [0, 10, 20, 30]


@pytest.mark.parametrize("lanes", [1, 2])
async def test_a_call_made_in_the_turn_in_which_every_lane_ends_is_performed(lanes: int) -> None:
    grouping = Grouping(Echo().perform, lanes=lanes, most=1)

    async def ask_twice(number: int) -> list[int]:
        return [await grouping.submit(number), await grouping.submit(number + 1)]

    async with asyncio.timeout(5):
        answers = await asyncio.gather(*(ask_twice(10 * lane) for lane in range(lanes)))
    assert answers == [[100 * lane, 100 * lane + 10] for lane in range(lanes)]
