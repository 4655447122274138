"""A real process that is killed at each write point of a round: the old state or the new one, and the next completes.

The points are those at which `at` is called. A round that is not killed must pass all of them and no others, so a write
point that is added to the code and not here fails this test.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import subprocess
import sys
import uuid
from typing import NamedTuple

import pytest

from service.archive import Folder, Plan, Round, Stored
from service.archive.rounds import Tally
from service.events import EventType
from tests.service.archive.conftest import FinishRuns
from tests.tenants import Tenant

pytestmark = pytest.mark.acceptance

ROUND = """
import asyncio, os, signal, sys
from pathlib import Path
from service.archive import Folder, Plan, Round
from service.db import Database
from service.events import EventType

def at(point):
    print(point, flush=True)
    if point == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)

async def run():
    database = Database(os.environ["DATABASE_URL"], pool_size=1)
    types = (EventType.STEP_CREATED,) if sys.argv[3] == "compact" else ()
    plan = Plan(0.0, types, purge_older_than_s=0.0 if sys.argv[3] == "purge" else None)
    await Round(database, Folder(Path(sys.argv[1])), plan, at=at).run()
    await database.close()

asyncio.run(run())
"""
"""One round that ends itself at the named point; it archives and then compacts or purges."""

OPEN_TRANSACTIONS = """
    SELECT pid FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL
"""

BEFORE_COMMIT = ["claimed", "numbered", "half written", "file synced", "renamed", "folder synced", "recorded"]
COMPACTION = ["bundles checked", "events deleted", "compacted"]
PURGE = ["bundles checked", "run deleted", "purged"]
COMPACT = Plan(0.0, (EventType.STEP_CREATED,))


async def kill_at(tenant: Tenant, folder: Folder, environment: dict[str, str], point: str, then: str) -> list[str]:
    """Run a round in a process that kills itself at a point, "never" at none; returns the points that it passed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ROUND, str(folder.root), point, then, env=environment, stdout=subprocess.PIPE
    )
    said, _ = await process.communicate()
    assert process.returncode == (0 if point == "never" else -signal.SIGKILL)
    for _ in itertools.count():  # until the server has noticed that its client is gone; the test's timeout bounds it
        if not await tenant.rows(OPEN_TRANSACTIONS):
            break
        await asyncio.sleep(0.02)
    return said.decode().splitlines()


class State(NamedTuple):
    """What there is of a run."""

    rows: int  # in runs: 1, or 0 when it was purged
    last_seq: int
    archived_seq: int
    compacted_through_seq: int
    events: list[int]  # numbers of those in the database
    bundles: int  # each with a row, and a file that was found whole
    files: int  # finished ones, with a row or not


async def state(tenant: Tenant, folder: Folder, run_id: uuid.UUID) -> State:
    """Return what there is of a run, having checked that nothing of it contradicts anything else."""
    archives = await tenant.rows("SELECT * FROM run_archives WHERE run_id = :r ORDER BY last_seq", r=run_id)
    for archive in archives:
        bundle = folder.verify(Stored(*(archive[name] for name in Stored._fields)))
        assert bundle.head.last_seq == archive["last_seq"]
    events = await tenant.events(run_id)
    runs = await tenant.rows("SELECT * FROM runs WHERE run_id = :r", r=run_id)
    if runs:
        announced = [payload["path"] for _, event_type, payload in events if event_type == "run_archived"]
        assert announced == [archive["path"] for archive in archives]
    assert await tenant.faults() == []
    files = list((folder.root / "run_archives" / str(run_id)).glob("run_snapshot_*"))
    last_seq, archived_seq, compacted_through_seq = (
        runs[0][name] if runs else 0 for name in ("last_seq", "archived_seq", "compacted_through_seq")
    )
    numbers = [seq for seq, _, _ in events]
    return State(len(runs), last_seq, archived_seq, compacted_through_seq, numbers, len(archives), len(files))


OLD = State(1, 5, 0, 0, [1, 2, 3, 4, 5], 0, 0)
"""A finished run: created, running, two steps, completed."""
ARCHIVED = State(1, 6, 6, 0, [1, 2, 3, 4, 5, 6], 1, 1)
COMPACTED = State(1, 6, 6, 4, [1, 2, 5, 6], 1, 1)
PURGED = State(0, 0, 0, 0, [], 1, 1)


@pytest.mark.parametrize(("then", "points"), [("compact", COMPACTION), ("purge", PURGE)])
async def test_a_round_passes_these_write_points_and_no_others(
    tenant: Tenant,
    folder: Folder,
    finish_runs: FinishRuns,
    service_environment: dict[str, str],
    then: str,
    points: list[str],
) -> None:
    (run_id,) = await finish_runs()
    passed = await kill_at(tenant, folder, service_environment, "never", then)
    assert passed == [*BEFORE_COMMIT, "committed", *points]
    assert await state(tenant, folder, run_id) == {"compact": COMPACTED, "purge": PURGED}[then]


@pytest.mark.parametrize("point", BEFORE_COMMIT)
async def test_killed_before_the_commit_nothing_happened(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns, service_environment: dict[str, str], point: str
) -> None:
    run_ids = await finish_runs(3)
    await kill_at(tenant, folder, service_environment, point, "compact")
    for run_id in run_ids:
        found = await state(tenant, folder, run_id)
        assert found._replace(files=0) == OLD
        assert found.files <= 1

    assert await Round(tenant.database, folder, COMPACT).run() == Tally(archived=3, compacted=3, deleted_events=6)

    assert [await state(tenant, folder, run_id) for run_id in run_ids] == [COMPACTED] * 3
    leftovers = {path.name for path in folder.root.rglob("*") if path.is_file()} - {
        row["path"].rpartition("/")[2] for row in await tenant.rows("SELECT path FROM run_archives")
    }
    assert leftovers == set()


@pytest.mark.parametrize(
    ("then", "point", "left", "completed"),
    [
        ("compact", "committed", ARCHIVED, Tally(compacted=3, deleted_events=6)),
        ("compact", "bundles checked", ARCHIVED, Tally(compacted=3, deleted_events=6)),
        ("compact", "events deleted", ARCHIVED, Tally(compacted=3, deleted_events=6)),
        ("compact", "compacted", COMPACTED, Tally()),
        ("purge", "bundles checked", ARCHIVED, Tally(purged=3)),
        ("purge", "run deleted", ARCHIVED, Tally(purged=3)),
        ("purge", "purged", PURGED, Tally()),
    ],
)
async def test_killed_after_the_commit_the_bundle_stays_and_the_rest_is_done_by_the_next_round(
    tenant: Tenant,
    folder: Folder,
    finish_runs: FinishRuns,
    service_environment: dict[str, str],
    then: str,
    point: str,
    left: State,
    completed: Tally,
) -> None:
    run_ids = await finish_runs(3)
    await kill_at(tenant, folder, service_environment, point, then)
    assert [await state(tenant, folder, run_id) for run_id in run_ids] == [left] * 3

    plan = COMPACT if then == "compact" else Plan(0.0, purge_older_than_s=0.0)
    assert await Round(tenant.database, folder, plan).run() == completed

    done = COMPACTED if then == "compact" else PURGED
    assert [await state(tenant, folder, run_id) for run_id in run_ids] == [done] * 3
