"""A tick: one worker turn that advances one run by one step. The protocol by which many workers share the runs.

Overview
    The database is the queue: a run is due when its `next_tick_at` has passed. Workers turn due runs over in batches,
    and each batch goes through three stages:

    claim    one statement takes the runs that have been due longest, passing over rows that others hold. It raises
             each run's `epoch` and moves its `next_tick_at` to the end of a lease.
    outcome  whatever happens outside the database, in no transaction, under the lease. A scripted agent asks nobody:
             its outcome is the script itself, read once per process. A model's answer belongs here.
    settle   one transaction locks the batch and the parents of its runs, checks each epoch, decides each turn anew
             from the locked rows (`advance`), and writes all of them with one statement. Then, after the commit, the
             events are published, and other workers are rung if more is due than this one takes.

States of a run, as its row tells them
    parked   next_tick_at is null: it waits for a child's end or a caller, or is paused
    later    next_tick_at is ahead: a step's latency, the bound of a wait, a group's deadline
    due      next_tick_at has passed: anybody may claim it
    claimed  next_tick_at is the end of a lease. Nothing else marks a claim, so nothing has to be undone when a worker
             dies: the run becomes due by itself. When its step is due stands in step_due_at, which no claim changes.

Invariants
    1. A step is written only in a transaction that holds the run's row lock and finds the epoch that it claimed.
       Whoever claims later has raised the epoch, so of two workers that hold one run only the last one writes.
    2. Decisions rest on locked rows: what was spawned, settled or cancelled since the claim is seen. A spawn takes the
       same lock, so a run never completes with a pending subrun, and nothing is spawned by a run that has ended.
    3. A child is counted on its parent's row exactly once: in the transaction that ends the child.
    4. Rows are locked in the order (depth, run_id). A turn that must end descendants too would lock deeper rows than
       its batch has locked already; so it is put off to a transaction of its own (`families`).
    5. A final run is never due (a constraint of the table).

Failures
    The worker dies, anywhere: what was not committed did not happen; the lease ends and another worker claims.
    The commit's answer is lost: the run was advanced, its `next_tick_at` says when it is due next. Nothing is repeated.
    A worker stalls past its lease: its batch is fenced by invariant 1 and counted, and it goes on.
    Redis is away: nobody is rung; the sweeper (`worker`) finds what is due.
    PostgreSQL is away: the batch is dropped, its leases end.
    One run cannot be turned over: because of a bug the batch cannot be written, and is replayed one by one to find it;
    or what it asked of the outside did not answer (`postpone`). It is logged and becomes due again after a delay that
    doubles, so it neither stalls its neighbours nor keeps a worker busy. The vain attempts in a row are counted on its
    row; with the last of MOST_ATTEMPTS the run FAILS and says so. Outages of the database are not counted: nothing can
    be written about them, and they are nobody's fault.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import structlog
from sqlalchemy import text

from service.advance import advance
from service.announce import Announcer
from service.db import Database, is_outage
from service.families import advance_family, fail_run
from service.ledger import Ledger
from service.tallies import Tallies
from service.workspaces import Agents, ScriptStep

log = structlog.get_logger()

BATCH = 128
"""Most runs in one claim. Rows per second grow with the batch up to about 64 (docs/performance.md)."""

LONGEST_DELAY_S = 60.0
"""Longest pause before a run that could not be turned over is tried again."""

MOST_ATTEMPTS = 8
"""Vain attempts in a row after which a run FAILS: the delays between them add up to some four minutes."""

_CLAIM = text("""
    WITH due AS (
        SELECT run_id, next_tick_at AS due_at FROM runs WHERE next_tick_at <= now()
        ORDER BY next_tick_at LIMIT :most FOR NO KEY UPDATE SKIP LOCKED
    )
    UPDATE runs SET epoch = epoch + 1, next_tick_at = now() + make_interval(secs => :lease_s)
    FROM due WHERE runs.run_id = due.run_id
    RETURNING runs.run_id, runs.parent_run_id, runs.agent_id, runs.epoch,
              CAST(extract(epoch FROM now() - due.due_at) AS float8) AS wait_s
""")

_POSTPONE = text("""
    UPDATE runs SET vain_attempts = vain_attempts + 1, next_tick_at = now() + make_interval(
        secs => least(:longest_s, :lease_s * power(2, least(vain_attempts + 1, 20))))
    WHERE run_id = :run_id AND epoch = :epoch AND ended_at IS NULL
    RETURNING vain_attempts
""")


class Claim(NamedTuple):
    """One run in this worker's hands until its lease ends."""

    run_id: uuid.UUID
    parent_run_id: uuid.UUID | None
    agent_id: uuid.UUID
    epoch: int  # what a write must find
    wait_s: float  # how long the run had been due


Outcomes: TypeAlias = Mapping[uuid.UUID, Sequence[ScriptStep]]
"""What each agent of a batch does, by agent_id."""


class Ticker:
    """Claims due runs and settles them, batch by batch, for one worker."""

    def __init__(
        self, database: Database, announcer: Announcer, agents: Agents, tallies: Tallies, lease_s: float
    ) -> None:
        self._database = database
        self._announcer = announcer
        self._agents = agents
        self._tallies = tallies
        self._lease_s = lease_s

    async def claim(self, most: int = BATCH) -> list[Claim]:
        """Take the runs that have been due longest, at most `most`, each under a lease."""
        async with self._database.read() as connection:
            found = await connection.execute(_CLAIM, {"most": most, "lease_s": self._lease_s})
            claims = [Claim(*row) for row in found]
        for claim in claims:
            self._tallies.observe_wait(claim.wait_s)
        return claims

    async def outcomes(self, claims: Sequence[Claim]) -> Outcomes:
        """Find out what each claimed run does next, outside of any transaction."""
        agent_ids = {claim.agent_id for claim in claims}
        known = {agent_id: self._agents.known(agent_id) for agent_id in agent_ids}
        if None in known.values():
            async with self._database.read() as connection:
                known |= await self._agents.find(connection, agent_ids)
        return {agent_id: agent[1] for agent_id, agent in known.items() if agent is not None}

    async def settle(self, claims: Sequence[Claim], outcomes: Outcomes, *, ring: bool = False) -> None:
        """Advance every claimed run by one tick and announce it; with `ring`, ask other workers to help.

        Raises what `is_outage` knows; any other fault is logged with its run.
        """
        try:
            ledger, settled = await self._write(lambda ledger: settle_batch(ledger, claims, outcomes))
        except Exception as fault:
            if is_outage(fault):
                raise
            if len(claims) == 1:
                await self.postpone(claims[0], fault)
                return
            for claim in claims:
                await self.settle([claim], outcomes, ring=ring)
            return
        await self._announce(ledger, ring)
        for claim in settled.put_off:
            await self._settle_family(claim, outcomes, ring=ring)

    async def _settle_family(self, claim: Claim, outcomes: Outcomes, *, ring: bool) -> None:
        """Advance one run whose turn ends descendants."""

        async def settle(ledger: Ledger) -> Settled:
            script = outcomes[claim.agent_id]
            written = await advance_family(ledger, claim.run_id, claim.parent_run_id, claim.epoch, script)
            return Settled(int(written), int(not written), [])

        try:
            ledger, _ = await self._write(settle)
        except Exception as fault:
            if is_outage(fault):
                raise
            await self.postpone(claim, fault)
            return
        await self._announce(ledger, ring)

    async def _write(self, settle: Callable[[Ledger], Coroutine[Any, Any, Settled]]) -> tuple[Ledger, Settled]:
        """Settle in one transaction."""
        started = time.perf_counter()
        async with self._database.begin() as connection:
            ledger = Ledger(connection)
            settled = await settle(ledger)
        self._tallies.count_ticks(settled.ticks, settled.fenced, time.perf_counter() - started)
        return ledger, settled

    async def _announce(self, ledger: Ledger, ring: bool) -> None:
        """Tell what was committed; a fault here must not look like one of the transaction."""
        await self._announcer.announce(ledger.events, ledger.now, due=ring, tallies=self._tallies)

    async def postpone(self, claim: Claim, fault: Exception) -> None:
        """Log a run whose turn failed and try it again later, ever more rarely; the last attempt fails the run."""
        log.error("a run cannot be advanced", run_id=str(claim.run_id), epoch=claim.epoch, exc_info=fault)
        async with self._database.begin() as connection:
            attempts = (
                await connection.execute(
                    _POSTPONE,
                    {
                        "run_id": claim.run_id,
                        "epoch": claim.epoch,
                        "lease_s": self._lease_s,
                        "longest_s": LONGEST_DELAY_S,
                    },
                )
            ).scalar()
        if attempts is not None and attempts >= MOST_ATTEMPTS:
            await self._fail(claim, f"could not be advanced in {attempts} attempts, the last one: {_name(fault)}")

    async def _fail(self, claim: Claim, reason: str) -> None:
        """End a claimed run as FAILED, with its descendants."""

        async def settle(ledger: Ledger) -> Settled:
            written = await fail_run(ledger, claim.run_id, claim.parent_run_id, claim.epoch, reason)
            return Settled(int(written), int(not written), [])

        try:
            ledger, _ = await self._write(settle)
        except Exception as fault:
            if is_outage(fault):
                raise
            log.error("a run cannot even be failed; it is tried again", run_id=str(claim.run_id), exc_info=fault)
            return
        await self._announce(ledger, ring=False)


def _name(fault: Exception) -> str:
    """Return the kind of a fault; its text may quote what only the log should hold."""
    return type(getattr(fault, "orig", None) or fault).__name__


class Settled(NamedTuple):
    """What became of the claims of one transaction."""

    ticks: int  # turns that changed their run
    fenced: int  # turns thrown away, because another worker or a caller was faster
    put_off: Sequence[Claim]  # turns that end descendants; nothing was written about them


async def settle_batch(ledger: Ledger, claims: Sequence[Claim], outcomes: Outcomes) -> Settled:
    """Lock a batch with the parents of its runs and write the turn of each; children settle before their parents."""
    parent_ids = {claim.parent_run_id for claim in claims if claim.parent_run_id is not None}
    await ledger.lock({claim.run_id for claim in claims} | parent_ids)
    ticks, fenced, put_off = 0, 0, []
    for claim in sorted(claims, key=lambda claim: ledger.runs[claim.run_id].depth, reverse=True):
        run = ledger.runs[claim.run_id]
        if run.epoch != claim.epoch or run.is_final:
            fenced += 1
            continue
        outcome = advance(run, outcomes[claim.agent_id], ledger.now)
        if outcome.doomed:
            put_off.append(claim)
            continue
        ledger.note(outcome)
        ticks += outcome.run.ticks - run.ticks
    await ledger.write()
    return Settled(ticks, fenced, put_off)
