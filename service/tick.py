"""A tick: one worker turn that advances one run by one step. The protocol by which many workers share the runs.

Overview
    The database is the queue: a run is due when its `next_tick_at` has passed. Workers turn due runs over in batches,
    and each batch goes through three stages:

    claim    one statement takes the runs that have been due longest, raises each run's `epoch` and moves its
             `next_tick_at` to the end of a lease (`claims`, which keeps the order fair between workspaces). Then the
             steps that are due are paid for: those of a workspace over its tick rate are delayed (`backstop`).
    outcome  whatever happens outside the database, in no transaction, under the lease. A scripted agent asks nobody:
             its outcome is the script itself, read once per process. A tool that runs and a model that answers belong
             here (`outside`); their leases are renewed, and the worker lets them wait in a lane of their own.
    settle   one transaction locks the batch and the parents of its runs, checks each epoch, decides each turn anew
             from the locked rows, and writes all of them with one statement (`settling`). Then, after the commit, the
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
    6. A run's instants follow each other as its changes do: each is the database's clock, read with the row locked.

Failures
    The worker dies, anywhere: what was not committed did not happen; the lease ends and another worker claims.
    The commit's answer is lost: the run was advanced, its `next_tick_at` says when it is due next. Nothing is repeated.
    A worker stalls past its lease: its batch is fenced by invariant 1 and counted, and it goes on.
    Redis is away: nobody is rung; the sweeper (`worker`) finds what is due, and each worker keeps the tick rates alone.
    PostgreSQL is away: the batch is dropped, its leases end.
    One run cannot be turned over: because of a bug the batch cannot be written, and is replayed one by one to find it;
    or what it asked of the outside did not answer (`postpone`). It is logged and becomes due again after a delay that
    doubles, so it neither stalls its neighbours nor keeps a worker busy. The vain attempts in a row are counted on its
    row; with the last of MOST_ATTEMPTS the run FAILS and says so. Outages of the database are not counted: nothing can
    be written about them, and they are nobody's fault.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import msgspec
import structlog

from service.announce import Announcer
from service.backstop import Backstop, Paying
from service.claims import BATCH, Claim, Claims
from service.db import Database, is_outage
from service.ledger import Ledger
from service.outside import Outside
from service.pen import WITH_STEPS
from service.quota.inforce import Quotas
from service.quota.shadow import ShadowTally
from service.runs import new_id
from service.settling import Outcome, Outcomes, Settled, settle_batch, settle_failure, settle_family
from service.tallies import Tallies
from service.toolcalls import Definition, Definitions
from service.turns import NO_STEP, Means
from service.workspaces import Agents, KnownAgent

log = structlog.get_logger()

MOST_ATTEMPTS = 8
"""Vain attempts in a row after which a run FAILS: the delays between them add up to some four minutes."""


class Ticker:
    """Claims due runs and settles them, batch by batch, for one worker."""

    def __init__(
        self,
        database: Database,
        announcer: Announcer,
        agents: Agents,
        tallies: Tallies,
        lease_s: float,
        outside: Outside | None = None,
        backstop: Backstop | None = None,
        shadow: ShadowTally | None = None,
    ) -> None:
        self._database = database
        self._claims = Claims(database, lease_s)
        self._announcer = announcer
        self._agents = agents
        self._tallies = tallies
        self._outside = outside or Outside(database, lease_s)
        self._definitions = Definitions()
        self._backstop = backstop
        self._shadow = shadow
        self._quotas = Quotas(database) if backstop is None else backstop.quotas

    async def claim(self, most: int = BATCH) -> list[Claim]:
        """Claim at most `most` due runs, and pay for the turns that have to be paid for."""
        if self._backstop is not None:
            await self._backstop.look()
        claims = await self._claims.take(most)
        for claim in claims:
            self._tallies.observe_wait(claim.wait_s)
        return await self._pay(claims) if claims else claims

    def rest_s(self) -> float:
        """Return for how long nothing has to be looked after beside what is due."""
        return float("inf") if self._backstop is None else self._backstop.rest_s()

    async def _pay(self, claims: list[Claim]) -> list[Claim]:
        """Pay for the turns that have to, those that have been due longest first; the others are told their delay."""
        backstop = self._backstop
        if backstop is None or not await backstop.concerns({claim.workspace_id for claim in claims if claim.pays}):
            return claims
        paying = sorted((claim for claim in claims if claim.pays), key=lambda claim: -claim.wait_s)
        delays = await backstop.take([Paying(claim.workspace_id, claim.waited) for claim in paying])
        late = {claim.run_id: delay for claim, delay in zip(paying, delays, strict=True) if delay is not None}
        return [claim._replace(delay=late[claim.run_id]) if claim.run_id in late else claim for claim in claims]

    async def part(self, claims: Sequence[Claim]) -> tuple[list[Claim], list[Claim]]:
        """Part a batch: the runs whose turn can be settled at once, and those that wait for a tool or a model."""
        agents = await self._find_agents(claims)
        at_once: list[Claim] = []
        outside: list[Claim] = []
        for claim in claims:
            (outside if _goes_outside(claim, agents[claim.agent_id]) else at_once).append(claim)
        return at_once, outside

    async def outcomes(self, claims: Sequence[Claim]) -> Outcomes:
        """Find out what each claimed run does next, outside of any transaction; tools and models run side by side."""
        at_once, outside = await self.part(claims)
        agents = await self._find_agents(claims)
        found = {claim.run_id: await self._outcome(claim, agents[claim.agent_id]) for claim in at_once}
        if outside:
            waited = await asyncio.gather(*(self._outcome(claim, agents[claim.agent_id]) for claim in outside))
            found |= {claim.run_id: outcome for claim, outcome in zip(outside, waited, strict=True)}
        return found

    async def hand_back(self, claims: Sequence[Claim], delay_s: float) -> None:
        """Let somebody else claim these runs after a while: this worker waits for enough tools and models."""
        await self._claims.hand_back(claims, delay_s)

    async def close(self) -> None:
        """Close what was opened to the outside."""
        await self._outside.close()

    async def _find_agents(self, claims: Sequence[Claim]) -> dict[uuid.UUID, KnownAgent]:
        agent_ids = {claim.agent_id for claim in claims}
        known = {agent_id: self._agents.known(agent_id) for agent_id in agent_ids}
        if None in known.values():
            async with self._database.read() as connection:
                known |= await self._agents.find(connection, agent_ids)
        return {agent_id: agent for agent_id, agent in known.items() if agent is not None}

    async def _find_tools(self, agent: KnownAgent) -> Mapping[str, Definition]:
        known = self._definitions.known(agent.workspace_id, agent.tool_names)
        if known is not None:
            return known
        async with self._database.read() as connection:
            return await self._definitions.find(connection, agent.workspace_id, agent.tool_names)

    async def _outcome(self, claim: Claim, agent: KnownAgent) -> Outcome:
        """Find out what one run does next, waiting for its tool or its model when it has to."""
        if claim.delay is not None:
            return Outcome(agent, Means(delay=claim.delay))
        if not claim.pays:
            return Outcome(agent, NO_STEP)
        if not agent.needs_means:
            return Outcome(agent)
        means = Means(is_model=agent.model is not None, max_steps=agent.max_steps, max_tool_calls=agent.max_tool_calls)
        if claim.tool_call_id is not None:
            await self._outside.run_tool(claim.run_id, claim.epoch)
            return Outcome(agent, means)
        if claim.status not in WITH_STEPS:
            return Outcome(agent, means)
        tools = await self._find_tools(agent)
        move = None
        if agent.model is not None:
            move = await self._outside.find_move(claim.run_id, claim.epoch, agent, tools)
        means = msgspec.structs.replace(means, tools=tools, move=move, new_tool_call_id=new_id())
        wanted = means.wants(agent.script, claim.script_position)
        if wanted is None or not wanted.definition.needs_approval:
            return Outcome(agent, means)
        return Outcome(agent, means, await self._quotas.of(agent.workspace_id))

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
            await self._settle_family(claim, outcomes[claim.run_id], ring=ring)

    async def _settle_family(self, claim: Claim, found: Outcome, *, ring: bool) -> None:
        """Advance one run whose turn ends descendants."""
        try:
            ledger, _ = await self._write(lambda ledger: settle_family(ledger, claim, found))
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
        if self._shadow is not None:
            self._shadow.count(settled.observed)
        return ledger, settled

    async def _announce(self, ledger: Ledger, ring: bool) -> None:
        """Tell what was committed; a fault here must not look like one of the transaction."""
        await self._announcer.announce(ledger.events, ledger.now, due=ring, tallies=self._tallies)

    async def postpone(self, claim: Claim, fault: Exception) -> None:
        """Log a run whose turn failed and try it again later, ever more rarely; the last attempt fails the run."""
        log.error("a run cannot be advanced", run_id=str(claim.run_id), epoch=claim.epoch, exc_info=fault)
        attempts = await self._claims.postpone(claim)
        if attempts is not None and attempts >= MOST_ATTEMPTS:
            await self._fail(claim, f"could not be advanced in {attempts} attempts, the last one: {_name(fault)}")

    async def _fail(self, claim: Claim, reason: str) -> None:
        """End a claimed run as FAILED, with its descendants."""
        try:
            ledger, _ = await self._write(lambda ledger: settle_failure(ledger, claim, reason))
        except Exception as fault:
            if is_outage(fault):
                raise
            log.error("a run cannot even be failed; it is tried again", run_id=str(claim.run_id), exc_info=fault)
            return
        await self._announce(ledger, ring=False)


def _name(fault: Exception) -> str:
    """Return the kind of a fault; its text may quote what only the log should hold."""
    return type(getattr(fault, "orig", None) or fault).__name__


def _goes_outside(claim: Claim, agent: KnownAgent) -> bool:
    """Tell whether a run's turn may have to wait for a tool or a model."""
    if claim.delay is not None or not claim.pays:
        return False
    return claim.tool_call_id is not None or (agent.model is not None and claim.status in WITH_STEPS)
