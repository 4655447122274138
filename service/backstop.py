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

What marks a delayed run
    `delayed_under` in its row: the rate under which it was told its time (`Rate.code`). It is written with the delay
    and goes with the step: when that is taken, when the run ends, or when the run is called, which is to be told that
    its step is due now. Nothing else touches it: not a claim, not a turn for a group's deadline, not a pause. It says
    that a turn has waited, and so goes before those who come for the first time; and whom a change of rate concerns.

    Once a second every worker looks which rates stand in rows (`LOOK` jumps from one to the next in an index of delayed
    runs alone, so it costs as much as there are workspaces over their rate: mostly nothing), reads which rates are in
    force, and calls whoever was delayed under another one. No worker remembers anybody.

Invariants
    1. In no window of any length w are more than B + R * w turns of a workspace paid, by all workers together
       (ticks.lua). A step is taken by a paid turn alone: one that was claimed for something else takes none, though its
       step be due by then (`Means.step`).
    2. A delayed run stays a due row: nothing about it is kept anywhere else, so nothing can be lost. The line in Redis
       says only when the next one is told to come.
    3. It is never failed for it: a delay is no vain attempt.
    4. A change of the rate is seen by the workers a second after its commit at the latest, as every other limit:
       whoever was delayed under another rate is called, and queues again. A paused run is called, too: its step is
       due as soon as it is resumed. Whoever is in a turn or in a caller's hands at that moment is seen a second later.

Failures
    A worker dies between claim and settle: the tokens of its batch are spent, at most 128 (`claims.BATCH`), and its
    runs are due again when their leases end; then they pay again. So the workspace gets that many turns less.
    It dies after it: whom it delayed stands in the rows, for everybody to see.
    Two workers look at once: each run is called by one of them; the other finds it locked, or without its mark.
    A place in the line is not used (its run was cancelled, paused, ended): the token stays in the bucket. When most
    places are nobody's, those who stand behind are called to queue again, a few seconds later.
    A turn is fenced, waits for room for a tool call, or finds the lane to the outside full: its token is spent.
    Redis is away: each worker keeps the rates by itself, and counts that it did.
    Redis was emptied: buckets are full; those who come again find tokens, or are delayed once more.
"""

from __future__ import annotations

import datetime as dt
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from sqlalchemy import text

from service.db import Database, rows
from service.quota.gate import Gate
from service.quota.inforce import REMEMBERED_S, Quotas
from service.quota.limits import Limit, Quota
from service.quota.refusals import name_of
from service.quota.ticks import Asked, TickRates
from service.tallies import Tallies
from service.turns import Delay

LOOK = text("""
    WITH RECURSIVE found AS (
        (SELECT workspace_id, delayed_under FROM runs WHERE delayed_under IS NOT NULL
         ORDER BY workspace_id, delayed_under LIMIT 1)
        UNION ALL
        SELECT later.workspace_id, later.delayed_under FROM found CROSS JOIN LATERAL (
            SELECT workspace_id, delayed_under FROM runs WHERE delayed_under IS NOT NULL
                AND (workspace_id, delayed_under) > (found.workspace_id, found.delayed_under)
            ORDER BY workspace_id, delayed_under LIMIT 1
        ) AS later
    )
    SELECT workspace_id, delayed_under FROM found
""")
"""The rates under which runs are delayed, each once with its workspace."""

CALL = text("""
    WITH waiting AS (
        SELECT runs.run_id, runs.step_due_at > coalesce(runs.paused_at, now()) AS ahead
        FROM json_to_recordset(CAST(:lines AS json)) AS l(workspace_id uuid, under text)
        JOIN runs ON runs.workspace_id = l.workspace_id AND runs.delayed_under = l.under
        WHERE runs.paused_at IS NOT NULL OR runs.step_due_at > now()
        LIMIT :most FOR NO KEY UPDATE OF runs SKIP LOCKED
    ), called AS (
        UPDATE runs SET delayed_under = NULL, step_due_at = least(step_due_at, coalesce(paused_at, now())),
                        next_tick_at = CASE WHEN paused_at IS NULL THEN now() END
        FROM waiting WHERE runs.run_id = waiting.run_id
        RETURNING runs.workspace_id, waiting.ahead
    )
    SELECT workspace_id, count(*) AS runs, bool_or(ahead) AS stood FROM called GROUP BY workspace_id
""")
"""Tells them that their step is due; while a run is paused its clock stands. Whoever's step is due already is in a
turn, or about to be; but one that is paused meanwhile loses its mark, or it would be found each second. Whoever is
locked is skipped, so that no lock is waited for out of order."""

MOST_CALLED = 1_000
"""Runs that are called in one transaction. It asks Redis once, so their rows are locked for no longer than a few tens
of milliseconds, and for `guarded.PATIENCE_S` where Redis has just begun to hang."""

MOSTLY_NOBODYS = text("""
    SELECT l.workspace_id FROM json_to_recordset(CAST(:lines AS json)) AS l(workspace_id uuid, under text, enough int)
    WHERE l.enough > (SELECT count(*) FROM (
        SELECT 1 FROM runs WHERE runs.workspace_id = l.workspace_id AND delayed_under = l.under
            AND step_due_at > now() AND paused_at IS NULL LIMIT l.enough
    ) AS waiting)
""")
"""Those lines in which fewer runs wait than would be enough for the places promised in them; no more are looked at."""

FEW = 4
"""Places of a line that may be nobody's beside as many as are somebody's: to call everybody costs a claim for each, so
at most one for each run that was cancelled. Whoever is just being told his place is seen at the next look."""


class Paying(NamedTuple):
    """A turn whose step is due."""

    workspace_id: uuid.UUID
    waited: bool  # it was delayed before


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
        self._look_at_s = self._monotonic()
        self._doubtful: set[uuid.UUID] = set()  # workspaces in whose line most places seemed nobody's at the last look

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
                    delays[index] = Delay(dt.timedelta(microseconds=verdict.wait_us(place)), each.rate.code)
                if away:
                    self._tallies.count_local_turns(each.returned + each.fresh - len(late), len(late))
                if late:
                    # What is trusted now may have changed already; when it is trusted no longer, somebody must look.
                    trusted_until_s = self._monotonic() + self.quotas.trusted_for_s(each.workspace_id)
                    self._look_at_s = min(self._look_at_s, trusted_until_s)
                    self._tallies.count_delayed(name_of(each.workspace_id, self._named), len(late))
        if self._gate is not None:
            for turn, delay in zip(turns, delays, strict=True):
                shadow = quotas[turn.workspace_id].shadow
                if delay is None and shadow is not None:
                    self._gate.observe(turn.workspace_id, shadow, (Limit.TICK,), admitted=True)
        return delays

    def rest_s(self) -> float:
        """Return for how long nobody has to be looked for."""
        return max(0.0, self._look_at_s - self._monotonic())

    async def look(self) -> None:
        """Call whoever was delayed under another rate than the one in force, once a second."""
        if self._monotonic() < self._look_at_s:
            return
        next_look_at_s = self._monotonic() + REMEMBERED_S
        async with self._database.read() as connection:
            found = [(workspace_id, under) for workspace_id, under in await connection.execute(LOOK, {})]
        # As they are now: what was read before may be about to change, and then this would be a second late.
        quotas = await self.quotas.read({workspace_id for workspace_id, _ in found})
        in_force = {
            workspace_id: under
            for workspace_id, under in found
            if (rate := quotas[workspace_id].rates.get(Limit.TICK)) is not None and rate.code == under
        }
        nobodys = await self._mostly_nobodys(in_force)
        await self._call(
            [each for each in found if in_force.get(each[0]) != each[1] or each[0] in nobodys & self._doubtful]
        )
        self._doubtful, self._look_at_s = nobodys - self._doubtful, next_look_at_s

    async def _mostly_nobodys(self, under: Mapping[uuid.UUID, str]) -> set[uuid.UUID]:
        """Return the workspaces in whose line most places are not waited for by anybody: one question to each store."""
        promised = await self._rates.promised(list(under))
        lines = [
            {"workspace_id": workspace_id, "under": under[workspace_id], "enough": (places - FEW + 1) // 2}
            for workspace_id, places in promised.items()
            if places > FEW
        ]
        if not lines:
            return set()
        async with self._database.read() as connection:
            return set((await connection.execute(MOSTLY_NOBODYS, {"lines": rows(lines)})).scalars())

    async def _call(self, lines: Collection[tuple[uuid.UUID, str]]) -> None:
        """Tell those who stand in these lines to come now; each is claimed once more for it."""
        asked = {"lines": rows({"workspace_id": each, "under": under} for each, under in lines), "most": MOST_CALLED}
        forgotten: set[uuid.UUID] = set()
        count = MOST_CALLED if lines else 0
        while count == MOST_CALLED:
            async with self._database.begin() as connection:
                called = (await connection.execute(CALL, asked)).all()
                # Before any of them can come again. Where nobody stood others called them, and they queue by now.
                stood = {each.workspace_id for each in called if each.stood} - forgotten
                if stood:
                    await self._rates.forget_lines(stood)
            forgotten |= stood
            count = sum(each.runs for each in called)

    async def _quotas_of(self, workspace_ids: Iterable[uuid.UUID]) -> dict[uuid.UUID, Quota]:
        quotas = {each: self.quotas.known(each) for each in workspace_ids}
        unknown = [each for each, quota in quotas.items() if quota is None]
        found = await self.quotas.read(unknown) if unknown else {}
        return {each: quota for each, quota in quotas.items() if quota is not None} | found

    @staticmethod
    def _asked(turns: Sequence[Paying], quotas: dict[uuid.UUID, Quota]) -> list[Asked]:
        """Count the turns of each workspace that has a tick rate."""
        counted = Counter(turns)
        return [
            Asked(each, rate, counted[Paying(each, waited=True)], counted[Paying(each, waited=False)])
            for each, quota in quotas.items()
            if (rate := quota.rates.get(Limit.TICK)) is not None
        ]


def _left_over(turns: Sequence[Paying], workspace_id: uuid.UUID, returned: int, fresh: int) -> list[int]:
    """Return the turns of a workspace that got no token, as indices: first those who have waited before."""
    mine = [index for index, turn in enumerate(turns) if turn.workspace_id == workspace_id]
    return [
        *[index for index in mine if turns[index].waited][returned:],
        *[index for index in mine if not turns[index].waited][fresh:],
    ]
