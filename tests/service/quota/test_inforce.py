"""Which quota is in force: after an activation, a rollback, an override, and at what cost."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from sqlalchemy import event

from service.db import Database
from service.errors import Invalid, NotFound
from service.quota.inforce import Quotas
from service.quota.limits import DEFAULT, LIFTED, Limit, Rate
from service.quota.overrides import clear_override, set_override
from service.quota.revisions import activate, propose, rollback, shadow
from service.workspaces import create_workspace
from tests.quotatables import BY, file_of, rate, tables


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.at_s = 0.0

    def __call__(self) -> float:
        return self.at_s


@contextmanager
def counted(database: Database) -> Iterator[list[str]]:
    """Collect every statement that is sent to the database in the block."""
    sent: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    event.listen(database.engine.sync_engine, "before_cursor_execute", note)
    yield sent
    event.remove(database.engine.sync_engine, "before_cursor_execute", note)


async def workspace(database: Database, quota_class: str = "default") -> uuid.UUID:
    """Make a workspace."""
    async with database.begin() as connection:
        return await create_workspace(connection, "tenant", quota_class)


async def put_in_force(database: Database, **default: Any) -> int:
    """Propose and activate a table; returns its number."""
    async with database.begin() as connection:
        revision = await propose(connection, file_of(tables(**default)), BY)
        assert (await activate(connection, revision, BY, "a test", force=True)).activated
    return revision


async def test_an_activation_is_in_force_within_a_second_of_what_was_read_last(database: Database) -> None:
    clock, workspace_id = Clock(), await workspace(database)
    quotas = Quotas(database, clock)
    before = await quotas.of(workspace_id)
    assert (before, before.revision) == (DEFAULT, 1)
    await put_in_force(database, run_creation=rate(12.001, 13), live_runs=13)
    clock.at_s = 0.999
    assert await quotas.of(workspace_id) is before
    clock.at_s = 1.0
    after = await quotas.of(workspace_id)
    rates = {**DEFAULT.rates, Limit.RUN_CREATION: Rate(Fraction("12.001"), 13)}
    assert (after, after.revision) == (replace(DEFAULT, rates=rates, live_runs=13), 2)


async def test_a_rollback_is_in_force_as_soon(database: Database) -> None:
    clock, workspace_id = Clock(), await workspace(database)
    quotas = Quotas(database, clock)
    await put_in_force(database, live_runs=13)
    assert (await quotas.of(workspace_id)).live_runs == 13
    async with database.begin() as connection:
        await rollback(connection, BY)
    clock.at_s = 1.0
    found = await quotas.of(workspace_id)
    assert (found, found.revision) == (DEFAULT, 1)


async def test_each_class_is_under_its_own_table(database: Database) -> None:
    ordinary, calibration = await workspace(database), await workspace(database, "calibration")
    await put_in_force(database, live_runs=13)
    quotas = Quotas(database)
    assert (await quotas.of(ordinary)).live_runs == 13
    assert await quotas.of(calibration) == LIFTED


async def test_an_override_lies_on_top_of_every_revision_until_it_is_taken_back(database: Database) -> None:
    clock, mine, other = Clock(), await workspace(database), await workspace(database)
    quotas = Quotas(database, clock)
    async with database.begin() as connection:
        await set_override(connection, mine, Limit.LIVE_RUNS, None, BY)
        await set_override(connection, mine, Limit.TICK, rate(7.5, 9), BY)
    expected = replace(DEFAULT, live_runs=None, rates={**DEFAULT.rates, Limit.TICK: Rate(Fraction("7.5"), 9)})
    assert (await quotas.of(mine), await quotas.of(other)) == (expected, DEFAULT)
    await put_in_force(database, live_runs=13, websockets=21)
    clock.at_s = 1.0
    assert await quotas.of(mine) == replace(expected, websockets=21)
    async with database.begin() as connection:
        assert await clear_override(connection, mine, Limit.LIVE_RUNS)
    clock.at_s = 2.0
    assert await quotas.of(mine) == replace(expected, websockets=21, live_runs=13)


@pytest.mark.parametrize("reason", ["x" * 2001, "a\x00b"])
async def test_an_override_whose_reason_nobody_could_read_is_refused(database: Database, reason: str) -> None:
    mine = await workspace(database)
    with pytest.raises(Invalid, match="reason: give at most 2000 characters"):
        async with database.begin() as connection:
            await set_override(connection, mine, Limit.LIVE_RUNS, 3, BY, reason)
    assert await Quotas(database).of(mine) == DEFAULT


async def test_a_shadow_comes_along_with_overrides_and_refuses_nothing_itself(database: Database) -> None:
    mine = await workspace(database)
    async with database.begin() as connection:
        await set_override(connection, mine, Limit.WEBSOCKETS, 7, BY)
        await propose(connection, file_of(tables(live_runs=2)), BY)
        await shadow(connection, 2, BY)
    quota = await Quotas(database).of(mine)
    assert quota.shadow is not None
    assert (quota.revision, quota.live_runs, quota.websockets) == (1, 12, 7)
    assert (quota.shadow.revision, quota.shadow.live_runs, quota.shadow.websockets) == (2, 2, 7)


async def test_asking_costs_one_query_for_any_number_of_workspaces_and_none_within_the_second(
    database: Database,
) -> None:
    clock = Clock()
    quotas, workspaces = Quotas(database, clock), [await workspace(database) for _ in range(5)]
    await quotas._read(workspaces)  # the tables of the revision in force are read once a process
    with counted(database) as sent:
        for each in workspaces:
            await quotas.of(each)
        assert sent == []
        clock.at_s = 1.0
        assert len({id(quota) for quota in await quotas._read(workspaces)}) == 1
        assert len(sent) == 1


async def test_an_absent_workspace_has_no_quota(database: Database) -> None:
    with pytest.raises(NotFound, match="no such workspace"):
        await Quotas(database).of(uuid.uuid4())
