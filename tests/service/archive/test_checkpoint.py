"""Bundles of finished runs: which runs get one, what the database says of it, and that two archivers share the work."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from service.archive import Folder, Made, Plan, Round, Stored, create_checkpoint, create_checkpoints
from service.archive.bundle import SCHEMA_VERSION, pack, unpack
from service.archive.checkpoint import _DUE, START, select_in_order
from service.archive.retention import _COMPACTABLE, _PURGEABLE
from service.db import Database
from service.errors import IllegalState, NotFound
from tests.service.archive.conftest import FinishRuns
from tests.tenants import Tenant


async def stored(tenant: Tenant, run_id: uuid.UUID) -> list[Any]:
    """Return a run's bundles, oldest first."""
    return await tenant.rows("SELECT * FROM run_archives WHERE run_id = :run_id ORDER BY last_seq", run_id=run_id)


def verify(folder: Folder, row: Any) -> Any:
    """Check the file of a row."""
    return folder.verify(Stored(*(row[name] for name in Stored._fields)))


async def test_a_final_run_gets_a_bundle_an_event_and_a_row(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns
) -> None:
    (run_id,) = await finish_runs()
    before = await tenant.events(run_id)

    batch = await create_checkpoints(tenant.database, folder, 0.0)

    (row,) = await stored(tenant, run_id)
    (made,) = batch.made
    last_seq = len(before) + 1
    assert made == Made(row["archive_id"], run_id, row["path"], row["sha256"], row["size_bytes"], last_seq, [])
    assert {name: row[name] for name in ("workspace_id", "schema_version", "last_seq", "compacted_types")} == {
        "workspace_id": tenant.workspace_id,
        "schema_version": SCHEMA_VERSION,
        "last_seq": last_seq,
        "compacted_types": [],
    }
    assert await tenant.events(run_id) == [
        *before,
        (last_seq, "run_archived", {"archive_id": str(made.archive_id), "path": made.path}),
    ]
    assert [(event.run_id, event.seq, event.event_type) for event in batch.events] == [
        (run_id, last_seq, "run_archived")
    ]
    assert verify(folder, row).header.created_at == row["created_at"] == batch.created_at
    assert await tenant.faults() == []


async def test_the_bundle_names_the_children_which_have_bundles_of_their_own(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns
) -> None:
    (parent,) = await finish_runs(children=2)
    await create_checkpoints(tenant.database, folder, 0.0)

    (row,) = await stored(tenant, parent)
    children = await tenant.rows("SELECT run_id, status FROM runs WHERE parent_run_id = :p ORDER BY run_id", p=parent)
    assert [(child.run_id, child.status) for child in verify(folder, row).children] == [
        (child["run_id"], "COMPLETED") for child in children
    ]
    for child in children:
        (row,) = await stored(tenant, child["run_id"])
        assert verify(folder, row).head.parent_run_id == parent


async def test_a_second_round_makes_no_second_bundle_unless_the_run_changed(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns
) -> None:
    (run_id,) = await finish_runs()
    await create_checkpoints(tenant.database, folder, 0.0)
    assert (await create_checkpoints(tenant.database, folder, 0.0)).made == []
    assert (await create_checkpoint(tenant.database, folder, run_id)).made == []

    await tenant.write("UPDATE runs SET last_seq = last_seq + 1 WHERE run_id = :r", r=run_id)
    await tenant.write(
        "INSERT INTO events SELECT run_id, last_seq, 'tool_call_completed', '{}', correlation_id, now() FROM runs"
        " WHERE run_id = :r",
        r=run_id,
    )
    (made,) = (await create_checkpoints(tenant.database, folder, 0.0)).made

    first, second = await stored(tenant, run_id)
    assert (first["last_seq"] + 2, made.archive_id) == (second["last_seq"], second["archive_id"])
    assert [verify(folder, row).head.last_seq for row in (first, second)] == [first["last_seq"], second["last_seq"]]


async def test_runs_that_are_live_or_ended_too_recently_are_left_alone(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns
) -> None:
    old, recent = await finish_runs(2)
    live = await tenant.run()
    await tenant.write("UPDATE runs SET ended_at = ended_at - interval '30 days' WHERE run_id = :r", r=old)

    batch = await create_checkpoints(tenant.database, folder, 29.9 * 86_400)

    assert [made.run_id for made in batch.made] == [old]
    assert [await stored(tenant, run_id) for run_id in (recent, live)] == [[], []]
    with pytest.raises(IllegalState, match="PENDING: only a run that has ended can be archived"):
        await create_checkpoint(tenant.database, folder, live)
    with pytest.raises(NotFound):
        await create_checkpoint(tenant.database, folder, uuid.uuid4())


async def test_a_round_goes_through_all_runs_in_batches_and_a_limit_ends_it(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns
) -> None:
    run_ids = await finish_runs(150)
    told: list[Made] = []
    first = await Round(tenant.database, folder, Plan(0.0, limit=70), archived=told.append).run()
    second = await Round(tenant.database, folder, Plan(0.0), archived=told.append).run()
    assert (first.archived, second.archived) == (70, 80)
    assert sorted(made.run_id for made in told) == sorted(run_ids)


async def test_two_rounds_at_once_share_the_work(
    tenant: Tenant, database_url: str, folder: Folder, finish_runs: FinishRuns
) -> None:
    run_ids = await finish_runs(400)
    told: list[list[Made]] = [[], []]
    other = Database(database_url)
    tallies = await asyncio.gather(
        Round(tenant.database, folder, Plan(0.0), archived=told[0].append).run(),
        Round(other, folder, Plan(0.0), archived=told[1].append).run(),
    )
    await other.close()

    assert sorted(made.run_id for part in told for made in part) == sorted(run_ids)
    assert min(tally.archived for tally in tallies) > 0
    assert await tenant.faults() == []


async def test_a_run_that_another_archiver_holds_is_passed_over(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns
) -> None:
    held, free = await finish_runs(2)
    async with tenant.database.begin() as connection:
        await connection.exec_driver_sql(f"SELECT FROM runs WHERE run_id = '{held}' FOR NO KEY UPDATE")
        batch = await create_checkpoints(tenant.database, folder, 0.0)
    assert [made.run_id for made in batch.made] == [free]
    assert [made.run_id for made in (await create_checkpoints(tenant.database, folder, 0.0)).made] == [held]


async def test_the_bundle_is_one_snapshot_whatever_is_committed_meanwhile(
    tenant: Tenant, database_url: str, folder: Folder, finish_runs: FinishRuns
) -> None:
    (run_id,) = await finish_runs()

    async def rename() -> None:
        other = Database(database_url)
        async with other.begin() as connection:
            await connection.exec_driver_sql("UPDATE agents SET name = 'renamed'")
        await other.close()

    def at(point: str) -> None:
        if point == "numbered":  # after the first statement, before the bundle is read
            thread = threading.Thread(target=lambda: asyncio.run(rename()))
            thread.start()
            thread.join()

    await create_checkpoints(tenant.database, folder, 0.0, at=at)

    (row,) = await stored(tenant, run_id)
    assert bytes(verify(folder, row).owners["agent"]["name"]) == b'"default"'
    assert [agent["name"] for agent in await tenant.rows("SELECT name FROM agents")] == ["renamed"]


async def test_a_run_whose_rows_contradict_each_other_is_told_of_and_its_neighbours_are_archived(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns
) -> None:
    good, bad, fine = await finish_runs(3)
    await tenant.write("DELETE FROM events WHERE run_id = :r AND seq = 3", r=bad)
    told: list[str] = []

    tally = await Round(tenant.database, folder, Plan(0.0), complain=told.append).run()

    assert (tally.archived, tally.faults) == (2, 1)
    assert told == [f"run {bad} cannot be archived: events: seq has gaps between 1 and 6"]
    assert [len(await stored(tenant, run_id)) for run_id in (good, bad, fine)] == [1, 0, 1]
    assert [len(list(folder.root.glob(f"run_archives/{run_id}/*"))) for run_id in (good, bad, fine)] == [1, 0, 1]
    assert (await tenant.row(bad))["last_seq"] == 5


async def test_a_file_that_no_row_knows_is_swept_only_when_the_new_bundle_holds_all_of_it(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns
) -> None:
    await finish_runs()
    (made,) = (await create_checkpoints(tenant.database, folder, 0.0)).made
    place = (folder.root / made.path).parent
    left_by_a_kill, damaged, richer = (place / f"run_snapshot_20200101T00000{n}.000000Z.json.zip" for n in range(3))
    left_by_a_kill.write_bytes((folder.root / made.path).read_bytes())
    damaged.write_bytes(b"no bundle")
    document = json.loads(unpack(left_by_a_kill.read_bytes()))
    document["steps"][0]["payload"] = {"only": "here"}
    richer.write_bytes(pack(json.dumps(document).encode()))
    await tenant.write("UPDATE runs SET archived_seq = 0")

    (again,) = (await create_checkpoints(tenant.database, folder, 0.0)).made

    assert again.swept == [left_by_a_kill.name]
    assert {path.name for path in place.iterdir()} == {
        damaged.name, richer.name, *(each.path.rpartition("/")[2] for each in (made, again)),
    }  # fmt: skip


async def test_runs_are_selected_by_an_index_in_the_order_of_their_ends(tenant: Tenant) -> None:
    await tenant.write(
        """INSERT INTO runs (run_id, workspace_id, agent_id, status, correlation_id, last_seq, archived_seq, created_at,
                             ended_at)
        SELECT gen_random_uuid(), :w, :a, CASE WHEN n % 2 = 0 THEN 'COMPLETED' ELSE 'RUNNING' END, gen_random_uuid(), 5,
               CASE WHEN n % 4 = 0 THEN 5 ELSE 0 END, now(),
               CASE WHEN n % 2 = 0 THEN now() - make_interval(mins => n) END
        FROM generate_series(1, 8000) n""",
        w=tenant.workspace_id,
        a=tenant.agent_id,
    )
    await tenant.write(
        """INSERT INTO run_archives
        SELECT run_id, run_id, workspace_id, run_id::text, '', 0, 1, last_seq, 0, '{}', now()
        FROM runs WHERE archived_seq = last_seq"""
    )
    for table in ("runs", "run_archives"):
        await tenant.write(f"ANALYZE {table}")
    after = {"older_than_s": 3600.0, "after_at": START.ended_at, "after_id": START.run_id, "most": 64}
    for statement, more in ((_DUE, {"skipped": []}), (_COMPACTABLE, {"types": ["step_created"]}), (_PURGEABLE, {})):
        async with tenant.database.begin() as connection:
            explain = text(f"EXPLAIN {statement}")
            plan = "\n".join(row[0] for row in await select_in_order(connection, explain, {**after, **more}))
        assert "Index Scan using runs_ended_idx on runs r" in plan
        assert "Seq Scan" not in plan
        assert "Sort" not in plan


@pytest.mark.parametrize("leads_out", [True, False], ids=["a link to elsewhere", "a file"])
async def test_whatever_else_is_in_place_of_a_runs_folder_stops_that_run_only(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns, tmp_path: Path, leads_out: bool
) -> None:
    tampered, other = await finish_runs(2)
    outside = tmp_path / "outside"
    outside.mkdir()
    folder.prepare()
    place = folder.root / "run_archives" / str(tampered)
    if leads_out:
        place.symlink_to(outside)
    else:
        place.write_text("in the way")
    complaints: list[str] = []

    tally = await Round(tenant.database, folder, Plan(0.0), complain=complaints.append).run()

    assert (tally.archived, tally.faults, list(outside.iterdir())) == (1, 1, [])
    assert complaints == [
        f"run {tampered} cannot be archived: its folder is {'a symbolic link' if leads_out else 'no folder'}"
    ]
    assert [row["archived_seq"] > 0 for row in (await tenant.row(tampered), await tenant.row(other))] == [False, True]


async def test_a_named_pipe_among_a_runs_bundles_holds_nobody_up(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns
) -> None:
    (run_id,) = await finish_runs()
    folder.prepare()
    place = folder.root / "run_archives" / str(run_id)
    place.mkdir()
    os.mkfifo(place / "run_snapshot_20260101T000000.000000Z.json.zip")
    assert len((await create_checkpoint(tenant.database, folder, run_id)).made) == 1
