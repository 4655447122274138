"""Revisions on a real database: states, history, races, and what the database itself refuses."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from service.db import Database
from service.errors import IllegalState, Invalid, NotFound
from service.quota.guardrails import Finding, Guardrail
from service.quota.revisions import (
    Activation,
    Change,
    State,
    activate,
    active,
    changes,
    find,
    newest,
    propose,
    reject,
    rollback,
    shadow,
)
from service.quota.tables import FIRST, Provenance, Tables, write
from tests.quotatables import BY, file_of, tables

LARGER = tables(live_runs=13)


async def do(database: Database, step: Callable[..., Awaitable[Any]], *arguments: Any, **more: Any) -> Any:
    """Take one step in a transaction of its own."""
    async with database.begin() as connection:
        return await step(connection, *arguments, **more)


async def states(database: Database) -> dict[int, str]:
    """Return every revision's state."""
    async with database.read() as connection:
        return {each.revision: str(each.state) for each in await newest(connection, 100)}


async def history(database: Database, revision: int) -> list[tuple[str, str | None, str, int | None]]:
    """Return what happened to a revision: change, from, to, the revision that it replaced."""
    async with database.read() as connection:
        told = (await changes(connection, [revision]))[revision]
    return [(each.change.value, each.from_state, each.to_state.value, each.replaced) for each in told]


async def test_an_installation_starts_with_the_users_table_in_force(database: Database) -> None:
    first = await do(database, active)
    assert (first.revision, first.state, first.limits) == (1, State.ACTIVE, FIRST)
    assert await history(database, 1) == [("install", None, "active", None)]


async def test_a_proposal_is_stored_with_its_provenance_and_has_no_effect(database: Database) -> None:
    file = file_of(LARGER, author="recalibration", samples={"m": "a" * 64}, machine={"cpus": 2, "model": "x"})
    assert await do(database, propose, file, BY) == 2
    found = await do(database, find, 2)
    assert (found.state, found.limits, found.provenance) == (State.PROPOSED, LARGER, file.provenance)
    assert (await do(database, active)).revision == 1


async def test_an_activation_puts_it_in_force_and_says_what_it_replaced(database: Database) -> None:
    await do(database, propose, file_of(LARGER), BY)
    assert await do(database, activate, 2, BY) == Activation(True, 1, ())
    assert await states(database) == {2: "active", 1: "superseded"}
    assert await history(database, 2) == [
        ("propose", None, "proposed", None),
        ("activate", "proposed", "active", 1),
    ]
    assert (await history(database, 1))[-1] == ("supersede", "active", "superseded", None)


async def test_a_rollback_restores_the_identical_table_and_keeps_the_history(database: Database) -> None:
    before = write((await do(database, active)).limits)
    await do(database, propose, file_of(LARGER), BY)
    await do(database, activate, 2, BY)
    assert await do(database, rollback, BY, "too many refusals") == Activation(True, 2, ())
    restored = await do(database, active)
    assert (restored.revision, write(restored.limits)) == (1, before)
    assert await states(database) == {2: "superseded", 1: "active"}
    assert (await history(database, 1))[-1] == ("rollback", "superseded", "active", 2)


async def test_rollbacks_walk_back_step_by_step_to_the_first(database: Database) -> None:
    for revision, live_runs in ((2, 13), (3, 14)):
        await do(database, propose, file_of(tables(live_runs=live_runs)), BY)
        await do(database, activate, revision, BY)
    await do(database, rollback, BY)
    assert (await do(database, active)).revision == 2
    await do(database, propose, file_of(tables(live_runs=12)), BY)
    await do(database, activate, 4, BY)
    for expected in (2, 1):
        await do(database, rollback, BY)
        assert (await do(database, active)).revision == expected
    with pytest.raises(IllegalState, match="revision 1 is the first: there is nothing to go back to"):
        await do(database, rollback, BY)


async def test_a_refused_activation_changes_nothing_and_is_kept_with_its_reason(database: Database) -> None:
    await do(database, propose, file_of(tables(live_runs=20)), BY)
    finding = Finding("step limit", "default.live_runs 12 -> 20 (+66.7%): at most 20% in one revision", False)
    assert await do(database, activate, 2, BY) == Activation(False, 1, (finding,))
    assert await states(database) == {2: "proposed", 1: "active"}
    assert (await history(database, 2))[-1] == ("refuse", "proposed", "proposed", None)
    async with database.read() as connection:
        assert (await changes(connection, [2]))[2][-1].findings == [finding]


async def test_a_named_operator_with_a_reason_may_force_a_step(database: Database) -> None:
    await do(database, propose, file_of(tables(live_runs=20)), BY)
    with pytest.raises(Invalid, match="reason: say why the guardrails are overruled"):
        await do(database, activate, 2, BY, " ", force=True)
    outcome = await do(database, activate, 2, "ada", "a launch", force=True)
    assert (outcome.activated, [each.forced for each in outcome.findings]) == (True, [True])
    async with database.read() as connection:
        told = (await changes(connection, [2]))[2][-1]
    assert (told.change, told.by, told.reason, told.findings) == (
        Change.ACTIVATE, "ada", "a launch", list(outcome.findings),
    )  # fmt: skip


async def test_what_is_implausible_is_refused_even_when_forced(database: Database) -> None:
    await do(database, propose, file_of(tables(live_runs=0)), BY)
    outcome = await do(database, activate, 2, "ada", "because", force=True)
    assert (outcome.activated, await states(database)) == (False, {2: "proposed", 1: "active"})


async def test_a_guardrail_that_is_passed_in_is_asked_with_the_table_in_force(database: Database) -> None:
    asked: list[tuple[Tables, Tables, Provenance]] = []

    def never(current: Tables, proposed: Tables, provenance: Provenance, _: object) -> str:
        asked.append((current, proposed, provenance))
        return "not today"

    await do(database, propose, file_of(LARGER, note="n"), BY)
    outcome = await do(database, activate, 2, BY, guardrails=[Guardrail("never", never, may_be_forced=False)])
    assert outcome.findings == (Finding("never", "not today", False),)
    assert asked == [(FIRST, LARGER, Provenance(note="n"))]


async def test_there_is_one_shadow_at_most_and_a_new_one_sends_the_old_one_back(database: Database) -> None:
    for _ in range(2):
        await do(database, propose, file_of(LARGER), BY)
    await do(database, shadow, 2, BY)
    await do(database, shadow, 3, BY)
    assert await states(database) == {3: "shadow", 2: "proposed", 1: "active"}
    assert (await history(database, 2))[-1] == ("unshadow", "shadow", "proposed", None)
    await do(database, activate, 3, BY)
    assert await states(database) == {3: "active", 2: "proposed", 1: "superseded"}


async def test_a_rejected_revision_stays_rejected(database: Database) -> None:
    await do(database, propose, file_of(LARGER), BY)
    await do(database, reject, 2, BY, "no")
    for step in (activate, shadow, reject):
        with pytest.raises(IllegalState, match="revision 2 is rejected"):
            await do(database, step, 2, BY)


@pytest.mark.parametrize("step", [activate, shadow, reject])
async def test_what_is_in_force_or_was_is_not_activated_shadowed_or_rejected(database: Database, step: Any) -> None:
    await do(database, propose, file_of(LARGER), BY)
    await do(database, activate, 2, BY)
    with pytest.raises(IllegalState, match="revision 1 is superseded"):
        await do(database, step, 1, BY)
    with pytest.raises(IllegalState, match="revision 2 is active"):
        await do(database, step, 2, BY)
    with pytest.raises(NotFound, match="there is no quota revision 7"):
        await do(database, step, 7, BY)


@pytest.mark.parametrize("by", ["", " ", "x" * 201, "a\nb", "a\0"])
async def test_nobody_changes_anything_without_a_name(database: Database, by: str) -> None:
    with pytest.raises(Invalid, match="by: give 1 to 200 printable characters"):
        await do(database, propose, file_of(), by)
    assert await states(database) == {1: "active"}


async def test_of_many_activations_at_once_each_judges_what_the_one_before_left(database: Database) -> None:
    for live_runs in (13, 14, 15, 16, 17, 18):
        await do(database, propose, file_of(tables(live_runs=live_runs)), BY)
    outcomes = await asyncio.gather(*(do(database, activate, revision, BY) for revision in range(2, 8)))
    assert list((await states(database)).values()).count("active") == 1
    values, replaced = {n: 11 + n for n in range(1, 8)}, {n + 2: each for n, each in enumerate(outcomes)}
    for revision, outcome in replaced.items():
        within = abs(values[revision] - values[outcome.replaced]) <= max(1, values[outcome.replaced] / 5)
        assert outcome.activated == within, (revision, outcome)
    chain = [outcome.replaced for outcome in outcomes if outcome.activated]
    assert len(set(chain)) == len(chain), "two of them replaced the same revision"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE quota_revisions SET limits = '{}' WHERE revision = 1",
        'UPDATE quota_revisions SET provenance = \'{"author": "me"}\' WHERE revision = 1',
        "UPDATE quota_revisions SET proposed_at = now() WHERE revision = 1",
        "UPDATE quota_revisions SET revision = 9 WHERE revision = 2",
        "UPDATE quota_revisions SET state = 'rejected' WHERE revision = 1",
        "UPDATE quota_revisions SET state = 'superseded' WHERE revision = 1",
        "UPDATE quota_revisions SET state = 'active' WHERE revision = 2",
        "UPDATE quota_revisions SET state = 'odd' WHERE revision = 2",
        "DELETE FROM quota_revisions WHERE revision = 2",
        "TRUNCATE quota_revisions CASCADE",
        "UPDATE quota_changes SET by = 'somebody else'",
        "DELETE FROM quota_changes",
        "TRUNCATE quota_changes",
    ],
)
async def test_the_database_itself_keeps_revisions_and_their_history(database: Database, statement: str) -> None:
    await do(database, propose, file_of(LARGER), BY)
    before = await _everything(database)
    with pytest.raises(DBAPIError):
        async with database.begin() as connection:
            await connection.execute(text(statement))
    assert await _everything(database) == before


async def _everything(database: Database) -> list[str]:
    async with database.read() as connection:
        told = []
        for table in ("quota_revisions", "quota_changes"):
            found = await connection.execute(text(f"SELECT CAST(t AS text) AS row FROM {table} t ORDER BY 1"))  # noqa: S608
            told += [row.row for row in found]
    return told


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_whatever_is_done_one_is_active_and_a_rollback_undoes_the_last_activation(
    database: Database, seed: int
) -> None:
    draw = random.Random(seed)  # noqa: S311 - a walk that can be repeated
    in_force, known, done = [1], 1, set()
    for _ in range(120):
        step = draw.choice(["propose", "shadow", "activate", "activate", "rollback", "reject"])
        revision = draw.randint(max(1, known - 3), known + 1)
        try:
            if step == "propose":
                known = await do(database, propose, file_of(tables(live_runs=12 + draw.randint(0, 3))), BY)
            elif step == "rollback":
                await do(database, rollback, BY)
                in_force.pop()
            elif step == "activate":
                await do(database, activate, revision, BY, "a walk", force=True)
                in_force.append(revision)
            else:
                await do(database, {"shadow": shadow, "reject": reject}[step], revision, BY)
        except (IllegalState, NotFound):
            continue
        done.add(step)
        assert [each for each, state in (await states(database)).items() if state == "active"] == in_force[-1:]
    assert done == {"propose", "shadow", "activate", "rollback", "reject"}, "the walk did not try everything"
