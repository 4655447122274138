"""What must hold after every write, checked by somebody who knows the promises and not the engine.

The audit recounts: it never reads a counter that it could count itself, and it has a table of legal ways of its own.
A broken promise raises `Breach` at the very write that breaks it; the world turns it into `Broken`. What concerns tool
calls is in `calls`.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Mapping, Sequence

from service.events import NewEvent
from service.joins import Group
from service.pen import NewStep, RunRow
from service.workspaces import KnownAgent
from tests.simulator.breach import require
from tests.simulator.calls import CallAudit

FINAL = ("COMPLETED", "FAILED", "CANCELED")

LEGAL = {
    "PENDING": "RUNNING PAUSED FAILED CANCELED",
    "RUNNING": "PAUSED WAITING_FOR_APPROVAL WAITING_FOR_SUBRUN COMPLETED FAILED CANCELED",
    "WAITING_FOR_SUBRUN": "RUNNING PAUSED FAILED CANCELED",
    "WAITING_FOR_APPROVAL": "RUNNING PAUSED FAILED CANCELED",
    "PAUSED": "PENDING RUNNING WAITING_FOR_APPROVAL WAITING_FOR_SUBRUN CANCELED",
}

TELLS = {"subrun_completed": "COMPLETED", "subrun_failed": "FAILED", "subrun_cancelled": "CANCELED"}


class History:
    """What the audit has seen of one run."""

    def __init__(self, created_at: dt.datetime) -> None:
        self.seq = 0
        self.status = "PENDING"
        self.paused_from: str | None = None
        self.steps = 0
        self.script_position = 0
        self.own_steps = 0  # those that are no spawn
        self.last_kind = ""
        self.said = 1  # messages of the conversation with a model: its input, its answers, what was observed
        self.asked: list[str] = []  # tool calls of the model's last answer that were not made yet
        self.waits_for_call = False  # between a TOOL_CALL and its OBSERVATION
        self.ready_at = created_at  # when the step before was written
        self.settled: set[uuid.UUID] = set()


class Audit:
    """Follows every write."""

    def __init__(
        self, runs: Mapping[uuid.UUID, RunRow], children: Mapping[uuid.UUID, Sequence[uuid.UUID]], calls: CallAudit
    ) -> None:
        self._runs = runs
        self._children = children
        self._histories: dict[uuid.UUID, History] = {}
        self.calls = calls
        self.agents: Mapping[uuid.UUID, KnownAgent] = {}
        """What each agent does, by agent_id."""

    def accepted(self, run: RunRow) -> None:
        """Begin a run's history."""
        self._histories[run.run_id] = History(run.created_at)

    def changed(
        self,
        now: dt.datetime,
        before: Sequence[RunRow],
        steps: Sequence[NewStep],
        events: Sequence[NewEvent],
        groups: Sequence[tuple[Group | None, Group]],
        *,
        spawning: bool = False,
    ) -> None:
        """Check one write: rows as they were, what was appended, groups as they were and are."""
        for run in before:
            require(run.status not in FINAL, run, "changed after its end")
            after = self._runs[run.run_id]
            require(after.epoch >= run.epoch, run, "lost an epoch")
            waits = run.delayed_under is not None and run.step_due_at is not None and run.step_due_at > now
            kept = after.delayed_under == run.delayed_under or after.status in FINAL
            require(kept or not waits, run, "is delayed and forgot under which rate")
        for step in steps:
            self._step(step, now)
        for event in events:
            self._event(event)
        for old, new in groups:
            self._group(old, new, spawning)

    def consistent(self, run: RunRow) -> None:
        """Check a run that a transaction has changed, at its commit."""
        self._row(run)
        self.calls.consistent(run)

    def published(self, event: NewEvent) -> None:
        """Check that what is told to followers was committed."""
        require(event.seq <= self._histories[event.run_id].seq, self._runs[event.run_id], "told before the commit")

    def _step(self, step: NewStep, now: dt.datetime) -> None:
        run, history = self._runs[step.run_id], self._histories[step.run_id]
        history.steps += 1
        require(step.step_index == history.steps, run, f"numbered a step {step.step_index} after {history.steps - 1}")
        if step.kind == "SUBRUN_SPAWN":
            return
        agent = self.agents[run.agent_id]
        history.own_steps += 1
        history.last_kind = step.kind
        require(history.own_steps <= agent.max_steps, run, f"took more than {agent.max_steps} steps")
        require(history.status not in (*FINAL, "PAUSED"), run, f"executed a step while {history.status}")
        if step.kind == "OBSERVATION" and "tool" in step.payload:
            require(history.waits_for_call, run, "observed what it did not ask for")
            history.waits_for_call = False
            history.said += 1
            history.ready_at = now
            self.calls.observation(step)
            return
        require(not history.waits_for_call, run, "went on without the end of its tool call")
        history.waits_for_call = step.kind == "TOOL_CALL" and "tool" in step.payload
        if agent.model is None:
            self._script_step(run, history, agent, step, now)
        else:
            self._model_step(run, history, step)

    def _script_step(self, run: RunRow, history: History, agent: KnownAgent, step: NewStep, now: dt.datetime) -> None:
        history.script_position += 1
        require(step.payload["script_position"] == history.script_position, run, "executed a step twice or out of turn")
        planned = agent.script[history.script_position - 1]
        require(step.kind == planned.kind, run, "executed another step than its script has")
        require(step.payload.get("tool") == planned.tool, run, "called another tool than its script says")
        earliest = history.ready_at + dt.timedelta(milliseconds=planned.latency_ms)
        require(now >= earliest, run, "executed a step before its time")
        history.ready_at = now

    def _model_step(self, run: RunRow, history: History, step: NewStep) -> None:
        if step.kind == "MODEL_CALL":
            require(step.payload["content"] == str(history.said), run, "wrote an answer to what was said before")
            require(not history.asked, run, "asked its model before its tools were called")
            history.said += 1
            history.asked = [asked["id"] for asked in step.payload["tool_calls"]]
        elif step.kind == "TOOL_CALL":
            require(history.asked[:1] == [step.payload["model_call_id"]], run, "called a tool out of turn")
            del history.asked[0]

    def _event(self, event: NewEvent) -> None:
        run, history = self._runs[event.run_id], self._histories[event.run_id]
        history.seq += 1
        require(event.seq == history.seq, run, f"numbered an event {event.seq} after {history.seq - 1}")
        self.calls.event(event)
        if event.event_type == "state_changed":
            self._status(run, history, event.payload["from"], event.payload["to"])
        elif event.event_type in TELLS:
            child = self._runs[uuid.UUID(event.payload["child_run_id"])]
            require(child.run_id not in history.settled, run, f"settled {child.run_id} twice")
            require(
                child.status == TELLS[event.event_type], run, f"was told {event.event_type} of a {child.status} child"
            )
            history.settled.add(child.run_id)

    def _status(self, run: RunRow, history: History, old: str, new: str) -> None:
        require(old == history.status, run, f"says it was {old} and was {history.status}")
        require(new in LEGAL.get(old, "").split(), run, f"went from {old} to {new}")
        if new == "PAUSED":
            history.paused_from = old
        elif old == "PAUSED":
            require(new in (history.paused_from, "CANCELED"), run, f"was {history.paused_from} and resumed as {new}")
        history.status = new

    def _group(self, old: Group | None, new: Group, spawning: bool) -> None:
        run = self._runs[new.run_id]
        children = [child for child in self._of(run) if child.group_id == new.group_id]
        require(new.spawned == len(children), run, f"miscounts who was spawned into {new.group_id}")
        live = [child for child in children if child.status not in FINAL]
        require(new.pending == len(live), run, f"miscounts who is pending in {new.group_id}")
        bad = [child for child in children if child.status in ("FAILED", "CANCELED")]
        require(new.failed == len(bad), run, f"miscounts who failed in {new.group_id}")
        before = "WAITING" if old is None else old.state
        reopened = spawning and (before, new.state) == ("JOINED", "WAITING")
        require(new.state == before or before == "WAITING" or reopened, run, f"decided {new.group_id} twice")
        if new.state == "JOINED" and before == "WAITING":
            good = len(children) - len(live) - (0 if new.failure_policy == "IGNORE_FAILURE" else len(bad))
            need = {"WAIT_ANY": 1, "QUORUM": new.quorum or 0}.get(new.join_policy, len(children))
            overdue = (
                new.join_policy == "TIMEOUT"
                and new.deadline_at is not None
                and new.decided_at is not None
                and new.decided_at >= new.deadline_at
            )
            require(good >= need or overdue, run, f"joined {new.group_id} with {good} of {need}")

    def _row(self, run: RunRow) -> None:
        history, children = self._histories[run.run_id], self._of(run)
        live = [child for child in children if child.status not in FINAL]
        require(run.status == history.status, run, f"is {run.status} and told {history.status}")
        require((run.last_seq, run.step_count) == (history.seq, history.steps), run, "miscounts events or steps")
        require(run.script_position == history.script_position, run, "passed over a step")
        require((run.spawned_subruns, run.pending_subruns) == (len(children), len(live)), run, "miscounts its children")
        require(len(history.settled) == len(children) - len(live), run, "was not told of a child's end")
        final = run.status in FINAL
        require((run.ended_at is not None) == final, run, "has an end that its status denies")
        require(not final or not live, run, "left its children alone")
        require(not (final or run.status == "PAUSED") or run.next_tick_at is None, run, "is due and may have no turn")
        require(run.delayed_under is None or run.step_due_at is not None, run, "is delayed and has no step")
        require((run.status == "PAUSED") == (run.paused_from is not None), run, "does not know what it was paused from")
        awaited = run.next_tick_at is not None or bool(live) or self.calls.wakes(run)
        require(final or run.status == "PAUSED" or awaited, run, "has nobody to wake it")
        if run.status == "COMPLETED":
            agent = self.agents[run.agent_id]
            done = run.script_position == len(agent.script) if agent.model is None else history.last_kind == "MESSAGE"
            require(done and not history.waits_for_call, run, "completed before its last step")
            require(run.spawned_subruns >= run.expected_subruns, run, "completed without what was announced")
            undecided = [group.group_id for group in run.groups.values() if group.state != "JOINED"]
            require(not undecided, run, f"completed without {undecided}")
        require(run.status != "FAILED" or bool(run.error_summary), run, "failed and does not say why")

    def _of(self, run: RunRow) -> list[RunRow]:
        return [self._runs[run_id] for run_id in self._children.get(run.run_id, ())]
