"""One process of clients: `python -m tests.campaigns.quota_clients` takes its plan from stdin, tells what came of it.

Clients of several cells share the process; each has connections of its own. Instants of the plan are those of the
machine's monotonic clock, which all processes share.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Callable

import msgspec

from harness.client import Client
from harness.connection import Exchange
from tests.campaigns.quota_audit import STEADINESS, Behaviour, Told

GREED = 3.0  # times the rate
BEYOND = 5  # how many more than a burst greedy clients send at once, to begin with
STAGGER_S = 0.1  # between the beginnings of cells, so that the bursts of all do not meet


class Member(msgspec.Struct):
    """One client of a cell."""

    cell: int
    behaviour: Behaviour
    index: int  # among the cell's clients
    of: int
    per_s: float
    burst: int
    limit: str
    method: str
    path: str
    token: str
    body: str | None


class Plan(msgspec.Struct):
    """What one process does."""

    url: str
    start_at_s: float  # monotonic
    duration_s: float
    members: list[Member]


class Refusal(msgspec.Struct):
    """The part of a problem that says who refused."""

    policies: list[str] = msgspec.field(default_factory=list, name="violated-policies")


class Actor:
    """One client."""

    def __init__(self, plan: Plan, member: Member) -> None:
        self.told = Told()
        self._member = member
        self._start_at_s = plan.start_at_s + member.cell * STAGGER_S
        self._end_at_s = self._start_at_s + plan.duration_s
        self._client = Client(plan.url)
        body = None if member.body is None else member.body.encode()
        self._wire = self._client.wire(member.method, member.path, member.token, body)

    async def act(self) -> Told:
        """Ask until the end, then wait for all answers."""
        await asyncio.sleep(self._start_at_s - time.monotonic())
        await {
            Behaviour.GREEDY: self._be_greedy,
            Behaviour.STEADY: self._be_steady,
            Behaviour.OBEDIENT: self._be_obedient,
        }[self._member.behaviour]()
        await self._client.close()
        return self.told

    async def _be_greedy(self) -> None:
        at_once = range(self._member.index, self._member.burst + BEYOND, self._member.of)
        await asyncio.gather(*(self._ask() for _ in at_once))
        await self._on_schedule(self._member.per_s * GREED)

    async def _be_steady(self) -> None:
        await self._on_schedule(self._member.per_s * float(STEADINESS))

    async def _on_schedule(self, per_s: float) -> None:
        """Send at a cell's rate, its clients in turn, whatever becomes of the requests before."""
        under_way: list[asyncio.Task[bool]] = []
        for number in itertools.count(self._member.index, self._member.of):
            due_at_s = self._start_at_s + number / per_s
            if due_at_s > self._end_at_s:
                break
            await asyncio.sleep(due_at_s - time.monotonic())
            under_way.append(asyncio.create_task(self._ask()))
        await asyncio.gather(*under_way)

    async def _be_obedient(self) -> None:
        while time.monotonic() < self._end_at_s:
            exchanges = await asyncio.gather(*(self._exchange() for _ in range(self._member.burst + 1)))
            waits_s = [exchange.retry_after_s for exchange in exchanges if not self._count(exchange)]
            if not waits_s:
                continue
            await asyncio.sleep(max(waits_s))
            self.told.first_retries += 1
            self.told.first_retries_refused += not await self._ask()

    async def _ask(self) -> bool:
        return self._count(await self._exchange())

    async def _exchange(self) -> Exchange:
        return await self._client.exchange(self._wire)

    def _count(self, exchange: Exchange) -> bool:
        """Count an answer; tells whether the rate admitted it."""
        if exchange.status == 429:
            by_rate = self._member.limit in msgspec.json.decode(exchange.body, type=Refusal).policies
            self.told.refused += by_rate
            self.told.admitted += not by_rate
            self.told.refused_by_cap += not by_rate
            return not by_rate
        if exchange.status < 0 or exchange.status >= 500:
            self.told.failed += 1
        else:
            self.told.admitted += 1
        return True


async def act(plan: Plan) -> dict[int, Told]:
    """Let all clients act; returns what the clients of each cell were told."""
    told: dict[int, Told] = {}
    each = await asyncio.gather(*(Actor(plan, member).act() for member in plan.members))
    for member, one in zip(plan.members, each, strict=True):
        told.setdefault(member.cell, Told()).add(one)
    return told


def main(runner: Callable[..., dict[int, Told]] = asyncio.run) -> None:
    """Read the plan, act, write."""
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    sys.stdout.buffer.write(msgspec.json.encode(runner(act(plan))))


if __name__ == "__main__":
    main()
