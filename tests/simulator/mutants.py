"""Bugs that engines of this kind have had, put back one at a time, so that a test can be tested.

A mutant is a piece of a function's source and what stands there instead. One that no longer fits its function fails
its test, so the list keeps up with the code.
"""

from __future__ import annotations
import __future__

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from service import advance, agents, approvals, changes, claims, families, joins, settling, tick
from service.backstop import Backstop
from service.ledger import Ledger
from service.pen import Pen

MOST_STEPS = 60_000
"""Steps within which a mutant must be found; most are within some hundred."""


class Mutant(NamedTuple):
    """A seeded bug."""

    bug: str  # as a sentence
    function: Callable[..., Any]
    old: str  # stands in the function's source exactly once
    new: str


MUTANTS = [
    Mutant(
        "nobody makes the run due for its next step",
        advance._go_on,
        "run.step_due_at = pen.now + _latency(script[run.script_position])",
        "run.step_due_at = None",
    ),
    Mutant(
        "a worker that lost its claim writes all the same",
        settling.settle_batch,
        "run.epoch != claim.epoch or run.is_final",
        "run.is_final",
    ),
    Mutant(
        "the cursor of the script counts all steps, spawns too",
        advance._follow,
        "step = script[run.script_position]",
        "step = script[min(run.step_count, len(script) - 1)]",
    ),
    Mutant(
        "a resume leads to RUNNING, past a join",
        changes.resume,
        "pen.change_status(RunStatus(run.paused_from), reason)",
        "pen.change_status(RunStatus.RUNNING, reason)",
    ),
    Mutant(
        "a child that ends does not tell its parent",
        Ledger.note,
        "if run.is_final and run.parent_run_id is not None:",
        "if run.status == 'FAILED' and run.parent_run_id is not None:",
    ),
    Mutant(
        "a child that ends is counted twice",
        changes.child_ended,
        "pen.count([child])",
        "pen.count([child, child] if parent.pending_subruns > 1 else [child])",
    ),
    Mutant(
        "a run that ends leaves its children behind",
        Pen.result,
        "if group.pending and (run.is_final or group.leaves_siblings)",
        "if group.pending and group.leaves_siblings",
    ),
    Mutant(
        "an event's number is used twice",
        Pen.event,
        "run.last_seq += 1",
        "run.last_seq += event_type != EventType.SUBRUN_CANCELLED",
    ),
    Mutant(
        "a run that ends does not say when",
        Pen.end,
        "run.ended_at = self.now",
        "run.ended_at = self.now if final is not RunStatus.FAILED else None",
    ),
    Mutant(
        "a deadline is looked at only when a child ends",
        Pen.schedule,
        "clocks = (run.step_due_at, run.wait_until, *deadlines)",
        "clocks = (run.step_due_at, run.wait_until)",
    ),
    Mutant(
        "a quorum counts failures",
        joins.judge,
        "if policy is FailurePolicy.IGNORE_FAILURE else 0",
        "if policy is not FailurePolicy.FAIL_FAST else 0",
    ),
    Mutant(
        "a group that was joined fails with a straggler",
        joins.judge,
        "if group.state != GroupState.WAITING:",
        "if group.state == GroupState.FAILED:",
    ),
    Mutant(
        "a pause leaves the run to its worker",
        changes.pause,
        "paused.epoch += 1",
        "paused.epoch += 0",
    ),
    Mutant(
        "a paused run is woken by its child",
        changes.child_ended,
        "and run.status != RunStatus.PAUSED",
        "",
    ),
    Mutant(
        "a step is executed before its time when a child wakes its parent",
        advance.advance,
        "elif status in WITH_STEPS and step_is_due:",
        "elif status in WITH_STEPS:",
    ),
    Mutant(
        "a run that cannot be written is tried for ever",
        tick.Ticker.postpone,
        "attempts >= MOST_ATTEMPTS",
        "attempts >= 10**9",
    ),
    Mutant(
        "a lease never ends",
        claims.Claims._claim,
        '"lease_s": self._lease_s',
        '"lease_s": 10.0**9',
    ),
    Mutant(
        "siblings of siblings are cancelled with a group",
        families._cancel_descendants,
        "if descendant.group_id in group_ids if is_child else descendant.parent_run_id in ids:",
        "if is_child and descendant.group_id in group_ids:",
    ),
    Mutant(
        "what was rejected is executed all the same",
        approvals.decide_tool_call,
        "status=ToolCallStatus.APPROVED if approve else ToolCallStatus.REJECTED",
        "status=ToolCallStatus.APPROVED",
    ),
    Mutant(
        "two people decide on one tool call",
        approvals.decide_tool_call,
        "or call.status != ToolCallStatus.PENDING",
        "",
    ),
    Mutant(
        "whoever sees a tool call may decide on it",
        approvals.decide_tool_call,
        "caller.require(DECIDERS[Risk(found.risk)])",
        "pass",
    ),
    Mutant(
        "an approval makes nobody go on",
        approvals.decide_tool_call,
        "pen.run.step_due_at = pen.clock",
        "pen.run.step_due_at = None",
    ),
    Mutant(
        "a dangerous tool needs no approval",
        advance._request,
        "status=ToolCallStatus.PENDING if definition.needs_approval",
        "status=ToolCallStatus.PENDING if definition.needs_approval and definition.risk != 'DANGEROUS'",
    ),
    Mutant(
        "a tool that runs is taken for dead",
        advance._observe,
        "call.lease_until > pen.now",
        "call.lease_until < pen.now",
    ),
    Mutant(
        "a tool whose worker died is waited for without end",
        advance._observe,
        "if call.lease_until is not None and call.lease_until > pen.now:",
        "if call.lease_until is not None:",
    ),
    Mutant(
        "the end of a tool call is told once more when it is observed",
        advance._observe,
        "if call.status != ToolCallStatus.REJECTED:",
        "if True:",
    ),
    Mutant(
        "a run that ends leaves its tool call open",
        Pen.end,
        "if self.run.tool_call is not None:",
        "if self.run.tool_call is not None and final is not RunStatus.CANCELED:",
    ),
    Mutant(
        "a run calls one tool more than it may",
        advance._exceeds,
        "run.tool_calls >= means.max_tool_calls",
        "run.tool_calls > means.max_tool_calls",
    ),
    Mutant(
        "tool calls of one batch are not counted together",
        settling.settle_batch,
        "pending[run.workspace_id] += sum(",
        "pending[run.workspace_id] += 0 * sum(",
    ),
    Mutant(
        "a step that was delayed is taken all the same",
        advance.advance,
        "elif means.delay is not None and step_is_due:",
        "elif False:",
    ),
    Mutant(
        "a run that was delayed is due no more",
        Pen.delay,
        "self.run.step_due_at = self.now + by",
        "self.run.step_due_at = None",
    ),
    Mutant(
        "a delay puts the deadline of a group off too",
        Pen.schedule,
        "run.next_tick_at = min(",
        "run.next_tick_at = run.step_due_at if run.delayed_under is not None else min(",
    ),
    Mutant(
        "a delayed run that is woken for a deadline forgets its rate",
        advance.advance,
        "    if step_is_due:\n",
        "    if True:\n",
    ),
    Mutant(
        "a delayed run forgets its rate when it is paused",
        changes.pause,
        "paused.epoch += 1",
        "paused.epoch, paused.delayed_under = paused.epoch + 1, None",
    ),
    Mutant(
        "those who are delayed are not called when the rate changes",
        Backstop.look,
        "is not None and rate.code == under",
        "is not None",
    ),
    Mutant(
        "a model's first tool is called in place of its second",
        agents.next_tool_call,
        "call = asked[observed]",
        "call = asked[0]",
    ),
]


@contextmanager
def mutated(mutant: Mutant) -> Iterator[None]:
    """Give a function the mutant's code for the length of the block, wherever it was imported to."""
    function = mutant.function
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(mutant.old) == 1, f"{mutant.old!r} is not in {function.__qualname__} exactly once"
    code = compile(source.replace(mutant.old, mutant.new), mutant.bug, "exec", __future__.annotations.compiler_flag)
    made: dict[str, Any] = {}
    exec(code, function.__globals__, made)  # noqa: S102 - the test's own
    (changed,) = made.values()
    before = function.__code__
    function.__code__ = changed.__code__
    try:
        yield
    finally:
        function.__code__ = before
