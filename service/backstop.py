"""The tick backstop: a workspace over its tick rate is delayed, loses nothing, and takes nothing from others.

What is a turn?
    A token is paid for a turn whose step is due, when it is claimed. What else makes a run due is never delayed and
    pays nothing: the end of a wait or of a group's time, a child that ended, siblings to be cancelled. These are as
    many as runs and groups at most, and those are made by creates and spawns, which have rates of their own. What
    callers do (cancel, pause, resume, approve) is no turn.

States of a claimed turn
    free      it pays nothing, or the workspace's tick rate is lifted
    paid      it has its token, and is settled like any other
    delayed   there was none. It is settled too, without its step: deadlines and children are judged, and `step_due_at`
              moves to the time at which its token will be there. Its time is its place in the line: no two turns of a
              workspace are told the same, so each is claimed twice, once to be delayed and once to be taken.

    A run that was delayed is due a microsecond after its step (`pen.BEHIND`). That marks it: it has waited, so it goes
    before those who come for the first time; and it can be told to come earlier, when the rate has changed.

Invariants
    1. In no window of any length w are more than B + R * w turns of a workspace paid, by all workers together
       (ticks.lua). A step is taken by a paid turn alone.
    2. A delayed run stays a due row: nothing about it is kept anywhere else, so nothing can be lost. The line in Redis
       says only when the next one is told to come.
    3. It is never failed for it: a delay is no vain attempt.
    4. A change of the rate is seen by the workers a second after its commit at the latest, as every other limit:
       whoever was delayed under another rate is told to come at once, and to queue again.

Failures
    A worker dies between claim and settle: the tokens of its batch are spent, at most 128 (`claims.BATCH`), and its
    runs are due again when their leases end; then they pay again. So the workspace gets that many turns less.
    It dies with its knowledge of who was delayed: every worker that starts calls all who are delayed to come once more.
    It is told to stop: it calls those whom it knows of, so that they are known to others.
    A place in the line is not used (its run was cancelled, paused, ended): the token stays in the bucket. When most
    places are nobody's, those who stand behind are called to queue again, a few seconds later.
    A turn is fenced, waits for room for a tool call, or finds the lane to the outside full: its token is spent.
    Redis is away: each worker keeps the rates by itself, and counts that it did.
    Redis was emptied: buckets are full; those who come again find tokens, or are delayed once more.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from sqlalchemy import text

from service.db import Database
from service.quota.gate import Gate
from service.quota.inforce import Quotas
from service.quota.limits import Limit, Quota, Rate
from service.quota.refusals import name_of
from service.quota.ticks import Asked, TickRates
from service.tallies import Tallies

WHO_WAITS = text("""
    SELECT DISTINCT workspace_id FROM runs
    WHERE next_tick_at > now() AND next_tick_at = step_due_at + interval '1 microsecond'
""")
"""The workspaces with delayed runs: asked once by each worker. All runs with a time ahead are looked at."""

CALL = text("""
    WITH waiting AS (
        SELECT run_id FROM runs WHERE workspace_id = :workspace_id AND ended_at IS NULL
            AND next_tick_at > now() AND next_tick_at = step_due_at + interval '1 microsecond'
            AND (:everybody OR run_id = ANY(CAST(:run_ids AS uuid[])))
        FOR NO KEY UPDATE SKIP LOCKED
    )
    UPDATE runs SET step_due_at = now(), next_tick_at = now() + interval '1 microsecond'
    FROM waiting WHERE runs.run_id = waiting.run_id
""")
"""Whoever is locked is in a turn or in a caller's hands. Skipped, so that no lock is waited for out of order."""

PASSED_OVER = text("""
    SELECT run_id FROM runs WHERE workspace_id = :workspace_id AND ended_at IS NULL
        AND next_tick_at > now() + interval '1 microsecond' AND next_tick_at = step_due_at + interval '1 microsecond'
""")
"""Those who were locked: for the transaction that called the others: these are due a microsecond after it began."""

COUNT_WAITING = text("""
    SELECT count(*) FROM runs WHERE workspace_id = :workspace_id AND ended_at IS NULL
        AND next_tick_at > now() AND next_tick_at = step_due_at + interval '1 microsecond'
""")

LOOK_EVERY_S = 1.0
"""How often a worker compares the lines that it knows of with those who stand in them, seconds."""

FEW = 4
"""Places of a line that may be nobody's beside as many as are somebody's: to call everybody costs a claim for each, so
at most one for each run that was cancelled. Whoever is just being told his place is seen at the next look."""

CALL_AGAIN_S = 0.1
"""How long a worker rests before it calls those who were locked once more, seconds."""


class Paying(NamedTuple):
    """A turn whose step is due."""

    workspace_id: uuid.UUID
    waited: bool  # it was delayed before, and comes at the time that it was told


class Delay(NamedTuple):
    """What a turn without a token is told."""

    by: dt.timedelta
    rate: Rate  # under which it was delayed


class _Waiting(NamedTuple):
    """What a worker knows of the delayed runs of a workspace."""

    rates: frozenset[Rate]  # under which they were delayed
    until_s: float  # when the last of them comes, monotonic


class Backstop:
    """Keeps the tick rates for one worker."""

    def __init__(
        self,
        database: Database,
        quotas: Quotas,
        rates: TickRates,
        tallies: Tallies,
        gate: Gate | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.quotas = quotas
        self._database = database
        self._rates = rates
        self._tallies = tallies
        self._gate = gate
        self._monotonic = monotonic
        self._named: dict[uuid.UUID, str] = {}
        self._waiting: dict[uuid.UUID, _Waiting] | None = None
        self._passed_over: dict[uuid.UUID, list[uuid.UUID]] = {}
        self._looked_at_s = self._monotonic()
        self._doubtful: set[uuid.UUID] = set()

    async def concerns(self, workspace_ids: Collection[uuid.UUID]) -> bool:
        """Tell whether one of these has a tick rate, were it only in the shadow revision."""
        quotas = (await self._quotas_of(workspace_ids)).values()
        return any(Limit.TICK in each.rates or each.shadow is not None for each in quotas)

    async def take(self, turns: Sequence[Paying]) -> list[Delay | None]:
        """Take a token for each turn, the first ones first; returns for how long those without one are delayed."""
        quotas = await self._quotas_of({turn.workspace_id for turn in turns})
        asked = self._asked(turns, quotas)
        delays: list[Delay | None] = [None] * len(turns)
        if asked:
            verdicts, away = await self._rates.take(asked)
            for each, verdict in zip(asked, verdicts, strict=True):
                late = _left_over(turns, each.workspace_id, verdict.returned, verdict.fresh)
                for place, index in enumerate(late):
                    delays[index] = Delay(dt.timedelta(microseconds=verdict.wait_us(place)), each.rate)
                if away:
                    self._tallies.count_local_turns(each.returned + each.fresh - len(late), len(late))
                if late:
                    self._note(each.workspace_id, each.rate, verdict.wait_us(len(late) - 1) / 1e6)
                    self._tallies.count_delayed(name_of(each.workspace_id, self._named), len(late))
        if self._gate is not None:
            for turn, delay in zip(turns, delays, strict=True):
                shadow = quotas[turn.workspace_id].shadow
                if delay is None and shadow is not None:
                    self._gate.observe(turn.workspace_id, shadow, (Limit.TICK,), admitted=True)
        return delays

    def written(self, delayed: Iterable[tuple[uuid.UUID, Delay]]) -> None:
        """Note turns that were delayed again, now that others can see it: those who were called meanwhile missed it."""
        for workspace_id, delay in delayed:
            self._note(workspace_id, delay.rate, delay.by.total_seconds())

    async def call_those_who_may_come(self) -> None:
        """Tell the delayed runs of each workspace whose tick rate has changed to come now."""
        if self._waiting is None:
            async with self._database.read() as connection:
                found = list((await connection.execute(WHO_WAITS, {})).scalars())
            for workspace_id in found:  # nobody here knows under which rate they were delayed
                await self._call(workspace_id)
            self._waiting = {}
        for workspace_id, run_ids in list(self._passed_over.items()):
            await self._call(workspace_id, run_ids)
        for workspace_id, quota in (await self._quotas_of(self._waiting)).items():
            # Forgotten before they are called, since some may be noted meanwhile; remembered when calling fails.
            waiting = self._waiting.pop(workspace_id)
            if waiting.rates != {quota.rates.get(Limit.TICK)}:
                try:
                    await self._call(workspace_id)
                except BaseException:
                    self._remember(workspace_id, waiting)
                    raise
            elif self._monotonic() < waiting.until_s:
                self._remember(workspace_id, waiting)

        if self._waiting and self._monotonic() >= self._looked_at_s + LOOK_EVERY_S:
            self._looked_at_s = self._monotonic()
            self._doubtful = {each for each in list(self._waiting) if await self._drop_if_empty(each)}

    async def _drop_if_empty(self, workspace_id: uuid.UUID) -> bool:
        """Call who waits in a line of which most places are nobody's, at two looks; tells whether they are at this."""
        promised = await self._rates.promised(workspace_id)
        if promised <= FEW:
            return False
        async with self._database.read() as connection:
            waiting: int = (await connection.execute(COUNT_WAITING, {"workspace_id": workspace_id})).scalar_one()
        if promised <= 2 * waiting + FEW:
            return False
        if workspace_id in self._doubtful:
            await self._call(workspace_id)
            return False
        return True

    async def leave(self) -> None:
        """Have other workers learn of those whom this one delayed: they come once more, and queue again."""
        for workspace_id in self._waiting or ():
            await self._call(workspace_id)
        self._waiting = {}

    def rest_s(self) -> float:
        """Return for how long what is known of the rates of those who wait is trusted; infinite when nobody waits."""
        trusted_s = min((self.quotas.trusted_for_s(each) for each in self._waiting or ()), default=float("inf"))
        return min(trusted_s, CALL_AGAIN_S) if self._passed_over else trusted_s

    async def _call(self, workspace_id: uuid.UUID, run_ids: Sequence[uuid.UUID] | None = None) -> None:
        """Tell the delayed runs of a workspace, or some of them, to come now; each is claimed once more for it."""
        asked = {"workspace_id": workspace_id, "everybody": run_ids is None, "run_ids": list(run_ids or ())}
        if run_ids is None:
            await self._rates.forget_line(workspace_id)
        async with self._database.begin() as connection:
            await connection.execute(CALL, asked)
            found = (await connection.execute(PASSED_OVER, {"workspace_id": workspace_id})).scalars()
            left = [each for each in found if run_ids is None or each in run_ids]
        self._passed_over.pop(workspace_id, None)
        if left:
            self._passed_over[workspace_id] = left

    async def _quotas_of(self, workspace_ids: Iterable[uuid.UUID]) -> dict[uuid.UUID, Quota]:
        quotas = {each: self.quotas.known(each) for each in workspace_ids}
        unknown = [each for each, quota in quotas.items() if quota is None]
        found = await asyncio.gather(*map(self.quotas.of, unknown)) if unknown else []
        return {each: quota for each, quota in quotas.items() if quota is not None} | dict(
            zip(unknown, found, strict=True)
        )

    @staticmethod
    def _asked(turns: Sequence[Paying], quotas: dict[uuid.UUID, Quota]) -> list[Asked]:
        """Count the turns of each workspace that has a tick rate."""
        counted = Counter(turns)
        return [
            Asked(each, rate, counted[Paying(each, waited=True)], counted[Paying(each, waited=False)])
            for each, quota in quotas.items()
            if (rate := quota.rates.get(Limit.TICK)) is not None
        ]

    def _note(self, workspace_id: uuid.UUID, rate: Rate, wait_s: float) -> None:
        """Note who waits, under which rate, and until when."""
        self._remember(workspace_id, _Waiting(frozenset({rate}), self._monotonic() + wait_s))

    def _remember(self, workspace_id: uuid.UUID, waiting: _Waiting) -> None:
        """Add to what is known of a workspace."""
        if self._waiting is None:
            self._waiting = {}
        known = self._waiting.get(workspace_id, waiting)
        self._waiting[workspace_id] = _Waiting(known.rates | waiting.rates, max(known.until_s, waiting.until_s))


def _left_over(turns: Sequence[Paying], workspace_id: uuid.UUID, returned: int, fresh: int) -> list[int]:
    """Return the turns of a workspace that got no token, as indices: first those who have waited before."""
    mine = [index for index, turn in enumerate(turns) if turn.workspace_id == workspace_id]
    return [
        *[index for index in mine if turns[index].waited][returned:],
        *[index for index in mine if not turns[index].waited][fresh:],
    ]
