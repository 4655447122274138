"""Lends out ordinary workspaces so that the harness itself is never what exceeds a quota.

A quota refusal in smoke, burst or soak is a finding about the service, so no two live runs share a workspace (5 live
parents would be allowed; one is simple) and a workspace rests until the rates that a run used have refilled.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque

from harness.api import Api, Workspace
from service.quota.limits import DEFAULT, Limit

# The service's default rates, per workspace and second; a fresh workspace may use its whole burst capacity at once.
CREATE_RATE_PER_S, SPAWN_RATE_PER_S, SNAPSHOT_RATE_PER_S = (
    float(DEFAULT.rates[limit].per_s) for limit in (Limit.RUN_CREATION, Limit.SUBRUN_SPAWN, Limit.SNAPSHOT_POLL)
)
PREPARED_MAX = 200  # made beforehand at most, beyond what one group needs at once; the rest is rested and lent again
SHORTEST_RUN_S = 0.05  # a run that ends sooner than this needs a workspace made while the load runs
PREPARED_AT_ONCE = 8  # preparing calls side by side: preparation is not the load


def rest_s(children: int) -> float:
    """Return how long a workspace rests after a run with so many children until its rates are full again, seconds."""
    return max(1 / CREATE_RATE_PER_S, children / SPAWN_RATE_PER_S)


def prepared_count(runs: int, side_by_side: int, children: int, pause_s: float) -> int:
    """Return how many workspaces to make before the load starts."""
    if side_by_side == 1:
        # One run after another: as many as start while the first one rests.
        return min(runs, math.ceil(rest_s(children) / (pause_s + SHORTEST_RUN_S)) + 1)
    return min(runs, max(2 * side_by_side, PREPARED_MAX))


class Workspaces:
    """Workspaces of this measurement: prepared, lent, rested, lent again."""

    def __init__(self, api: Api, name: str, children: int) -> None:
        """`name` begins every workspace's name, so that an operator sees whose they are."""
        self._api = api
        self._name = name
        self._rest_s = rest_s(children)
        self._made = 0
        self._free: deque[tuple[float, Workspace]] = deque()  # loop time from which it may be lent, in that order

    async def prepare(self, count: int) -> None:
        """Make `count` workspaces; raises ServiceUnreachable or ServiceDeclined."""
        for begin in range(0, count, PREPARED_AT_ONCE):
            some = range(begin, min(count, begin + PREPARED_AT_ONCE))
            self._free.extend([(0.0, made) for made in await asyncio.gather(*(self._make() for _ in some))])

    async def borrow(self) -> Workspace:
        """Lend a rested workspace, or make one."""
        if self._free and self._free[0][0] <= asyncio.get_running_loop().time():
            return self._free.popleft()[1]
        return await self._make()

    def give_back(self, workspace: Workspace) -> None:
        """Take back a workspace in which nothing is left unfinished."""
        self._free.append((asyncio.get_running_loop().time() + self._rest_s, workspace))

    async def _make(self) -> Workspace:
        self._made += 1
        return await self._api.make_workspace(f"{self._name}-{self._made}")
