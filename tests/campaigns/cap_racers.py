"""One process that races for places: `python -m tests.campaigns.cap_racers` takes rounds from stdin, tells what came.

It goes the service's own ways: creates and spawns through group commit, ends by cancelling and by turns of a worker,
tool calls by turns and by people's decisions, places of sockets by the leases' script. Callers ask again as soon as
they have their answer, so whenever a cap is full all others are contenders.

Mutants: the known ways to get it wrong, put in here to see that the auditor finds them.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import random
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgspec
import redis.asyncio
from sqlalchemy import text

import service.advance
import service.commits
import service.ledger
import service.quota.caps
from service.announce import Announcer
from service.approvals import decide_tool_call
from service.auth import Caller, Role
from service.changes import GroupOptions
from service.commits import Accepted, Commits, Create, Spawn
from service.db import Database
from service.doorbell import Doorbell
from service.errors import IllegalState, QuotaExceeded
from service.families import cancel_run
from service.guarded import connect_redis
from service.joins import FailurePolicy
from service.quota.limits import DEFAULT, LIFTED, Limit, Quota
from service.quota.socket_leases import Full, Lease, Leases, keys
from service.tallies import Tallies
from service.telemetry import configure_logging
from service.tick import Ticker
from service.workspaces import Agents

NO_METADATA = msgspec.Raw(b"{}")
MOST_CALLERS = 256
TURNS = 128  # runs in one batch
TICKERS = 2  # batches at a time, for tool calls
STALLED = 0.9  # share of batches that go on to the next worker before they are settled
LATE = 6  # workers that settle the same runs at once, where only the run itself is in the way
SHORT_LEASE_S = 0.05  # of holders that end without a word
LONG_LEASE_S = 3.0  # of a worker
DECIDE_EVERY_S = 0.05  # how often people look, where calls wait for room; so that most turns find none
SILENT = 0.05  # share of holders that do
HOLD_S = 1.0  # places change hands all the time, and most who ask find none
SOCKET_HOLD_S = 0.02  # the same for a socket
APPROVED = 0.2  # share of tool calls that are approved
CANCELLED = 0.5  # share of runs that are cancelled; a worker's turn ends the others
PATIENCE_S = 60.0  # for what was begun to end

PENDING_CALLS = text("""
    SELECT tool_call_id FROM tool_calls WHERE workspace_id = ANY(:ids) AND status = 'PENDING' ORDER BY random() LIMIT 4
""")
LEASES_END = text("""
    WITH held AS (
        SELECT run_id FROM runs WHERE workspace_id = ANY(:ids) AND ended_at IS NULL AND next_tick_at > now()
        FOR NO KEY UPDATE SKIP LOCKED
    )
    UPDATE runs SET next_tick_at = now() FROM held WHERE runs.run_id = held.run_id
""")
"""As if their workers had stalled: the next one claims the same runs, and all of them go on."""

LIVE_HOLDERS = text("""
    SELECT count(*) FROM runs WHERE workspace_id = ANY(:ids) AND ended_at IS NULL AND input_text <> ''
""")
OPERATOR = Caller(uuid.uuid4(), None, Role.OPERATOR, None)
CHILD = GroupOptions(failure_policy=FailurePolicy.IGNORE_FAILURE)


class Field(msgspec.Struct):
    """One workspace to race in."""

    workspace_id: uuid.UUID
    agent_id: uuid.UUID
    parents: list[uuid.UUID]  # runs that stay, into which is spawned
    users: list[uuid.UUID]


class Start(msgspec.Struct):
    """What the process is told at first."""

    name: str
    seed: int
    database_url: str
    redis_url: str
    mutant: str | None


class Round(msgspec.Struct):
    """One race."""

    limit: Limit
    attempts: int
    callers: int
    fields: list[Field]
    hold_s: float = HOLD_S  # longest that a run holds its place


class Told(msgspec.Struct):
    """What came of it for this process."""

    attempts: int = 0
    admitted: int = 0
    refused: dict[str, int] = msgspec.field(default_factory=dict)  # by limit
    failed: dict[str, int] = msgspec.field(default_factory=dict)  # anything else, by name
    took_s: float = 0.0


def quota_for(limit: Limit) -> Quota:
    """Return a quota under which only this cap counts, with its default value."""
    cap: dict[str, Any] = {limit.value: DEFAULT.cap(limit)}
    return replace(LIFTED, **cap)


class Racer:
    """One process's contenders."""

    def __init__(self, start: Start) -> None:
        self.name = start.name
        self.random = random.Random(start.seed)  # noqa: S311 - a race, no secret
        self.database = Database(start.database_url)
        self.client = connect_redis(start.redis_url)
        announcer = Announcer(self.client, Doorbell(start.redis_url))
        self.commits = Commits(self.database, announcer)
        # Not the service's own client, which gives up after a moment: this is about places, not about outages.
        self.sockets = redis.asyncio.from_url(start.redis_url, max_connections=2 * MOST_CALLERS)
        self.leases = (TwoSteps if start.mutant == "two steps" else Leases)(self.sockets)
        self.short = Leases(self.sockets, SHORT_LEASE_S)
        self.forgetful = start.mutant == "forgetful"

        self.ticker = Ticker(self.database, announcer, Agents(), Tallies(), LONG_LEASE_S)
        self._ends: set[asyncio.Task[None]] = set()
        self._over = asyncio.Event()  # told, not cancelled: a library may swallow a cancellation
        self.told = Told()
        self.refused: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()

    async def race(self, race: Round) -> Told:
        """Run one round."""
        self.told, self.refused, self.failed = Told(), Counter(), Counter()
        started_s = time.monotonic()
        if race.limit in (Limit.WEBSOCKETS, Limit.WEBSOCKETS_PER_USER):
            await self._together([self._open_sockets(race) for _ in range(race.callers)])
        elif race.limit in (Limit.PENDING_TOOL_CALLS, Limit.PENDING_TOOL_CALLS_PER_RUN):
            await self._race_calls(race)
        else:
            await self._race_runs(race)
        await asyncio.gather(*self._ends)
        self.told.took_s = time.monotonic() - started_s
        self.told.refused, self.told.failed = dict(self.refused), dict(self.failed)
        return self.told

    def _may_ask(self, race: Round, attempts: int = 1) -> bool:
        """Count attempts; False when there were enough."""
        if self.told.attempts >= race.attempts:
            return False
        self.told.attempts += attempts
        return True

    def _later(self, end: Coroutine[Any, Any, None]) -> None:
        """Let a place be given back by somebody else than the caller, who asks again at once."""
        task = asyncio.create_task(end)
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    @staticmethod
    async def _together(tasks: Sequence[Coroutine[Any, Any, None]]) -> None:
        async with asyncio.TaskGroup() as group:
            for task in tasks:
                group.create_task(task)

    # ---- runs

    async def _race_runs(self, race: Round) -> None:
        self._over.clear()
        turning = asyncio.create_task(self._turn_over())
        await self._together([self._accept_runs(race) for _ in range(race.callers)])
        ids = {"ids": [field.workspace_id for field in race.fields]}
        give_up_at = time.monotonic() + PATIENCE_S
        while time.monotonic() < give_up_at:
            async with self.database.read() as connection:
                if not (await connection.execute(LIVE_HOLDERS, ids)).scalar_one():
                    break
            await asyncio.sleep(0.02)
        self._over.set()
        await turning

    async def _turn_over(self) -> None:
        """Do a worker's work."""
        while not self._over.is_set():
            try:
                claims = await self.ticker.claim(TURNS)
                if claims:
                    await self.ticker.settle(claims, await self.ticker.outcomes(claims))
            except Exception as fault:  # as a worker does: its runs are due again when their leases end
                self.failed[f"a turn: {type(fault).__name__}"] += 1
                claims = []
            if not claims:
                await asyncio.sleep(0.005)

    async def _accept_runs(self, race: Round) -> None:
        quota = quota_for(race.limit)
        while self._may_ask(race):
            try:
                accepted = await self.commits.submit(self._run(race, quota))
            except QuotaExceeded as refusal:
                self.refused[refusal.limit] += 1
                continue
            except Exception as fault:
                self.failed[type(fault).__name__] += 1
                continue
            self.told.admitted += 1
            if self.random.random() < CANCELLED:
                self._later(self._cancel(accepted, self.random.random() * race.hold_s))

    def _run(self, race: Round, quota: Quota) -> Create | Spawn:
        """Return one more run, a parent or a child as the cap has it."""
        field = self.random.choice(race.fields)
        parent = race.limit is Limit.LIVE_PARENT_RUNS or (race.limit is Limit.LIVE_RUNS and self.random.random() < 0.5)
        if parent:
            return Create(field.workspace_id, field.agent_id, self.name, "", NO_METADATA, 0, 60.0, quota)
        spawner = self.random.choice(field.parents)
        return Spawn(spawner, field.workspace_id, field.agent_id, self.name, NO_METADATA, None, quota, CHILD)

    async def _cancel(self, accepted: Accepted, after_s: float) -> None:
        await asyncio.sleep(after_s)
        with suppress(IllegalState):  # a turn was faster
            async with self.database.begin() as connection:
                await cancel_run(connection, accepted.run_id)

    # ---- tool calls

    async def _race_calls(self, race: Round) -> None:
        alone = race.limit is Limit.PENDING_TOOL_CALLS_PER_RUN
        self._over.clear()
        deciding = asyncio.create_task(self._decide(race, 0.002 if alone else DECIDE_EVERY_S))
        await self._together([self._request_calls(race, alone=alone) for _ in range(TICKERS)])
        self._over.set()
        await deciding

    async def _request_calls(self, race: Round, *, alone: bool) -> None:
        """Take turns at which runs ask for tool calls; `alone`: as many workers, all but one too late, at once."""
        ids = {"ids": [field.workspace_id for field in race.fields]}
        while self.told.attempts < race.attempts:
            batches = [claims] if (claims := await self.ticker.claim(TURNS)) else []
            while alone and claims and len(batches) < LATE and self.random.random() < STALLED:
                async with self.database.begin() as connection:
                    await connection.execute(LEASES_END, ids)
                if claims := await self.ticker.claim(TURNS):
                    batches.append(claims)
            if not batches:
                await asyncio.sleep(0.001)
                continue
            outcomes = await asyncio.gather(*map(self.ticker.outcomes, batches))
            self.told.attempts += sum(outcome.quota is not None for found in outcomes for outcome in found.values())
            await self._together([self.ticker.settle(*each) for each in zip(batches, outcomes, strict=True)])

    async def _decide(self, race: Round, pause_s: float) -> None:
        """Do what people do: approve some calls, reject the others."""
        ids = {"ids": [field.workspace_id for field in race.fields]}
        while not self._over.is_set():
            async with self.database.read() as connection:
                waiting = (await connection.execute(PENDING_CALLS, ids)).scalars().all()
            for tool_call_id in waiting:
                with suppress(IllegalState):  # somebody else was faster
                    async with self.database.begin() as connection:
                        approve = self.random.random() < APPROVED
                        await decide_tool_call(connection, OPERATOR, tool_call_id, approve=approve)
            await asyncio.sleep(pause_s)

    # ---- sockets

    async def _open_sockets(self, race: Round) -> None:
        quota = quota_for(race.limit)
        while self._may_ask(race):
            field = self.random.choice(race.fields)
            per_user = race.limit is Limit.WEBSOCKETS_PER_USER
            user_id = self.random.choice(field.users) if per_user else uuid.uuid4()
            lease = Lease(f"{self.name}:{self.random.getrandbits(64):x}", field.workspace_id, user_id)
            silent = self.random.random() < SILENT
            full = await (self.short if silent else self.leases).take(lease, quota)
            if full is not None:
                self.refused[full.limit] += 1
                continue
            self.told.admitted += 1
            if silent:
                continue
            if not self.forgetful:
                self._later(self._give_back(lease))

    async def _give_back(self, lease: Lease) -> None:
        await asyncio.sleep(self.random.random() * SOCKET_HOLD_S)
        await self.leases.give_back(lease)


class TwoSteps(Leases):
    """A mutant: looks how many there are, and takes a place in a second step."""

    def __init__(self, client: redis.asyncio.Redis, lease_s: float = 15.0) -> None:
        super().__init__(client, lease_s)
        self._two = client

    async def take(self, lease: Lease, quota: Quota) -> Full | None:
        for key, limit in zip(keys(lease), (Limit.WEBSOCKETS, Limit.WEBSOCKETS_PER_USER), strict=True):
            most, held = quota.cap(limit), await self._two.zcard(key)
            if most is not None and held >= most:
                return Full(limit, held)
        for key in keys(lease):
            await self._two.zadd(key, {lease.holder: int((time.time() + 15) * 1000)})
        return None


def unlock() -> None:
    """A mutant: count before the insert, do not lock the workspace, and take a moment in between."""
    service.quota.caps.LOCK = text("SELECT 1 FROM workspaces WHERE workspace_id = ANY(:ids)")
    for module, name in ((service.commits, "lock_and_count"), (service.ledger, "count_pending_tool_calls")):
        setattr(module, name, slowly(getattr(module, name)))


def slowly(read: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Return a reader that takes a moment after it has read."""

    async def slow(*arguments: Any) -> Any:
        found = await read(*arguments)
        await asyncio.sleep(0.02)
        return found

    return slow


MUTANTS: dict[str, Callable[[], None]] = {
    "unlocked": unlock,
    "two steps": lambda: None,  # of sockets: see Racer
    "forgetful": lambda: None,  # places of sockets are not given back
}


async def work() -> None:
    """Race round after round, until stdin ends."""
    configure_logging("warning")  # to stderr: stdout is for what is told
    lines = sys.stdin.buffer
    start = msgspec.json.decode(await asyncio.to_thread(lines.readline), type=Start)
    if start.mutant is not None:
        MUTANTS[start.mutant]()
    # A run that found no room looks again at once, and not after a while: or contenders would mostly sleep.
    service.advance.LOOK_FOR_ROOM = dt.timedelta(0)
    racer = Racer(start)
    while line := await asyncio.to_thread(lines.readline):
        told = await racer.race(msgspec.json.decode(line, type=Round))
        sys.stdout.buffer.write(msgspec.json.encode(told) + b"\n")
        sys.stdout.buffer.flush()
    await racer.client.aclose()
    await racer.sockets.aclose()
    await racer.database.close()


if __name__ == "__main__":
    asyncio.run(work())
