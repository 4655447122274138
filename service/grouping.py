"""Calls that wait in one turn of the event loop share one round trip.

While a group is on its way the next one gathers, so groups grow with the load and a lone call waits for nobody. This
is what makes reads and writes cheap under load; what a group does is its owner's business (`commits`, `api.snapshot`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar, cast

Call = TypeVar("Call")
Result = TypeVar("Result")


class Grouping(Generic[Call, Result]):
    """Hands waiting calls to `perform` as a group, at most `lanes` groups at a time.

    `perform` returns one result or one exception for each call, in order. If it raises, `retry_alone` decides: where it
    says so every call of the group is performed again by itself, so that one call's fault never fails its neighbours;
    otherwise all of them see the exception.
    """

    def __init__(
        self,
        perform: Callable[[Sequence[Call]], Awaitable[Sequence[Result | Exception]]],
        *,
        lanes: int = 1,
        most: int = 256,
        retry_alone: Callable[[Exception], bool] = lambda _: False,
    ) -> None:
        self._perform = perform
        self._lanes = lanes
        self._most = most
        self._retry_alone = retry_alone
        self._waiting: list[tuple[Call, asyncio.Future[Result]]] = []
        self._busy: set[asyncio.Task[None]] = set()

    def submit(self, call: Call) -> asyncio.Future[Result]:
        """Add a call to the next group; the future resolves to its result or raises its exception."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((call, future))
        if len(self._busy) < self._lanes:
            self._busy.add(asyncio.get_running_loop().create_task(self._work()))
        return future

    async def drain(self) -> None:
        """Return when every call submitted so far has its answer."""
        while self._busy:
            await asyncio.gather(*self._busy)

    async def _work(self) -> None:
        """Perform groups until nobody waits."""
        try:
            while self._waiting:
                group, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
                await self._settle(group)
        finally:
            # In this very turn of the loop, not in a done callback: a call made before that callback ran would find
            # every lane busy, and nobody would perform it.
            self._busy.discard(cast("asyncio.Task[None]", asyncio.current_task()))

    async def _settle(self, group: list[tuple[Call, asyncio.Future[Result]]]) -> None:
        """Perform one group and wake whoever waits for it."""
        try:
            results = await self._perform([call for call, _ in group])
            if len(results) != len(group):
                raise RuntimeError(f"{len(group)} calls were given {len(results)} results")
        except Exception as fault:
            if len(group) > 1 and self._retry_alone(fault):
                for member in group:
                    await self._settle([member])
                return
            results = [fault] * len(group)
        for (_, future), result in zip(group, results, strict=True):
            if future.done():  # its caller has gone away; what was written stays written
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
