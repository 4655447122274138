"""A bundle becomes the rows that it was made of, to the last byte, or nothing at all."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio

from service.archive import Damaged, Folder, Made, Plan, Round, rehydrate
from service.archive.bundle import pack, unpack
from service.db import Database
from service.errors import IllegalState, NotFound
from service.events import EventType
from service.families import cancel_run
from service.joins import JoinPolicy
from service.tick import Ticker
from tests.service.archive.conftest import FinishRuns, every_row
from tests.tenants import Tenant, drain
from tests.tickhands import Hands, throttled

AWKWARD = r"""
    {"text": "tab\t quote\" back\\ snow☃ \ud83c\udf0d", "number": 12345678901234567890.1250, "null": null, "l": [{}]}
"""
"""Metadata whose JSON a careless reader would change."""


async def family(tenant: Tenant, finish_runs: FinishRuns) -> uuid.UUID:
    """Finish a run with two children and awkward values; returns the run's id."""
    (run_id,) = await finish_runs(children=2)
    await tenant.write(
        "UPDATE runs SET metadata = CAST(:m AS json), input_text = :t, max_wait_seconds = 0.1 WHERE run_id = :r",
        m=AWKWARD.strip(), t='a "b"\\n☃', r=run_id,
    )  # fmt: skip
    return run_id


async def archive(tenant: Tenant, folder: Folder, **more: Any) -> list[Made]:
    """Run one round over all that has ended; returns the bundles."""
    made: list[Made] = []
    await Round(tenant.database, folder, Plan(0.0, **more), archived=made.append).run()
    return made


def parents_first(made: list[Made]) -> list[Made]:
    """Order bundles as they can be rehydrated: a run's id is younger than its parent's."""
    return sorted(made, key=lambda each: each.run_id)


async def test_a_purged_family_comes_back_row_by_row(tenant: Tenant, folder: Folder, finish_runs: FinishRuns) -> None:
    run_id = await family(tenant, finish_runs)
    made = await archive(tenant, folder)
    before = await every_row(tenant)
    await archive(tenant, folder, purge_older_than_s=0.0)
    purged = await every_row(tenant)
    assert [len(purged[table]) for table in ("runs", "steps", "events")] == [0, 0, 0]

    ids = [await rehydrate(tenant.database, folder, folder.root / each.path) for each in parents_first(made)]

    assert ids[0] == run_id
    assert await every_row(tenant) == before
    assert await tenant.faults() == []


async def test_a_run_that_was_delayed_comes_back_as_it_was(
    tenant: Tenant, folder: Folder, client: redis.asyncio.Redis
) -> None:
    hands = Hands(tenant, client)
    run_id = await throttled(tenant, hands)
    assert (await tenant.row(run_id))["delayed_under"] is not None
    async with tenant.database.begin() as connection:
        await cancel_run(connection, run_id)
    (made,) = await archive(tenant, folder)
    before = await every_row(tenant)
    await archive(tenant, folder, purge_older_than_s=0.0)

    assert await rehydrate(tenant.database, folder, folder.root / made.path) == run_id

    assert await every_row(tenant) == before
    assert await tenant.faults() == []


async def test_an_empty_database_gets_all_of_it_and_the_files_in_their_place(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns, new_database: Callable[[], str], tmp_path: Path
) -> None:
    await family(tenant, finish_runs)
    made = await archive(tenant, folder)
    before = await every_row(tenant)
    empty, elsewhere = Database(new_database()), Folder(tmp_path / "elsewhere")
    restored = Tenant(empty, tenant.announcer, tenant.workspace_id, tenant.agent_id)

    for each in parents_first(made):
        await rehydrate(empty, elsewhere, folder.root / each.path)

    assert await every_row(restored) == before
    for each in made:
        assert (elsewhere.root / each.path).read_bytes() == (folder.root / each.path).read_bytes()
    again = await Round(empty, elsewhere, Plan(0.0, (EventType.STEP_CREATED,), purge_older_than_s=0.0)).run()
    await empty.close()
    assert (again.archived, again.compacted, again.purged, again.faults) == (0, 3, 3, 0)


async def test_tool_calls_and_groups_come_back(tenant: Tenant, folder: Folder, ticker: Ticker) -> None:
    calls = {"kind": "TOOL_CALL", "tool": "echo", "arguments": {"say": "snow☃", "null": None}}
    parent = await tenant.run(await tenant.agent(calls, {"kind": "MESSAGE"}), 1)
    await tenant.spawn(parent, group_id="readers", join_policy=JoinPolicy.QUORUM, quorum=1, timeout_seconds=60.0)
    await drain(ticker)
    made = await archive(tenant, folder)
    before = await every_row(tenant)
    assert (len(before["tool_calls"]), len(before["subrun_groups"])) == (1, 1)
    await archive(tenant, folder, purge_older_than_s=0.0)
    purged = await every_row(tenant)
    assert (purged["runs"], purged["tool_calls"], purged["subrun_groups"]) == ([], [], [])

    for each in parents_first(made):
        await rehydrate(tenant.database, folder, folder.root / each.path)

    assert await every_row(tenant) == before
    assert await tenant.faults() == []


async def test_compacted_events_come_back_when_their_run_was_purged(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns
) -> None:
    (run_id,) = await finish_runs()
    (made,) = await archive(tenant, folder)
    before = await every_row(tenant)
    await archive(tenant, folder, compact=(EventType.STEP_CREATED,), purge_older_than_s=0.0)

    assert await rehydrate(tenant.database, folder, folder.root / made.path) == run_id

    assert await every_row(tenant) == before


async def test_numbers_go_on_where_they_were(tenant: Tenant, folder: Folder, finish_runs: FinishRuns) -> None:
    (run_id,) = await finish_runs()
    (made,) = await archive(tenant, folder)
    await archive(tenant, folder, purge_older_than_s=0.0)
    await rehydrate(tenant.database, folder, folder.root / made.path)
    assert (await tenant.row(run_id))["last_seq"] == made.last_seq


async def test_a_run_that_is_there_is_not_overwritten(tenant: Tenant, folder: Folder, finish_runs: FinishRuns) -> None:
    await finish_runs()
    (made,) = await archive(tenant, folder)
    before = await every_row(tenant)
    with pytest.raises(IllegalState, match="is in the database: only a run that is not can be rehydrated"):
        await rehydrate(tenant.database, folder, folder.root / made.path)
    assert await every_row(tenant) == before


async def test_a_child_comes_after_its_parent(tenant: Tenant, folder: Folder, finish_runs: FinishRuns) -> None:
    (parent,) = await finish_runs(children=1)
    made = await archive(tenant, folder, purge_older_than_s=0.0)
    child = next(each for each in made if each.run_id != parent)
    with pytest.raises(NotFound, match=f"rehydrate {parent} first"):
        await rehydrate(tenant.database, folder, folder.root / child.path)


async def test_of_two_bundles_only_the_newer_one_is_taken(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns
) -> None:
    (run_id,) = await finish_runs()
    (older,) = await archive(tenant, folder)
    await tenant.write("UPDATE runs SET archived_seq = 0 WHERE run_id = :r", r=run_id)
    (newer,) = await archive(tenant, folder)
    before = await every_row(tenant)
    await archive(tenant, folder, purge_older_than_s=0.0)
    with pytest.raises(IllegalState, match=f"has a newer bundle, with events up to {newer.last_seq}: take that one"):
        await rehydrate(tenant.database, folder, folder.root / older.path)
    await rehydrate(tenant.database, folder, folder.root / newer.path)
    assert await every_row(tenant) == before


def rewritten(file: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Write a bundle with a changed document to another place."""
    document = json.loads(unpack(file.read_bytes()))
    change(document)
    target.write_bytes(pack(json.dumps(document).encode()))
    return target


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d["run"].update(wings=2), "runs: the database has no column 'wings'"),
        (lambda d: [e.update({'x") SELECT': 1}) for e in d["events"]], "events: the database has no column"),
        (lambda d: d["steps"][0].pop("kind"), "steps: its rows do not have the same columns"),
        (lambda d: d["run"].update(created_at="yesterday-ish"), "holds what the database refuses: "),
        (lambda d: d["run"].update(status="RUNNING"), "holds what the database refuses: "),
        (lambda d: d["agent"].update(name=None), "holds what the database refuses: "),
    ],
)
async def test_a_bundle_that_the_database_refuses_changes_nothing(
    tenant: Tenant,
    folder: Folder,
    finish_runs: FinishRuns,
    new_database: Callable[[], str],
    tmp_path: Path,
    change: Callable[[dict[str, Any]], object],
    sentence: str,
) -> None:
    await finish_runs()
    (made,) = await archive(tenant, folder)
    file = rewritten(folder.root / made.path, tmp_path / "changed.zip", change)
    empty = Database(new_database())
    with pytest.raises(Damaged, match=sentence.replace("(", r"\(")):
        await rehydrate(empty, Folder(tmp_path / "elsewhere"), file)
    rows = await every_row(Tenant(empty, tenant.announcer, tenant.workspace_id, tenant.agent_id))
    await empty.close()
    assert {table: len(its) for table, its in rows.items()} == dict.fromkeys(rows, 0)


@pytest.mark.parametrize(
    ("kin", "sentence"),
    [
        ("agent", "its agent is another's"),
        ("parent", "its parent is another's"),
        ("recorded bundle", "its recorded bundle is another's"),
    ],
)
async def test_a_run_comes_back_into_the_workspace_of_all_its_kin_or_not_at_all(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns, tmp_path: Path, kin: str, sentence: str
) -> None:
    (run_id,) = await finish_runs()
    (made,) = await archive(tenant, folder, purge_older_than_s=0.0)
    (ours,) = await finish_runs()  # a run of the tenant whose agent and parent are laid hands on
    theirs, stranger = str(uuid.uuid4()), str(uuid.uuid4())

    def move(document: dict[str, Any]) -> None:
        document["workspace"].update(workspace_id=theirs, name="theirs")
        for row in (document["run"], document["agent"]):
            row["workspace_id"] = theirs
        if kin != "agent":
            document["run"]["agent_id"] = document["agent"]["agent_id"] = stranger
        if kin == "parent":
            document["run"]["parent_run_id"] = str(ours)
        if kin != "recorded bundle":  # nothing is known of the run
            document["archive"]["archive_id"] = stranger

    file = rewritten(folder.root / made.path, tmp_path / "moved.zip", move)
    if kin == "recorded bundle":
        await tenant.write("UPDATE run_archives SET sha256 = :s", s=hashlib.sha256(file.read_bytes()).hexdigest())
    else:
        await tenant.write("DELETE FROM run_archives WHERE run_id = :r", r=run_id)
    before = await every_row(tenant)
    with pytest.raises(Damaged, match=f"is said to be of workspace {theirs}, and {sentence}"):
        await rehydrate(tenant.database, folder, file)
    assert await every_row(tenant) == before
    assert await tenant.rows("SELECT 1 FROM workspaces WHERE workspace_id = CAST(:w AS uuid)", w=theirs) == []


async def test_a_bundle_that_is_not_the_recorded_one_is_refused(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns, tmp_path: Path
) -> None:
    await finish_runs()
    (made,) = await archive(tenant, folder)
    await archive(tenant, folder, purge_older_than_s=0.0)
    file = rewritten(folder.root / made.path, tmp_path / "changed.zip", lambda d: d["run"].update(input_text="other"))
    with pytest.raises(Damaged, match="does not have the recorded hash"):
        await rehydrate(tenant.database, folder, file)


async def test_a_file_that_is_none_is_named(tenant: Tenant, folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(Damaged, match=r"missing\.zip cannot be read: No such file"):
        await rehydrate(tenant.database, folder, tmp_path / "missing.zip")
    shutil.copy(__file__, tmp_path / "a.zip")
    with pytest.raises(Damaged, match=r"a\.zip: the zip cannot be read"):
        await rehydrate(tenant.database, folder, tmp_path / "a.zip")


async def test_of_several_who_restore_a_run_at_once_one_does_and_the_others_are_told(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns
) -> None:
    (run_id,) = await finish_runs()
    (made,) = await archive(tenant, folder)
    before = await every_row(tenant)
    await archive(tenant, folder, purge_older_than_s=0.0)
    file = folder.root / made.path

    ends = await asyncio.gather(*(rehydrate(tenant.database, folder, file) for _ in range(4)), return_exceptions=True)

    assert [end for end in ends if not isinstance(end, BaseException)] == [run_id]
    assert {str(end) for end in ends if isinstance(end, BaseException)} == {
        f"run {run_id} is in the database: only a run that is not can be rehydrated"
    }
    assert await every_row(tenant) == before


async def test_archivers_at_once_bundle_each_run_once(tenant: Tenant, folder: Folder, finish_runs: FinishRuns) -> None:
    run_ids = await finish_runs(12)
    made = await asyncio.gather(*(archive(tenant, folder, purge_older_than_s=0.0) for _ in range(3)))
    assert sorted(each.run_id for some in made for each in some) == sorted(run_ids)
    assert (await every_row(tenant))["runs"] == []
