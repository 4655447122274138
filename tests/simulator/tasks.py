"""What the engine takes from asyncio, for a world with a clock and a scheduler of its own.

A `Task` is a coroutine that the world lets go on, one point after the other; `Loop` stands in place of the module
`asyncio` in those modules of the engine that wait outside of the database. It has what they use and nothing else.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from tests.simulator.database import switch

Work = Coroutine[Any, Any, Any]


class Task:
    """Something under way: in the hands of a caller, or of one of a worker's tasks."""

    def __init__(self, work: Work, wakes_at: dt.datetime) -> None:
        self.work = work
        self.wakes_at = wakes_at  # asleep until then
        self._cancels = 0  # how often it was cancelled and has not been told
        self._told = 0  # how often it was told and has not taken it back
        self._over = False

    def go_on(self) -> bool:
        """Let it go on to its next point; False when it is over."""
        try:
            if self._cancels:
                self._cancels, self._told = 0, self._told + 1
                self.work.throw(asyncio.CancelledError())
            else:
                self.work.send(None)
        except BaseException:
            self._over = True
            raise
        return True

    def is_awake(self, now: dt.datetime) -> bool:
        """Whether it can go on."""
        return self._cancels > 0 or self.wakes_at <= now

    def close(self) -> None:
        """Never let it go on."""
        self._over = True
        self.work.close()

    # ---- as asyncio.Task has it --------------------------------------------------------------------------------------

    def cancel(self) -> None:
        self._cancels += 1

    def uncancel(self) -> int:
        self._told -= 1
        return self._told

    def done(self) -> bool:
        return self._over


class Loop:
    """In place of asyncio, for the task that is going on."""

    CancelledError = asyncio.CancelledError

    def __init__(self, now: Callable[[], dt.datetime], start: Callable[[Work], Task]) -> None:
        self._now = now
        self._start = start
        self.current: Task | None = None

    def current_task(self) -> Task | None:
        return self.current

    def create_task(self, work: Work, *, name: str | None = None) -> Task:
        return self._start(work)

    async def sleep(self, seconds: float) -> None:
        assert self.current is not None
        self.current.wakes_at = self._now() + dt.timedelta(seconds=seconds)
        await switch()

    async def gather(self, *works: Awaitable[Any]) -> list[Any]:
        """Wait for them one after the other: the world has them one at a time."""
        return [await work for work in works]

    async def shield(self, work: Awaitable[Any]) -> Any:
        return await work
