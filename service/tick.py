"""A tick: one worker turn that advances one run by one step. The protocol by which many workers share the runs.

Overview
    The database is the queue: a run is due when its `next_tick_at` has passed. Workers turn due runs over in batches,
    and each batch goes through three stages:

    claim    one statement takes the runs that have been due longest, passing over rows that others hold. It raises
             each run's `epoch` and moves its `next_tick_at` to the end of a lease. While a few workspaces fill all
             batches, one is that of all others now and then, so nobody waits behind a long line of somebody else's.
             Then the steps that are due are paid for: those of a workspace over its tick rate are delayed (`backstop`).
    outcome  whatever happens outside the database, in no transaction, under the lease. A scripted agent asks nobody:
             its outcome is the script itself, read once per process. A tool that runs and a model that answers belong
             here (`outside`); their leases are renewed, and the worker lets them wait in a lane of their own.
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
import datetime as dt
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import msgspec
import structlog
from sqlalchemy import TextClause, text

from service.advance import advance
from service.announce import Announcer
from service.backstop import Backstop, Paying
from service.db import Database, is_outage, rows
from service.families import advance_family, fail_run
from service.ledger import Ledger
from service.outside import Outside
from service.pen import WITH_STEPS, RunRow
from service.quota.caps import observe_caps, tool_calls_left
from service.quota.inforce import Quotas
from service.quota.limits import Limit, Quota
from service.quota.shadow import Observation, ShadowTally
from service.runs import RunStatus, new_id
from service.tallies import Tallies
from service.toolcalls import Definition, Definitions, ToolCallStatus
from service.turns import PLAIN, Means
from service.workspaces import Agents, KnownAgent, ScriptStep

log = structlog.get_logger()

BATCH = 128
"""Most runs in one claim. Rows per second grow with the batch up to about 64 (docs/performance.md)."""

CROWD_PARTS = 4
"""A workspace that has one part in so many of a full batch crowds."""

OTHERS_EVERY_S, OTHERS_EVERY_TIMES = 0.05, 50
"""How often a batch is that of all others, while there is a crowd; and at most so that looking for them takes one part
in so many of the time, with however many workspaces."""

LONGEST_DELAY_S = 60.0
"""Longest pause before a run that could not be turned over is tried again."""

MOST_ATTEMPTS = 8
"""Vain attempts in a row after which a run FAILS: the delays between them add up to some four minutes."""

_TAKE = """
    UPDATE runs SET epoch = epoch + 1, next_tick_at = now() + make_interval(secs => :lease_s)
    FROM due WHERE runs.run_id = due.run_id
    RETURNING runs.run_id, runs.parent_run_id, runs.agent_id, runs.epoch,
              CAST(extract(epoch FROM now() - due.due_at) AS float8) AS wait_s,
              runs.status, runs.script_position, runs.tool_call_id, runs.workspace_id,
              coalesce(runs.step_due_at <= now(), false) AS pays,
              coalesce(due.due_at = runs.step_due_at + interval '1 microsecond', false) AS waited
"""

_CLAIM = text(f"""
    WITH due AS (
        SELECT run_id, next_tick_at AS due_at FROM runs WHERE next_tick_at <= now()
        ORDER BY next_tick_at LIMIT :most FOR NO KEY UPDATE SKIP LOCKED
    )
    {_TAKE}
""")  # noqa: S608 - our own words

_CLAIM_OTHERS = text(f"""
    WITH RECURSIVE busy AS (
        (SELECT workspace_id FROM runs WHERE ended_at IS NULL ORDER BY workspace_id LIMIT 1)
        UNION ALL
        SELECT (SELECT runs.workspace_id FROM runs WHERE ended_at IS NULL AND runs.workspace_id > busy.workspace_id
                ORDER BY runs.workspace_id LIMIT 1)
        FROM busy WHERE busy.workspace_id IS NOT NULL
    ), found AS MATERIALIZED (
        SELECT theirs.run_id FROM busy CROSS JOIN LATERAL (
            SELECT run_id FROM runs WHERE runs.workspace_id = busy.workspace_id AND ended_at IS NULL
                AND next_tick_at + interval '0' <= now() LIMIT :most
        ) AS theirs
        WHERE busy.workspace_id <> ALL(CAST(:crowds AS uuid[]))
    ), due AS (
        SELECT run_id, next_tick_at AS due_at FROM runs
        WHERE run_id = ANY(ARRAY(SELECT run_id FROM found)) AND next_tick_at <= now()
        ORDER BY next_tick_at LIMIT :most FOR NO KEY UPDATE SKIP LOCKED
    )
    {_TAKE}
""")  # noqa: S608 - our own words
"""Claims runs of other workspaces than those that crowd. It goes from one workspace with live runs to the next, and
looks at the live runs of each but those: their line is passed over, however long it is. The index of what is due, where
they stand in front, must not be used for it; hence the interval."""

_POSTPONE = text("""
    UPDATE runs SET vain_attempts = vain_attempts + 1, next_tick_at = now() + make_interval(
        secs => least(:longest_s, :lease_s * power(2, least(vain_attempts + 1, 20))))
    WHERE run_id = :run_id AND epoch = :epoch AND ended_at IS NULL
    RETURNING vain_attempts
""")


_HAND_BACK = text("""
    UPDATE runs SET next_tick_at = now() + make_interval(secs => :delay_s)
    FROM json_to_recordset(CAST(:held AS json)) AS h(run_id uuid, epoch int)
    WHERE runs.run_id = h.run_id AND runs.epoch = h.epoch AND ended_at IS NULL AND next_tick_at IS NOT NULL
""")


class Claim(NamedTuple):
    """One run in this worker's hands until its lease ends."""

    run_id: uuid.UUID
    parent_run_id: uuid.UUID | None
    agent_id: uuid.UUID
    epoch: int  # what a write must find
    wait_s: float  # how long the run had been due
    status: str
    script_position: int
    tool_call_id: uuid.UUID | None  # what the run waits for, if it is a tool call
    workspace_id: uuid.UUID
    pays: bool  # its step is due, so the turn needs a token of the workspace's tick rate
    waited: bool  # it was delayed before, and is due at the time that it was told
    delay: dt.timedelta | None = None  # for how long its step is put off, since there was no token


class Outcome(NamedTuple):
    """What was found out for one claimed run."""

    agent: KnownAgent
    means: Means = PLAIN
    quota: Quota | None = None  # of the workspace, when the turn asks for a tool call that needs approval

    @property
    def script(self) -> Sequence[ScriptStep]:
        """The steps of a scripted agent."""
        return self.agent.script


Outcomes: TypeAlias = Mapping[uuid.UUID, Outcome]
"""What was found out for a batch, by run_id."""


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
        self._announcer = announcer
        self._agents = agents
        self._tallies = tallies
        self._lease_s = lease_s
        self._outside = outside or Outside(database, lease_s)
        self._definitions = Definitions()
        self._backstop = backstop
        self._shadow = shadow
        self._quotas = Quotas(database) if backstop is None else backstop.quotas
        self._crowds: list[uuid.UUID] = []
        self._others_at_s = 0.0

    async def claim(self, most: int = BATCH) -> list[Claim]:
        """Take the runs that have been due longest, at most `most`, each under a lease.

        After a batch that few workspaces filled it is now and then the turn of all others.
        """
        if self._backstop is not None:
            await self._backstop.call_those_who_may_come()
        claims = await self._claim_others(most) if self._crowds and time.monotonic() >= self._others_at_s else []
        if not claims:
            claims = await self._claim(_CLAIM, most=most)
            self._crowds = _crowds(claims) if len(claims) == most else []
        for claim in claims:
            self._tallies.observe_wait(claim.wait_s)
        return await self._pay(claims) if claims else claims

    def rest_s(self) -> float:
        """Return for how long nothing has to be looked after beside what is due."""
        return float("inf") if self._backstop is None else self._backstop.rest_s()

    async def _claim_others(self, most: int) -> list[Claim]:
        """Take runs of other workspaces than those that filled the last batch."""
        started_s = time.monotonic()
        claims = await self._claim(_CLAIM_OTHERS, most=most, crowds=self._crowds)
        ended_s = time.monotonic()
        self._others_at_s = ended_s + max(OTHERS_EVERY_S, OTHERS_EVERY_TIMES * (ended_s - started_s))
        return claims

    async def _claim(self, statement: TextClause, **asked: object) -> list[Claim]:
        async with self._database.read() as connection:
            found = await connection.execute(statement, {"lease_s": self._lease_s, **asked})
            return [Claim(*row) for row in found]

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
        async with self._database.begin() as connection:
            held = rows({"run_id": claim.run_id, "epoch": claim.epoch} for claim in claims)
            await connection.execute(_HAND_BACK, {"held": held, "delay_s": delay_s})

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
            await self._settle_family(claim, outcomes, ring=ring)

    async def _settle_family(self, claim: Claim, outcomes: Outcomes, *, ring: bool) -> None:
        """Advance one run whose turn ends descendants."""

        async def settle(ledger: Ledger) -> Settled:
            outcome = outcomes[claim.run_id]
            pending = await _pending(ledger, {claim.run_id: outcome})
            means = _with_room(outcome, pending)
            written = await advance_family(
                ledger, claim.run_id, claim.parent_run_id, claim.epoch, outcome.script, means
            )
            observed = _observe(outcome, means, ledger.runs[claim.run_id], pending) if written else []
            return Settled(int(written), int(not written), [], observed)

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
        if self._shadow is not None:
            self._shadow.count(settled.observed)
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


def _crowds(claims: Sequence[Claim]) -> list[uuid.UUID]:
    """Return the workspaces that have much of a batch."""
    counted = Counter(claim.workspace_id for claim in claims)
    return [workspace_id for workspace_id, count in counted.items() if count * CROWD_PARTS >= len(claims)]


def _name(fault: Exception) -> str:
    """Return the kind of a fault; its text may quote what only the log should hold."""
    return type(getattr(fault, "orig", None) or fault).__name__


class Settled(NamedTuple):
    """What became of the claims of one transaction."""

    ticks: int  # turns that changed their run
    fenced: int  # turns thrown away, because another worker or a caller was faster
    put_off: Sequence[Claim]  # turns that end descendants; nothing was written about them
    observed: Sequence[Observation] = ()  # what the shadow revision would have said to tool calls


async def settle_batch(ledger: Ledger, claims: Sequence[Claim], outcomes: Outcomes) -> Settled:
    """Lock a batch with the parents of its runs and write the turn of each; children settle before their parents.

    Where turns ask for tool calls that need approval, their workspaces are locked before all runs.
    """
    pending = await _pending(ledger, outcomes)
    parent_ids = {claim.parent_run_id for claim in claims if claim.parent_run_id is not None}
    await ledger.lock({claim.run_id for claim in claims} | parent_ids)
    ticks, fenced, put_off, observed = 0, 0, [], list[Observation]()
    for claim in sorted(claims, key=lambda claim: ledger.runs[claim.run_id].depth, reverse=True):
        run = ledger.runs[claim.run_id]
        if run.epoch != claim.epoch or run.is_final:
            fenced += 1
            continue
        found = outcomes[claim.run_id]
        means = _with_room(found, pending)
        outcome = advance(run, found.script, ledger.now, means=means)
        if outcome.doomed:
            put_off.append(claim)
            continue
        ledger.note(outcome)
        ticks += outcome.run.ticks - run.ticks
        if found.quota is not None:
            observed += _observe(found, means, outcome.run, pending)
        if pending and run.workspace_id in pending:
            pending[run.workspace_id] += sum(call.status == ToolCallStatus.PENDING for call in outcome.tool_calls)
    await ledger.write()
    return Settled(ticks, fenced, put_off, observed)


async def _pending(ledger: Ledger, outcomes: Outcomes) -> dict[uuid.UUID, int]:
    """Lock the workspaces whose cap on pending tool calls matters; returns how many of each wait for approval.

    It matters to the shadow revision, too, which is told the number.
    """
    quotas = {each.agent.workspace_id: each.quota for each in outcomes.values() if each.quota is not None}
    capped = {
        workspace_id
        for workspace_id, quota in quotas.items()
        if any(each is not None and tool_calls_left(each, 0) is not None for each in (quota, quota.shadow))
    }
    return await ledger.lock_workspaces(capped) if capped else {}


def _with_room(found: Outcome, pending: Mapping[uuid.UUID, int]) -> Means:
    """Return what a turn has at hand, with whether its workspace may have one more call that waits for approval."""
    if found.quota is None:
        return found.means
    used = pending.get(found.agent.workspace_id)
    if used is None or tool_calls_left(found.quota, used) != 0:
        return found.means
    return msgspec.structs.replace(found.means, room=False)


def _observe(found: Outcome, means: Means, run: RunRow, pending: Mapping[uuid.UUID, int]) -> list[Observation]:
    """Return what the shadow revision would have said to a turn that asked for a call that needs approval."""
    if found.quota is None:
        return []
    used = pending.get(run.workspace_id)
    if used is None:
        return []
    asked = run.status == RunStatus.WAITING_FOR_APPROVAL if means.room else not run.is_final
    # A run has one open call at most, so it has none when it asks for one.
    uses = ((Limit.PENDING_TOOL_CALLS, used), (Limit.PENDING_TOOL_CALLS_PER_RUN, 0))
    return observe_caps(found.quota, uses, admitted=means.room) if asked else []


def _goes_outside(claim: Claim, agent: KnownAgent) -> bool:
    """Tell whether a run's turn may have to wait for a tool or a model."""
    if claim.delay is not None:
        return False
    return claim.tool_call_id is not None or (agent.model is not None and claim.status in WITH_STEPS)
