"""What may be deleted and what may not: nothing without a bundle that was just read and found whole."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from service.archive import (
    Folder,
    Made,
    Plan,
    Round,
    compact_events,
    covering,
    create_checkpoints,
    parse_event_types,
    purge,
)
from service.archive.rounds import Tally
from service.events import EventType
from tests.service.archive.conftest import FinishRuns, every_row
from tests.tenants import Tenant

STEPS = (EventType.STEP_CREATED,)


async def archive(tenant: Tenant, folder: Folder) -> list[Made]:
    """Bundle all that has ended, as one batch."""
    return (await create_checkpoints(tenant.database, folder, 0.0)).made


async def kept(tenant: Tenant, run_id: uuid.UUID) -> list[tuple[int, str]]:
    """Return the number and type of every event that the database still has."""
    return [(seq, event_type) for seq, event_type, _ in await tenant.events(run_id)]


async def test_compaction_deletes_the_given_types_and_remembers_the_highest_number(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns
) -> None:
    (run_id,) = await finish_runs()
    await archive(tenant, folder)
    before = await kept(tenant, run_id)
    deleted = [seq for seq, event_type in before if event_type == "step_created"]

    result = await compact_events(tenant.database, folder, STEPS, 0.0)

    assert (result.run_ids, result.event_count, result.damaged) == ([run_id], 2, [])
    assert await kept(tenant, run_id) == [each for each in before if each[0] not in deleted]
    row = await tenant.row(run_id)
    assert (row["compacted_through_seq"], row["last_seq"]) == (max(deleted), before[-1][0])
    assert await tenant.faults() == []


async def test_no_types_delete_nothing(tenant: Tenant, folder: Folder, finish_runs: FinishRuns) -> None:
    await finish_runs()
    await archive(tenant, folder)
    before = await every_row(tenant)
    assert (await compact_events(tenant.database, folder, (), 0.0)).run_ids == []
    assert await every_row(tenant) == before


async def test_a_run_is_compacted_once_for_each_type(tenant: Tenant, folder: Folder, finish_runs: FinishRuns) -> None:
    (run_id,) = await finish_runs()
    await archive(tenant, folder)
    both = (*STEPS, EventType.STATE_CHANGED)
    counts = [
        (await compact_events(tenant.database, folder, types, 0.0)).event_count for types in (STEPS, STEPS, both, both)
    ]
    assert counts == [2, 0, 2, 0]
    assert await kept(tenant, run_id) == [(1, "run_created"), (6, "run_archived")]
    rows = await tenant.rows("SELECT compacted_types FROM run_archives")
    assert [row["compacted_types"] for row in rows] == [["state_changed", "step_created"]]


async def test_a_run_without_a_bundle_or_changed_since_keeps_everything(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns
) -> None:
    _, changed = await finish_runs(2)
    await archive(tenant, folder)
    await finish_runs()
    await tenant.write("DELETE FROM run_archives WHERE run_id <> :r", r=changed)
    await tenant.write("UPDATE runs SET last_seq = last_seq + 1 WHERE run_id = :r", r=changed)
    before = await every_row(tenant)
    assert (await compact_events(tenant.database, folder, STEPS, 0.0)).run_ids == []
    assert (await purge(tenant.database, folder, 0.0)).run_ids == []
    assert await every_row(tenant) == before


def overwrite(file: Path) -> None:
    """Change one byte, which leaves the size as it was."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lengthen(file: Path) -> None:
    """Append a byte."""
    with file.open("ab") as opened:
        opened.write(b"x")


def link_elsewhere(file: Path) -> None:
    """Put a symbolic link to the same bytes in the file's place."""
    file.rename(file.parent.parent / "moved.zip")
    file.symlink_to(file.parent.parent / "moved.zip")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (Path.unlink, "its file is missing"),
        (overwrite, "its file does not have the recorded hash"),
        (lengthen, "its file has "),
        (link_elsewhere, "its file cannot be opened: "),
    ],
)
async def test_a_harmed_bundle_deletes_nothing_and_its_run_is_archived_again(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns, harm: Callable[[Path], object], reason: str
) -> None:
    harmed, sound = await finish_runs(2)
    made = await archive(tenant, folder)
    (path,) = [each.path for each in made if each.run_id == harmed]
    harm(folder.root / path)
    before = await kept(tenant, harmed)
    told: list[str] = []

    plan = Plan(0.0, STEPS, purge_older_than_s=0.0)
    first = await Round(tenant.database, folder, plan, complain=told.append).run()

    assert first == Tally(compacted=1, deleted_events=2, purged=1, faults=1)
    assert told[0].startswith(f"bundle {path}: {reason}")
    assert told[0].endswith(f"; run {harmed} keeps its rows and is archived again")
    assert await kept(tenant, harmed) == before
    assert await tenant.rows("SELECT run_id FROM runs WHERE run_id = :r", r=sound) == []

    second = await Round(tenant.database, folder, plan, complain=told.append).run()
    assert (second, len(told)) == (Tally(archived=1, compacted=1, deleted_events=2, purged=1), 1)


@pytest.mark.parametrize(
    "path",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "run_archives/{mine}/../x.json.zip",
        "run_archives/{mine}/../{file}",
        "run_archives/{mine}/{file}\n",
        "run_archives/00000000-0000-0000-0000-000000000000/{file}",
    ],
)
async def test_a_path_that_leads_elsewhere_is_not_opened(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns, path: str
) -> None:
    (mine,) = await finish_runs()
    (made,) = await archive(tenant, folder)
    written = path.format(mine=mine, file=made.path.rpartition("/")[2])
    await tenant.write("UPDATE run_archives SET path = :p", p=written)

    result = await compact_events(tenant.database, folder, STEPS, 0.0)

    assert (result.run_ids, result.event_count) == ([], 0)
    assert f"its path is not one of run {mine}" in result.damaged[0]


async def test_a_family_is_purged_children_first_and_only_as_a_whole(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns
) -> None:
    (parent,) = await finish_runs(children=2)
    await archive(tenant, folder)
    assert parent not in (await purge(tenant.database, folder, 0.0)).run_ids
    assert await tenant.rows("SELECT run_id FROM runs WHERE parent_run_id = :p", p=parent) == []
    assert (await purge(tenant.database, folder, 0.0)).run_ids == [parent]


async def test_a_child_stays_while_its_parent_is_not_archived(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns
) -> None:
    (parent,) = await finish_runs(children=1)
    await tenant.write("UPDATE runs SET ended_at = ended_at - interval '1 day' WHERE parent_run_id = :p", p=parent)
    (made,) = (await create_checkpoints(tenant.database, folder, 3600.0)).made
    assert made.run_id != parent
    assert (await purge(tenant.database, folder, 3600.0)).run_ids == []


async def test_a_purged_run_leaves_its_bundles_and_nothing_else(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns
) -> None:
    await finish_runs()
    (made,) = await archive(tenant, folder)
    await purge(tenant.database, folder, 0.0)
    rows = await every_row(tenant)
    assert {table: len(its) for table, its in rows.items()} == {
        "workspaces": 1, "agents": 1, "runs": 0, "steps": 0, "events": 0, "run_archives": 1,
    }  # fmt: skip
    assert (folder.root / made.path).is_file()


async def test_runs_that_ended_too_recently_are_neither_compacted_nor_purged(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns
) -> None:
    await finish_runs()
    await archive(tenant, folder)
    before = await every_row(tenant)
    plan = Plan(3600.0, STEPS, purge_older_than_s=3600.0)
    assert await Round(tenant.database, folder, plan).run() == Tally()
    assert await every_row(tenant) == before


async def test_a_limit_bounds_each_kind_of_work(tenant: Tenant, folder: Folder, finish_runs: FinishRuns) -> None:
    await finish_runs(5)
    tally = await Round(tenant.database, folder, Plan(0.0, STEPS, purge_older_than_s=0.0, limit=3)).run()
    assert tally == Tally(archived=3, compacted=3, deleted_events=6, purged=3)


async def test_who_asks_for_old_events_is_sent_to_the_bundle_that_has_them(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns
) -> None:
    (run_id,) = await finish_runs()
    (first,) = await archive(tenant, folder)
    await compact_events(tenant.database, folder, (EventType.RUN_ARCHIVED,), 0.0)
    await tenant.write("UPDATE runs SET archived_seq = 0 WHERE run_id = :r", r=run_id)
    (second,) = await archive(tenant, folder)
    async with tenant.database.read() as connection:
        found = [await covering(connection, run_id, since_seq) for since_seq in (0, first.last_seq - 1, first.last_seq)]
    assert found == [first.archive_id, first.archive_id, second.archive_id]
    async with tenant.database.read() as connection:
        assert await covering(connection, uuid.uuid4(), 0) is None


def test_event_types_are_read_from_a_list_with_commas() -> None:
    assert parse_event_types(" step_created,state_changed, step_created,") == (
        EventType.STEP_CREATED,
        EventType.STATE_CHANGED,
    )
    assert parse_event_types("") == ()
    with pytest.raises(ValueError, match="'step' is no event type; give some of run_created, state_changed"):
        parse_event_types("step_created,step")
