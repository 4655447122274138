"""Settling: what one transaction does with the claims in a worker's hands.

It locks the rows, throws away the turns whose epoch has been raised meanwhile, decides each of the others anew from
the locked rows (`advance`), keeps the caps on tool calls that wait for approval, and writes everything at once. What
happens before and after, and when it fails: `tick`.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import msgspec

from service.advance import advance
from service.claims import Claim
from service.families import advance_family, fail_run
from service.ledger import Ledger
from service.pen import RunRow
from service.quota.caps import observe_caps, tool_calls_left
from service.quota.limits import Limit, Quota
from service.quota.shadow import Observation
from service.runs import RunStatus
from service.toolcalls import ToolCallStatus
from service.turns import PLAIN, Means
from service.workspaces import KnownAgent, ScriptStep


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


async def settle_family(ledger: Ledger, claim: Claim, found: Outcome) -> Settled:
    """Lock one run with all its descendants and write its turn, which ends them."""
    pending = await _pending(ledger, {claim.run_id: found})
    means = _with_room(found, pending)
    written = await advance_family(ledger, claim.run_id, claim.parent_run_id, claim.epoch, found.script, means)
    observed = _observe(found, means, ledger.runs[claim.run_id], pending) if written else []
    return Settled(int(written), int(not written), [], observed)


async def settle_failure(ledger: Ledger, claim: Claim, reason: str) -> Settled:
    """Lock one run with all its descendants and end them: the run as FAILED, for a reason that its reader sees."""
    written = await fail_run(ledger, claim.run_id, claim.parent_run_id, claim.epoch, reason)
    return Settled(int(written), int(not written), [])


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
