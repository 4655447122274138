"""The audit of the chaos campaign: does what the database holds agree with itself, with the users, and with the world?

Written by somebody who knows the promises and not the engine: counters are recounted, events are replayed, joins are
judged again from the order in which a parent was told of its children, tools are counted where they had their effect.
Every contradiction is a sentence; an empty list is what is promised. `test_chaos_audit.py` breaks a database in each
of the ways looked for here and sees it found.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

from tests.campaigns.chaos_load import FINAL, Known
from tests.simulator.audit import LEGAL, TELLS
from tests.sockets import faults_of
from tests.tenants import FAULTS

Row = Mapping[str, Any]
Read = Callable[[str], Awaitable[Sequence[Row]]]
"""Runs one statement and returns its rows."""

NOT_ENDED = """
    SELECT 'run ' || run_id || ' is ' || status || ' for ever' AS fault FROM runs
    WHERE status NOT IN ('COMPLETED', 'FAILED', 'CANCELED')
"""
SLOTS_HELD = """
    SELECT 'run ' || run_id || ' holds ' || pending_subruns || ' slots of subruns after its end' AS fault FROM runs
    WHERE ended_at IS NOT NULL AND pending_subruns <> 0
    UNION ALL
    SELECT 'tool call ' || tool_call_id || ' is ' || status || ' for ever' FROM tool_calls
    WHERE status NOT IN ('COMPLETED', 'FAILED', 'REJECTED', 'CANCELED')
    UNION ALL
    SELECT 'run ' || run_id || ' has ended and is due' FROM runs WHERE ended_at IS NOT NULL AND next_tick_at IS NOT NULL
"""
OTHER_STEPS = """
    SELECT 'run ' || s.run_id || ' did ' || s.kind || ' as step ' || (s.payload->>'script_position') || ' of its script'
        AS fault FROM steps s JOIN runs r USING (run_id) JOIN agents a ON a.agent_id = r.agent_id
    WHERE s.payload ? 'script_position'
        AND s.kind IS DISTINCT FROM a.script->((s.payload->>'script_position')::int - 1)->>'kind'
    UNION ALL
    SELECT 'run ' || r.run_id || ' is COMPLETED after ' || r.script_position || ' steps of its script' FROM runs r
    JOIN agents a ON a.agent_id = r.agent_id
    WHERE r.status = 'COMPLETED' AND r.script_position <> jsonb_array_length(a.script)
    UNION ALL
    SELECT 'tool call ' || t.tool_call_id || ' was observed ' || count(s.run_id) || ' times' FROM tool_calls t
    JOIN runs r ON r.run_id = t.run_id LEFT JOIN steps s ON s.run_id = t.run_id AND s.kind = 'OBSERVATION'
        AND s.payload->>'tool_call_id' = CAST(t.tool_call_id AS text)
    GROUP BY t.tool_call_id, r.status HAVING count(s.run_id) > 1 OR (r.status = 'COMPLETED' AND count(s.run_id) = 0)
"""
RUNS = """
    SELECT r.run_id::text, r.parent_run_id::text, r.status, r.error_summary, r.expected_subruns, r.spawned_subruns,
           r.last_seq, r.metadata->>'key' AS key, a.name AS agent, p.ended_at IS NOT NULL AS parent_ended
    FROM runs r JOIN agents a ON a.agent_id = r.agent_id LEFT JOIN runs p ON p.run_id = r.parent_run_id
"""
EVENTS = """
    SELECT run_id::text, seq, event_type, payload::text FROM events
    WHERE event_type IN ('state_changed', 'subrun_spawned', 'subrun_completed', 'subrun_failed', 'subrun_cancelled')
    ORDER BY run_id, seq
"""
GROUPS = """
    SELECT run_id::text, group_id, join_policy, failure_policy, quorum, state, spawned,
           coalesce(decided_at >= deadline_at, false) AS overdue FROM subrun_groups
"""
CALLS = "SELECT tool_call_id::text, status, started_at IS NOT NULL AS started FROM tool_calls"


async def audit(read: Read, known: Known, effects: Counter[str]) -> list[str]:
    """Return every contradiction between the database, what the users know, and what had an effect."""
    faults = list(known.faults)
    for statement in (NOT_ENDED, FAULTS, SLOTS_HELD, OTHER_STEPS):
        faults += [str(row["fault"]) for row in await read(statement)]
    runs = {row["run_id"]: row for row in await read(RUNS)}
    events: dict[str, list[Row]] = defaultdict(list)
    for row in await read(EVENTS):
        events[row["run_id"]].append({**row, "payload": json.loads(row["payload"])})
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in await read(GROUPS):
        groups[row["run_id"]].append(row)
    faults += accepted_once(runs, known)
    for run_id, run in runs.items():
        faults += [f"run {run_id} {what}" for what in lived_legally(run, events[run_id], runs)]
        faults += [f"run {run_id} {what}" for what in joined_rightly(run, events[run_id], groups[run_id])]
        faults += [f"run {run_id} {what}" for what in ended_as_asked(run, known)]
    faults += started_once(await read(CALLS), known, effects)
    for way, by_run in known.seen.items():
        for run_id, seen in by_run.items():
            last = runs[run_id]["last_seq"] if run_id in runs else 0
            faults += [f"the {way} of run {run_id}: {fault}" for fault in faults_of(seen, 1, last)]
    return faults


def accepted_once(runs: Mapping[str, Row], known: Known) -> Iterable[str]:
    """Compare what was accepted with what users were told."""
    by_key = Counter(run["key"] for run in runs.values() if run["parent_run_id"] is None)
    for key, run_id in known.accepted.items():
        if by_key[key] != 1:
            yield f"key {key} made {by_key[key]} runs"
        if run_id not in runs:
            yield f"run {run_id} was accepted and is not there"
    for key in by_key.keys() - known.accepted.keys():
        yield f"a run with key {key} was made, and its user was not told"
    for child, parent in known.children.items():
        if child not in runs or runs[child]["parent_run_id"] != parent:
            yield f"subrun {child} of {parent} was accepted and is not there"


def lived_legally(run: Row, events: Sequence[Row], runs: Mapping[str, Row]) -> Iterable[str]:
    """Follow a run through its statuses, and through what it was told of its children."""
    status, settled = "PENDING", set[str]()
    for event in events:
        payload, kind = event["payload"], event["event_type"]
        if kind == "state_changed":
            if payload["from"] != status or payload["to"] not in LEGAL.get(status, "").split():
                yield f"was {status} and says that it went from {payload['from']} to {payload['to']}"
            status = payload["to"]
        elif kind in TELLS:
            child = runs.get(payload["child_run_id"])
            if child is None or child["parent_run_id"] != run["run_id"]:
                yield f"was told of {payload['child_run_id']}, which is none of its subruns"
            elif child["status"] != TELLS[kind]:
                yield f"was told {kind} of {payload['child_run_id']}, which is {child['status']}"
            if payload["child_run_id"] in settled:
                yield f"was settled twice by {payload['child_run_id']}"
            settled.add(payload["child_run_id"])
    if status != run["status"]:
        yield f"is {run['status']}, and its events say {status}"


def joined_rightly(run: Row, events: Sequence[Row], groups: Sequence[Row]) -> Iterable[str]:
    """Judge a run's groups again, from the order in which its children came and ended, and its end from them."""
    for group in groups:
        reached = reachable_states(group, events)
        if group["state"] != "WAITING" and group["state"] not in reached:
            yield f"has {group['group_id']} {group['state']}, which its children never made it"
        if group["state"] == "WAITING" and run["status"] == "COMPLETED":
            yield f"is COMPLETED while {group['group_id']} waits"
    states = {group["state"] for group in groups}
    if run["status"] == "COMPLETED":
        if "FAILED" in states:
            yield "is COMPLETED with a group that failed"
        if run["spawned_subruns"] < run["expected_subruns"]:
            yield f"is COMPLETED with {run['spawned_subruns']} of {run['expected_subruns']} announced subruns"
    elif run["status"] == "FAILED":
        if not run["error_summary"]:
            yield "is FAILED and does not say why"
        elif "FAILED" not in states and run["agent"] != "failing":
            yield f"is FAILED without a cause: {run['error_summary']}"


def reachable_states(group: Row, events: Sequence[Row]) -> set[str]:
    """Return the states into which a group may have been decided, at one point or another of its life."""
    policy, need = group["failure_policy"], {"WAIT_ANY": 1, "QUORUM": group["quorum"]}.get(group["join_policy"])
    spawned = completed = failed = 0
    states: set[str] = set()
    if group["overdue"]:
        states.add("JOINED" if group["join_policy"] == "TIMEOUT" else "FAILED")
    for event in events:
        if event["payload"].get("group_id") != group["group_id"]:
            continue
        spawned += event["event_type"] == "subrun_spawned"
        completed += event["event_type"] == "subrun_completed"
        failed += event["event_type"] in ("subrun_failed", "subrun_cancelled")
        pending = spawned - completed - failed
        if failed and (policy == "FAIL_FAST" or (policy == "CANCEL_SIBLINGS" and need is None)):
            return states | {"FAILED"}  # whatever comes after this
        good = completed + (failed if policy == "IGNORE_FAILURE" else 0)
        if pending == 0 if need is None else good >= need:
            states.add("JOINED")
        elif need is not None and good + pending < need:
            states.add("FAILED")
    return states


def ended_as_asked(run: Row, known: Known) -> Iterable[str]:
    """Compare a run's end with what its user asked for."""
    run_id, status = run["run_id"], run["status"]
    if run_id in known.cancels_confirmed and status != "CANCELED":
        yield f"is {status}, and its user was told that it is cancelled"
    if status == "CANCELED" and run["parent_run_id"] is None and run_id not in known.cancels_asked:
        yield "is CANCELED, and nobody asked for it"
    plan = known.plans.get(run_id)
    if plan is None or status not in FINAL:
        return
    if plan.agent == "failing" and status == "COMPLETED":
        yield "is COMPLETED, and its script fails"
    undisturbed = plan.agent != "failing" and plan.own_act != "cancel" and plan.child_act != "cancel"
    out_of_reach = plan.options["join_policy"] == "QUORUM" and plan.options["quorum"] > plan.children
    if undisturbed and not out_of_reach and status != "COMPLETED":
        yield f"is {status} ({run['error_summary']}), and nothing stood in its way"


def started_once(calls: Sequence[Row], known: Known, effects: Counter[str]) -> Iterable[str]:
    """Compare the tool calls' rows with what people decided and with how often each tool had its effect."""
    by_id = {call["tool_call_id"]: call for call in calls}
    for call_id, times in effects.items():
        if times > 1:
            yield f"the tool of call {call_id} was started {times} times"
        if call_id not in by_id:
            yield f"a tool was started for call {call_id}, which is not there"
    for call_id, call in by_id.items():
        if call["status"] == "COMPLETED" and not effects[call_id]:
            yield f"call {call_id} is COMPLETED and its tool had no effect"
        if not call["started"] and effects[call_id]:
            yield f"the tool of call {call_id} had its effect and was never started"
    for call_id, what in known.decided.items():
        rejected = call_id in by_id and by_id[call_id]["status"] == "REJECTED"
        if (what == "reject") != rejected and (call_id not in by_id or by_id[call_id]["status"] != "CANCELED"):
            yield f"call {call_id}: somebody was told that it is decided ({what}), and it is not"
