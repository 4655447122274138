"""A worker's rounds: begun by a bell, one at a time, ended between batches; and the daily bell itself."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import itertools
import signal
import subprocess
import sys
import uuid
from dataclasses import replace

import msgspec
import pytest
import redis.asyncio
from huey.api import Task
from structlog.typing import EventDict

from service.archive import Folder, Plan, Round, Rounds
from service.doorbell import Doorbell
from service.errors import ConfigurationError
from service.events import Published, channel
from service.settings import Settings
from tests.service.archive.conftest import FinishRuns
from tests.tenants import Tenant


@pytest.fixture
def settings(database_url: str, redis_url: str, folder: Folder) -> Settings:
    """A worker that archives whatever has ended."""
    return Settings(database_url, redis_url, archive_dir=folder.root, archive_after_days=0.0)


async def archived(tenant: Tenant) -> int:
    """Return how many runs have a bundle."""
    return len(await tenant.rows("SELECT run_id FROM run_archives"))


def told(logged: list[EventDict]) -> list[tuple[str, str]]:
    """Return level and sentence of every line."""
    return [(line["log_level"], line["event"]) for line in logged]


async def test_a_ring_begins_a_round_and_rings_during_it_are_one(
    tenant: Tenant, settings: Settings, finish_runs: FinishRuns, logged: list[EventDict]
) -> None:
    await finish_runs(2)
    rounds = Rounds(settings, tenant.announcer)
    rounds.ring()
    rounds.ring()
    await rounds.idle()
    assert await archived(tenant) == 2
    assert told(logged) == [("info", "archive round done")]
    assert (logged[0]["archived"], logged[0]["deleted_events"]) == (2, 0)


async def test_compaction_is_off_unless_set(
    tenant: Tenant, settings: Settings, finish_runs: FinishRuns, logged: list[EventDict]
) -> None:
    await finish_runs()
    for each in (settings, replace(settings, archive_compact_events="step_created, state_changed")):
        rounds = Rounds(each, tenant.announcer)
        rounds.ring()
        await rounds.idle()
    assert [line["deleted_events"] for line in logged] == [0, 4]


async def test_told_to_stop_it_begins_nothing(
    tenant: Tenant, settings: Settings, finish_runs: FinishRuns, logged: list[EventDict]
) -> None:
    await finish_runs()
    rounds = Rounds(settings, tenant.announcer)
    rounds.ring()
    rounds.stop()
    await rounds.idle()
    rounds.ring()
    await rounds.idle()
    assert (await archived(tenant), [line["archived"] for line in logged]) == (0, [0])


async def test_a_round_told_to_stop_ends_after_its_batch(
    tenant: Tenant, folder: Folder, finish_runs: FinishRuns
) -> None:
    await finish_runs(100)
    round_ = Round(tenant.database, folder, Plan(0.0), at=lambda _: round_.stop())
    assert (await round_.run()).archived == 64


async def test_a_round_that_cannot_work_is_one_line_and_the_next_ring_begins_another(
    tenant: Tenant, settings: Settings, finish_runs: FinishRuns, logged: list[EventDict]
) -> None:
    await finish_runs()
    settings.archive_dir.write_text("no folder")
    for broken in (settings, replace(settings, database_url="postgresql://127.0.0.1:1/x")):
        rounds = Rounds(broken, tenant.announcer)
        rounds.ring()
        await rounds.idle()
    assert [(line["log_level"], line["event"], str(line["fault"])[:30]) for line in logged] == [
        ("error", "archive round given up", f"cannot make the archive folder {settings.archive_dir}"[:30]),
        ("warning", "archive round given up; the next one finds the same work", "[Errno 111] Connect call failed"[:30]),
    ]
    assert await archived(tenant) == 0

    settings.archive_dir.unlink()
    rounds = Rounds(settings, tenant.announcer)
    for _ in range(2):
        rounds.ring()
        await rounds.idle()
    assert [line["archived"] for line in logged[2:]] == [1, 0]


async def test_a_stopping_worker_gives_up_a_batch_that_takes_too_long_and_nothing_of_it_stays(
    tenant: Tenant, settings: Settings, finish_runs: FinishRuns
) -> None:
    (run_id,) = await finish_runs()
    async with tenant.database.begin() as connection:
        await connection.exec_driver_sql("LOCK TABLE events")  # the batch waits for this
        rounds = Rounds(settings, tenant.announcer)
        rounds.ring()
        for _ in itertools.count():
            if await tenant.rows(
                "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            ):
                break
            await asyncio.sleep(0.02)
        await rounds.drain(0.0)
    assert await archived(tenant) == 0
    assert (await tenant.row(run_id))["archived_seq"] == 0


async def test_a_batch_that_cannot_even_be_given_up_does_not_hold_up_the_worker(
    tenant: Tenant, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = asyncio.Event()

    async def hang(self: Round) -> None:
        while not let_go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await let_go.wait()

    monkeypatch.setattr(Round, "run", hang)
    rounds = Rounds(settings, tenant.announcer)
    rounds.ring()
    await asyncio.sleep(0)
    await rounds.drain(0.0)
    assert rounds._task is not None
    assert not rounds._task.done()
    let_go.set()
    await rounds.idle()


def test_a_type_that_is_none_is_told_with_its_variable(settings: Settings, tenant: Tenant) -> None:
    with pytest.raises(ConfigurationError, match="PLIMSOLL_ARCHIVE_COMPACT_EVENTS: 'steps' is no event type"):
        Rounds(replace(settings, archive_compact_events="steps"), tenant.announcer)


async def test_the_event_is_published_after_the_commit(
    tenant: Tenant, redis_url: str, folder: Folder, finish_runs: FinishRuns
) -> None:
    (run_id,) = await finish_runs()
    async with redis.asyncio.from_url(redis_url) as client, client.pubsub() as pubsub:
        await pubsub.subscribe(channel(tenant.workspace_id))
        await pubsub.get_message(timeout=5)
        await Round(tenant.database, folder, Plan(0.0), announcer=tenant.announcer).run()
        message = await pubsub.get_message(timeout=5)
    published = msgspec.json.decode(message["data"], type=Published)
    assert [(event.run_id, event.event_type, event.seq) for event in published.events] == [(run_id, "run_archived", 6)]


def archiving(doorbell: Doorbell, now: dt.datetime) -> list[Task]:
    """Return what the doorbell rings for archiving at an instant."""
    return [task for task in doorbell.huey.read_periodic(now) if task.name == "archive_runs"]


def test_the_archives_bell_rings_once_a_day_and_says_nothing(redis_url: str) -> None:
    rung: list[str] = []
    doorbell = Doorbell(redis_url, archive=lambda: rung.append("archive"))
    day = dt.datetime(2026, 11, 23)  # noqa: DTZ001 - Huey's clock is naive UTC
    due = {
        (now.hour, now.minute): archiving(doorbell, now)
        for now in (day + dt.timedelta(minutes=minute) for minute in range(1440))
    }
    assert [when for when, tasks in due.items() if tasks] == [(3, 17)]
    (task,) = due[3, 17]
    doorbell.huey.execute(task)
    assert (rung, task.args, task.kwargs) == (["archive"], (), {})


@pytest.mark.acceptance
async def test_a_worker_archives_when_it_starts_and_when_the_bell_rings(
    tenant: Tenant, service_environment: dict[str, str], redis_url: str, folder: Folder, finish_runs: FinishRuns
) -> None:
    await finish_runs(3)
    environment = {
        **service_environment,
        "PLIMSOLL_ARCHIVE_DIR": str(folder.root),
        "PLIMSOLL_ARCHIVE_AFTER_DAYS": "0",
        "PLIMSOLL_ARCHIVE_COMPACT_EVENTS": "step_created",
    }
    command = [sys.executable, "-m", "service", "worker"]
    worker = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)  # noqa: ASYNC220, S603 - our own
    try:
        await until(tenant, "SELECT 1 FROM run_archives HAVING count(*) = 3")
        await until(tenant, "SELECT 1 FROM runs HAVING min(compacted_through_seq) = 4")
        run_id = await tenant.run()
        await until(tenant, "SELECT 1 FROM runs WHERE run_id = :r AND ended_at IS NOT NULL", r=run_id)
        doorbell = Doorbell(redis_url)
        (task,) = archiving(doorbell, dt.datetime(2026, 11, 23, 3, 17))  # noqa: DTZ001 - Huey's clock
        doorbell.huey.enqueue(task)
        await until(tenant, "SELECT 1 FROM run_archives WHERE run_id = :r", r=run_id)
    finally:
        worker.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(worker.wait, 30) == 0
    assert await tenant.faults() == []


async def until(tenant: Tenant, statement: str, **parameters: uuid.UUID) -> None:
    """Return when a statement finds a row; the test's own timeout bounds it."""
    for _ in itertools.count():
        if await tenant.rows(statement, **parameters):
            return
        await asyncio.sleep(0.02)
