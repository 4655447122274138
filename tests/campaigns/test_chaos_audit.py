"""The audit of the chaos campaign can fail: a sound database passes, and each way in which one may be broken is found.

The database is made by the service's own engine, once. Each test breaks it inside of a transaction that is never
committed, with the checks of its tables taken away, and lets the audit look.
"""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from service.db import Database
from service.embedded import Stack
from service.families import cancel_run
from service.joins import FailurePolicy, JoinPolicy
from service.tallies import Tallies
from service.tick import Ticker
from service.workspaces import Agents
from tests.campaigns.chaos_audit import audit
from tests.campaigns.chaos_load import Known, Plan
from tests.tenants import drain, open_tenant

NO_CHECKS = """
    DO $$ DECLARE c record; BEGIN
        FOR c IN SELECT conrelid::regclass AS its, conname FROM pg_constraint
            WHERE contype = 'c' AND connamespace = 'public'::regnamespace
        LOOP EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I', c.its, c.conname); END LOOP;
    END $$
"""


@dataclass(frozen=True)
class Sound:
    """A database in which all is well, what its users know of it, and the runs in it."""

    database_url: str
    known: Known
    effects: Counter[str]
    ids: dict[str, str]
    """parent, child, tool, call, cancelled, race."""


async def make_sound(database_url: str, redis_url: str) -> Sound:
    """Let the engine run a parent with two subruns, a race, a tool call, and a run that is cancelled."""
    database = Database(database_url, pool_size=2)
    async with open_tenant(database, redis_url) as tenant:
        plain = await tenant.agent({"kind": "PLAN"}, {"kind": "MODEL_CALL"}, {"kind": "MESSAGE"})
        tool = await tenant.agent({"kind": "TOOL_CALL", "tool": "echo", "arguments": {"a": 1}}, {"kind": "MESSAGE"})
        parent, race = await tenant.run(plain, expected_subruns=2), await tenant.run(plain, expected_subruns=2)
        children = [await tenant.spawn(parent, plain, "group") for _ in range(2)]
        for _ in range(2):
            await tenant.spawn(
                race, plain, "group", join_policy=JoinPolicy.WAIT_ANY, failure_policy=FailurePolicy.CANCEL_SIBLINGS
            )
        with_tool, cancelled = await tenant.run(tool), await tenant.run(plain)
        async with database.begin() as connection:
            await cancel_run(connection, cancelled, "asked for")
        ticker = Ticker(database, tenant.announcer, Agents(), Tallies(), lease_s=5)
        await drain(ticker)
        await ticker.close()
        await tenant.write(
            "UPDATE runs SET metadata = json_build_object('key', CAST(run_id AS text)) WHERE parent_run_id IS NULL"
        )
        (call,) = await tenant.rows("SELECT CAST(tool_call_id AS text) AS id FROM tool_calls")
        last = {str(row["run_id"]): row["last_seq"] for row in await tenant.rows("SELECT run_id, last_seq FROM runs")}
    await database.close()
    ids = {
        "parent": str(parent), "race": str(race), "child": str(children[0]), "tool": str(with_tool), "call": call["id"],
        "cancelled": str(cancelled),
    }  # fmt: skip
    users = [ids[name] for name in ("parent", "race", "tool", "cancelled")]
    known = Known(
        accepted={run_id: run_id for run_id in users},
        children={str(child): str(parent) for child in children},
        cancels_asked={ids["cancelled"]},
        cancels_confirmed={ids["cancelled"]},
        seen={"long-polls": {run_id: list(range(1, last[run_id] + 1)) for run_id in users}},
    )
    undisturbed = Plan("", "plain", 0, {"join_policy": "WAIT_ALL"}, "none", "none", False, False)
    known.plans = {ids["parent"]: undisturbed, ids["race"]: undisturbed, ids["tool"]: undisturbed}
    return Sound(database_url, known, Counter({ids["call"]: 1}), ids)


@pytest.fixture(scope="module")
def sound(stack: Stack, new_database: Callable[[], str]) -> Sound:
    """The sound database of this module."""
    return asyncio.run(make_sound(new_database(), stack.redis_url))


Change = Callable[[Known, Counter[str], Mapping[str, str]], object]


async def found(sound: Sound, statement: str | None = None, change: Change = lambda *_: None) -> list[str]:
    """Return what the audit says of the database after a statement, and of the users' knowledge after a change."""
    known, effects = copy.deepcopy(sound.known), Counter(sound.effects)
    change(known, effects, sound.ids)
    database = Database(sound.database_url, pool_size=1)

    async with database.engine.connect() as connection:

        async def read(asked: str) -> list[Mapping[str, Any]]:
            return [dict(row) for row in (await connection.exec_driver_sql(asked)).mappings()]

        await connection.exec_driver_sql(NO_CHECKS)
        if statement is not None:
            changed = await connection.exec_driver_sql(statement.format_map(sound.ids))
            assert changed.rowcount > 0, "the statement breaks nothing"
        faults = await audit(read, known, effects)
        await connection.rollback()
    await database.close()
    return faults


async def test_a_sound_database_passes(sound: Sound) -> None:
    assert await found(sound) == []


REPEAT_STEP = """
    INSERT INTO steps SELECT run_id, step_index + 100, kind, payload, correlation_id, created_at FROM steps
    WHERE run_id = '{tool}' AND
"""
TELL_AGAIN = """
    WITH told AS (UPDATE runs SET last_seq = last_seq + 1 WHERE run_id = '{parent}' RETURNING run_id, last_seq)
    INSERT INTO events (run_id, seq, event_type, payload, correlation_id, created_at)
    SELECT run_id, last_seq, event_type, payload, correlation_id, created_at FROM told JOIN events USING (run_id)
    WHERE event_type = 'subrun_completed' AND payload->>'child_run_id' = '{child}'
"""
TELL_OTHERWISE = "UPDATE events SET event_type = '{0}' WHERE run_id = '{1}' AND event_type = 'subrun_completed'"
LONGER_SCRIPT = (
    "UPDATE agents a SET script = script || script FROM runs r WHERE r.agent_id = a.agent_id AND r.run_id = "
)
FROM_PAUSED = "UPDATE events SET payload = jsonb_set(payload, '{{from}}', '\"PAUSED\"')"
NEVER_MADE_IT = "which its children never made it"

BROKEN = {
    "a step that was executed twice": (
        f"{REPEAT_STEP} payload ? 'script_position'",
        "a step of the script of {tool} was executed twice or passed over",
    ),
    "a step that its script does not have": (
        "UPDATE steps SET kind = 'OBSERVATION' WHERE run_id = '{parent}' AND kind = 'PLAN'",
        "run {parent} did OBSERVATION as step 1 of its script",
    ),
    "a run that completed before its last step": (
        f"{LONGER_SCRIPT} '{{tool}}'",
        "run {tool} is COMPLETED after 2 steps of its script",
    ),
    "a gap in seq": (
        "DELETE FROM events WHERE run_id = '{parent}' AND seq = 3",
        "events of {parent} have gaps",
    ),
    "a run left RUNNING": (
        "UPDATE runs SET status = 'RUNNING', ended_at = NULL WHERE run_id = '{tool}'",
        "run {tool} is RUNNING for ever",
    ),
    "a run whose events say something else": (
        "UPDATE runs SET status = 'FAILED', error_summary = 'x' WHERE run_id = '{tool}'",
        "run {tool} is FAILED, and its events say COMPLETED",
    ),
    "a run that failed without a cause": (
        "UPDATE runs SET status = 'FAILED', error_summary = 'could not be advanced' WHERE run_id = '{tool}'",
        "run {tool} is FAILED without a cause: could not be advanced",
    ),
    "an illegal way from one status to another": (
        f"{FROM_PAUSED} WHERE run_id = '{{tool}}' AND payload->>'to' = 'COMPLETED'",
        "run {tool} was RUNNING and says that it went from PAUSED to COMPLETED",
    ),
    "a run that is due after its end": (
        "UPDATE runs SET next_tick_at = now() WHERE run_id = '{tool}'",
        "run {tool} has ended and is due",
    ),
    "a slot of a subrun that is still held": (
        "UPDATE runs SET pending_subruns = 1 WHERE run_id = '{parent}'",
        "run {parent} holds 1 slots of subruns after its end",
    ),
    "a tool call that waits for ever": (
        "UPDATE tool_calls SET status = 'PENDING', ended_at = NULL WHERE tool_call_id = '{call}'",
        "tool call {call} is PENDING for ever",
    ),
    "a tool call that was observed twice": (
        f"{REPEAT_STEP} kind = 'OBSERVATION'",
        "tool call {call} was observed 2 times",
    ),
    "a parent that was settled twice": (
        TELL_AGAIN,
        "run {parent} was settled twice by {child}",
    ),
    "a parent that was never told": (
        TELL_OTHERWISE.format("step_created", "{parent}"),
        "{child} was settled 0 times",
    ),
    "a parent that was told of another end": (
        TELL_OTHERWISE.format("subrun_failed", "{parent}"),
        "run {parent} was told subrun_failed of {child}, which is COMPLETED",
    ),
    "a group that failed although nobody in it did": (
        "UPDATE subrun_groups SET state = 'FAILED' WHERE run_id = '{parent}'",
        f"run {{parent}} has group FAILED, {NEVER_MADE_IT}",
    ),
    "a group that was joined although its subruns failed": (
        TELL_OTHERWISE.format("subrun_failed", "{parent}"),
        f"run {{parent}} has group JOINED, {NEVER_MADE_IT}",
    ),
    "a race that nobody won": (
        TELL_OTHERWISE.format("subrun_cancelled", "{race}"),
        f"run {{race}} has group JOINED, {NEVER_MADE_IT}",
    ),
    "a run that did not wait for its group": (
        "UPDATE subrun_groups SET state = 'WAITING' WHERE run_id = '{parent}'",
        "run {parent} is COMPLETED while group waits",
    ),
    "a run that did not wait for an announced subrun": (
        "UPDATE runs SET expected_subruns = 3 WHERE run_id = '{parent}'",
        "run {parent} is COMPLETED with 2 of 3 announced subruns",
    ),
    "a create that was done twice": (
        "UPDATE runs SET metadata = json_build_object('key', '{parent}') WHERE run_id = '{tool}'",
        "key {parent} made 2 runs",
    ),
    "a run of which nobody knows": (
        "UPDATE runs SET metadata = json_build_object('key', 'nobody') WHERE run_id = '{tool}'",
        "a run with key nobody was made, and its user was not told",
    ),
    "a run that nobody cancelled": (
        "UPDATE runs SET status = 'CANCELED' WHERE run_id = '{tool}'",
        "run {tool} is CANCELED, and nobody asked for it",
    ),
}
"""By what is wrong: the statement that breaks the database, and the sentence that the audit must say."""


@pytest.mark.parametrize("way", BROKEN)
async def test_a_broken_database_is_found_out(sound: Sound, way: str) -> None:
    statement, sentence = BROKEN[way]
    assert sentence.format_map(sound.ids) in await found(sound, statement)


STRANGER = "00000000-0000-0000-0000-000000000000"

DECEIVED: dict[str, tuple[Change, str]] = {
    "an accepted run that is not there": (
        lambda known, _, ids: known.accepted.update({ids["parent"]: STRANGER}),
        f"run {STRANGER} was accepted and is not there",
    ),
    "an accepted subrun that is not there": (
        lambda known, _, ids: known.children.update({STRANGER: ids["parent"]}),
        f"subrun {STRANGER} of {{parent}} was accepted and is not there",
    ),
    "a cancel that was confirmed and not done": (
        lambda known, _, ids: known.cancels_confirmed.add(ids["parent"]),
        "run {parent} is COMPLETED, and its user was told that it is cancelled",
    ),
    "a run that was undisturbed and did not complete": (
        lambda known, _, ids: known.plans.update({ids["cancelled"]: known.plans[ids["parent"]]}),
        "run {cancelled} is CANCELED (asked for), and nothing stood in its way",
    ),
    "a decision that was lost": (
        lambda known, _, ids: known.decided.update({ids["call"]: "reject"}),
        "call {call}: somebody was told that it is decided (reject), and it is not",
    ),
    "a tool that was started twice": (
        lambda _, effects, ids: effects.update([ids["call"]]),
        "the tool of call {call} was started 2 times",
    ),
    "a tool that never was started": (
        lambda _, effects, ids: effects.clear(),
        "call {call} is COMPLETED and its tool had no effect",
    ),
    "a tool without a call": (
        lambda _, effects, ids: effects.update([STRANGER]),
        f"a tool was started for call {STRANGER}, which is not there",
    ),
    "an answer that no user may see": (
        lambda known, _, ids: known.faults.append("GET /: 500"),
        "GET /: 500",
    ),
}


@pytest.mark.parametrize("way", DECEIVED)
async def test_what_users_know_otherwise_is_found_out(sound: Sound, way: str) -> None:
    change, sentence = DECEIVED[way]
    assert sentence.format_map(sound.ids) in await found(sound, change=change)


@pytest.mark.parametrize("seen", [[1, 2, 2, 3], [1, 3, 2], [2, 3], [1, 2]])
async def test_a_client_that_missed_or_repeated_an_event_is_found_out(sound: Sound, seen: list[int]) -> None:
    faults = await found(sound, change=lambda known, _, ids: known.seen["long-polls"].update({ids["tool"]: seen}))
    assert faults
    assert all(fault.startswith(f"the long-polls of run {sound.ids['tool']}: ") for fault in faults)
