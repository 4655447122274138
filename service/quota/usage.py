"""What a workspace uses of each limit, who holds its caps, and when a retry succeeds.

For the quota page and for `quotas explain`: read at the moment of asking, from where the limits themselves count. A
rate is asked with gcra.lua on a copy of its bucket, so nothing is spent and no arithmetic is written twice. What only
Redis knows is null while Redis is away.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
import hashlib
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import redis.asyncio
from redis.exceptions import NoScriptError, RedisError
from sqlalchemy import text

from service.db import Database
from service.quota.limits import CAPS, RATES, Limit, Quota, Rate
from service.quota.overrides import overrides_of
from service.quota.rates import MICROSECONDS, bucket
from service.quota.socket_leases import Lease, keys
from service.quota.ticks import DIGEST as TICKS_DIGEST
from service.quota.ticks import SCRIPT as TICKS_SCRIPT
from service.runs import RunStatus
from service.workspaces import QuotaClass

MOST_HOLDERS = 100
"""Holders of one cap that are named; `used` counts all of them."""

MOST_TOKENS = 500
"""Tokens of a workspace that are looked up for who holds its sockets."""


class Kind(enum.StrEnum):
    """How a limit counts."""

    RATE = "rate"  # requests a second
    CAP = "cap"  # things held at one time


class Per(enum.StrEnum):
    """Within what a limit counts."""

    WORKSPACE = "workspace"
    RUN = "run"
    USER = "user"  # a token


WITHIN = {
    Limit.PENDING_SUBRUNS: Per.RUN,
    Limit.PENDING_TOOL_CALLS_PER_RUN: Per.RUN,
    Limit.WEBSOCKETS_PER_USER: Per.USER,
}
"""Limits that do not count within the whole workspace."""


class Holder(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who holds places under a cap. Which fields there are depends on the cap."""

    run_id: uuid.UUID | None = None
    parent_run_id: uuid.UUID | None = None
    tool_call_id: uuid.UUID | None = None
    socket: str | None = None
    user_id: uuid.UUID | None = None  # the token's id
    holds: int = 1  # places
    status: RunStatus | None = None  # of the run
    since: dt.datetime | None = None
    until: dt.datetime | None = None  # when the place lapses unless its holder renews it
    due_at: dt.datetime | None = None  # of a run: when a worker looks at it next, if anything but an event makes one


class LimitUse(msgspec.Struct, frozen=True):
    """One limit of one workspace, at one moment."""

    limit: Limit
    kind: Kind
    per: Per
    value: float | int | None  # a rate per second, or a cap; null: lifted
    burst: int | None  # of a rate: requests at once after a rest
    overridden: bool  # the value is the workspace's own
    used: int | None  # of the burst, or of the cap; of the one that holds most, where it counts per run or per user
    remaining: int | None  # null: lifted, or not known while Redis is away
    retry_after_s: float | None  # 0: at once; null: nobody can know, `retry_when` says what has to happen
    retry_at: dt.datetime | None  # the same as an instant
    retry_when: str | None
    holders: list[Holder]  # at most 100


class WorkspaceQuotas(msgspec.Struct, frozen=True):
    """What a workspace may use and does use."""

    workspace_id: uuid.UUID
    quota_class: QuotaClass
    revision: int  # in force
    shadow_revision: int | None  # asked beside it
    at: dt.datetime
    limits: list[LimitUse]


class _Level(NamedTuple):
    """What a bucket would say to a request now."""

    remaining: int
    wait_us: int


class _Held(NamedTuple):
    """A cap's count and its holders."""

    used: int | None
    holders: Sequence[Holder]


HEAD = text("SELECT quota_class, now() AS at FROM workspaces WHERE workspace_id = :workspace_id")
COUNTS = text("""
    SELECT count(*) AS live_runs, count(*) FILTER (WHERE parent_run_id IS NULL) AS live_parent_runs,
           coalesce(max(pending_subruns), 0) AS pending_subruns
    FROM runs WHERE workspace_id = :workspace_id AND ended_at IS NULL
""")
RUNS = text("""
    SELECT run_id, parent_run_id, status, pending_subruns, created_at, next_tick_at FROM runs
    WHERE workspace_id = :workspace_id AND ended_at IS NULL
      AND (NOT :parents OR parent_run_id IS NULL) AND (NOT :waited_for OR pending_subruns > 0)
    ORDER BY run_id LIMIT :most
""")
TOOL_CALLS = text("""
    SELECT tool_call_id, run_id, created_at, count(*) OVER () AS pending FROM tool_calls
    WHERE workspace_id = :workspace_id AND status = 'PENDING' ORDER BY tool_call_id LIMIT :most
""")
TOKENS = text("SELECT token_id FROM tokens WHERE workspace_id = :workspace_id ORDER BY token_id DESC LIMIT :most")


class Usage:
    """Reads what workspaces use."""

    def __init__(self, database: Database, client: redis.asyncio.Redis) -> None:
        self._database = database
        self._client = client
        self._script = (Path(__file__).parent / "gcra.lua").read_text()
        self._digest = hashlib.sha1(self._script.encode(), usedforsecurity=False).hexdigest()

    async def of(self, workspace_id: uuid.UUID, quota: Quota) -> WorkspaceQuotas:
        """Return what a workspace that exists uses of its quota."""
        mine = {"workspace_id": workspace_id}
        async with self._database.snapshot() as connection:
            head = (await connection.execute(HEAD, mine)).one()
            own = {each.limit for each in await overrides_of(connection, workspace_id)}
            counts = (await connection.execute(COUNTS, mine)).one()
            groups: list[list[Any]] = []
            for parents, waited_for in ((True, False), (False, False), (False, True)):
                asked = {**mine, "parents": parents, "waited_for": waited_for, "most": MOST_HOLDERS}
                groups.append(list(await connection.execute(RUNS, asked)))
            calls = (await connection.execute(TOOL_CALLS, {**mine, "most": MOST_HOLDERS})).all()
            tokens = [row.token_id for row in await connection.execute(TOKENS, {**mine, "most": MOST_TOKENS})]
        levels, sockets = await asyncio.gather(
            self._levels(workspace_id, quota.rates), self._sockets(workspace_id, tokens)
        )
        per_run = Counter(row.run_id for row in calls)
        held = sockets | {
            Limit.LIVE_PARENT_RUNS: _Held(counts.live_parent_runs, [_run(row) for row in groups[0]]),
            Limit.LIVE_RUNS: _Held(counts.live_runs, [_run(row) for row in groups[1]]),
            Limit.PENDING_SUBRUNS: _Held(
                counts.pending_subruns, [_run(row, holds=row.pending_subruns) for row in groups[2]]
            ),
            Limit.PENDING_TOOL_CALLS: _Held(
                calls[0].pending if calls else 0,
                [Holder(run_id=row.run_id, tool_call_id=row.tool_call_id, since=row.created_at) for row in calls],
            ),
            Limit.PENDING_TOOL_CALLS_PER_RUN: _Held(
                max(per_run.values(), default=0), [Holder(run_id=each, holds=count) for each, count in per_run.items()]
            ),
        }
        limits = [_rate_use(limit, quota.rates.get(limit), levels, head.at, limit in own) for limit in RATES]
        limits += [_cap_use(limit, quota.cap(limit), held[limit], head.at, limit in own) for limit in CAPS]
        shadow = None if quota.shadow is None else quota.shadow.revision
        return WorkspaceQuotas(workspace_id, QuotaClass(head.quota_class), quota.revision or 0, shadow, head.at, limits)

    async def _levels(self, workspace_id: uuid.UUID, rates: dict[Limit, Rate]) -> dict[Limit, _Level] | None:
        """Return what each bucket would say to a request now; None while Redis is away."""
        try:
            answers = await self._look(workspace_id, rates)
            if any(isinstance(answer, NoScriptError) for answer in answers.values()):
                await self._client.script_load(self._script)
                await self._client.script_load(TICKS_SCRIPT)
                answers = await self._look(workspace_id, rates)
            for answer in answers.values():
                if isinstance(answer, Exception):
                    raise answer
        except (RedisError, OSError):
            return None
        return {limit: _level(limit, rates[limit], answer) for limit, answer in answers.items()}

    async def _look(self, workspace_id: uuid.UUID, rates: dict[Limit, Rate]) -> dict[Limit, Any]:
        """Take a token of a copy of each bucket, and throw the copy away, all in one transaction of Redis."""
        async with self._client.pipeline(transaction=True) as pipe:
            for limit, rate in rates.items():
                original = bucket(workspace_id, limit)
                copy = f"{original}:{uuid.uuid4().hex}"
                pipe.copy(original, copy)
                terms = (rate.thousandths, rate.burst)
                if limit is Limit.TICK:  # as a turn that comes for the first time
                    pipe.evalsha(TICKS_DIGEST, 1, copy, *terms, 0, 1)
                else:
                    pipe.evalsha(self._digest, 1, copy, *terms)
                pipe.delete(copy)
            answers = await pipe.execute(raise_on_error=False)
        return dict(zip(rates, answers[1::3], strict=True))

    async def _sockets(self, workspace_id: uuid.UUID, tokens: Sequence[uuid.UUID]) -> dict[Limit, _Held]:
        """Return who holds the workspace's places for sockets, and how many the busiest of its tokens holds."""
        pools = [keys(Lease("", workspace_id, workspace_id))[0]]
        pools += [keys(Lease("", workspace_id, token))[1] for token in tokens]
        try:
            async with self._client.pipeline(transaction=False) as pipe:
                pipe.time()
                for pool in pools:
                    pipe.zrange(pool, 0, -1, withscores=True)
                (seconds, micros), *found = await pipe.execute()
        except (RedisError, OSError):
            return dict.fromkeys((Limit.WEBSOCKETS, Limit.WEBSOCKETS_PER_USER), _Held(None, []))
        now_ms = seconds * 1000 + micros // 1000
        alive = [[(_text(holder), until_ms) for holder, until_ms in pool if until_ms > now_ms] for pool in found]
        users = {holder: token for token, pool in zip(tokens, alive[1:], strict=True) for holder, _ in pool}
        open_ = [
            Holder(socket=holder, user_id=users.get(holder), until=dt.datetime.fromtimestamp(until_ms / 1e3, dt.UTC))
            for holder, until_ms in alive[0]
        ]
        holding = [
            Holder(user_id=token, holds=len(pool)) for token, pool in zip(tokens, alive[1:], strict=True) if pool
        ]
        return {
            Limit.WEBSOCKETS: _Held(len(open_), open_[:MOST_HOLDERS]),
            Limit.WEBSOCKETS_PER_USER: _Held(
                max((each.holds for each in holding), default=0), sorted(holding, key=lambda each: -each.holds)
            ),
        }


def _level(limit: Limit, rate: Rate, answer: Any) -> _Level:
    """Read the answer of gcra.lua, or of ticks.lua, to one who asked a copy of the bucket."""
    if limit is Limit.TICK:
        _, admitted, left, early, _ = map(int, answer)
        return _Level(left + 1, 0) if admitted else _Level(0, -(-early // rate.thousandths))
    left, wait_us, refused = map(int, answer[0])
    return _Level(0, wait_us) if refused else _Level(left + 1, 0)


def _run(row: Any, holds: int = 1) -> Holder:
    return Holder(
        run_id=row.run_id,
        parent_run_id=row.parent_run_id,
        holds=holds,
        status=RunStatus(row.status),
        since=row.created_at,
        due_at=row.next_tick_at,
    )


def _rate_use(
    limit: Limit, rate: Rate | None, levels: dict[Limit, _Level] | None, at: dt.datetime, overridden: bool
) -> LimitUse:
    """Describe a rate; one that is lifted is used by nobody, as nothing counts it."""
    if rate is None:
        return LimitUse(limit, Kind.RATE, Per.WORKSPACE, None, None, overridden, None, None, 0.0, at, None, [])
    value = float(rate.per_s)
    if levels is None:
        away = "while Redis does not answer nobody knows"
        return LimitUse(
            limit, Kind.RATE, Per.WORKSPACE, value, rate.burst, overridden, None, None, None, None, away, []
        )
    remaining, wait_us = levels[limit]
    return LimitUse(
        limit,
        Kind.RATE,
        Per.WORKSPACE,
        value,
        rate.burst,
        overridden,
        rate.burst - remaining,
        remaining,
        wait_us / MICROSECONDS,
        at + dt.timedelta(microseconds=wait_us),
        None,
        [],
    )


ENDS = {
    Limit.LIVE_PARENT_RUNS: "when one of the holders ends",
    Limit.LIVE_RUNS: "when one of the holders ends",
    Limit.PENDING_SUBRUNS: "when a subrun of that parent ends",
    Limit.WEBSOCKETS: "when one of the holders closes; at the end of its lease if its process died",
    Limit.WEBSOCKETS_PER_USER: "when that user closes one; at the end of its lease if its process died",
    Limit.PENDING_TOOL_CALLS: "when one of the holders is approved or rejected",
    Limit.PENDING_TOOL_CALLS_PER_RUN: "when that run's call is approved or rejected",
}
"""What has to happen before there is room under a cap that is just used up."""


def _cap_use(limit: Limit, most: int | None, held: _Held, at: dt.datetime, overridden: bool) -> LimitUse:
    """Describe a cap."""
    remaining = None if most is None or held.used is None else max(0, most - held.used)
    is_known = held.used is not None or most is None
    has_room = is_known and remaining != 0
    when = None if has_room else _when(limit, most, held.used)
    return LimitUse(
        limit,
        Kind.CAP,
        WITHIN.get(limit, Per.WORKSPACE),
        most,
        None,
        overridden,
        held.used,
        remaining,
        0.0 if has_room else None,
        at if has_room else None,
        when,
        list(held.holders),
    )


def _when(limit: Limit, most: int | None, used: int | None) -> str:
    """Say what has to happen before there is room under a cap without any."""
    if most is None or used is None:
        return "while Redis does not answer no new socket is let in"
    if most == 0:
        return "not under a cap of 0"
    excess = used - most + 1
    return ENDS[limit] if excess == 1 else f"{ENDS[limit]}; {excess} have to, as more is held than the cap allows"


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode()
