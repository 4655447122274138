"""Recalibrations that a worker starts when they are due; a short program stands for the one that measures."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from structlog.typing import EventDict

from service.db import Database
from service.quota.recalibration_cycle import Plan
from service.quota.recalibration_record import abandon, begin
from service.schedule import Schedule
from service.settings import Settings

WRITES = (
    "import os, sys; open(sys.argv[1], 'a').write(os.environ['DATABASE_URL']); print('all is well', file=sys.stderr)"
)
WAITS = "import sys, time; open(sys.argv[1], 'w').close(); time.sleep(60)"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the program writes that it was started."""
    return tmp_path / "started"


@pytest.fixture
def settings(database_url: str, redis_url: str, file: Path) -> Settings:
    """A recalibration every day, told where to write."""
    return Settings(database_url, redis_url, recalibrate_days=1.0, recalibrate_args=(str(file),))


def written(file: Path) -> str | None:
    """Return what the program wrote; null when it was not started."""
    return file.read_text() if file.exists() else None


async def rung(settings: Settings, program: str = WRITES) -> None:
    """Ring once and wait until nothing is at work."""
    schedule = Schedule(settings, (sys.executable, "-c", program))
    schedule.ring()
    await schedule.idle()


async def begun(database: Database, days_ago: float, *, given_up: bool = False) -> None:
    """Begin a recalibration so long ago."""
    async with database.begin() as connection:
        number = await begin(connection, Plan(), "a test")
        if given_up:
            await abandon(connection, number)
        await connection.execute(
            text("UPDATE quota_recalibrations SET begun_at = now() - make_interval(secs => :s), lease_until = CASE WHEN"
                 " lease_until IS NOT NULL THEN now() END WHERE recalibration_id = :number"),
            {"s": days_ago * 86_400.0, "number": number},
        )  # fmt: skip


async def test_the_first_one_is_due_at_once_on_the_services_own_database(
    settings: Settings, file: Path, logged: list[EventDict]
) -> None:
    await rung(settings)
    assert written(file) == settings.database_url
    assert [(each["event"], each.get("code"), each.get("said")) for each in logged] == [
        ("scheduled recalibration", None, None),
        ("scheduled recalibration ended", 0, "all is well"),
    ]


async def test_none_is_due_before_its_time_and_one_makes_up_for_all_that_were_missed(
    settings: Settings, file: Path, database: Database
) -> None:
    await begun(database, 0.9)
    await rung(settings)
    assert written(file) is None
    async with database.begin() as connection:
        await connection.execute(text("UPDATE quota_recalibrations SET begun_at = now() - interval '10 days'"))
    await rung(settings)
    assert written(file) == settings.database_url  # once


async def test_one_that_was_given_up_is_made_up_for_an_hour_later(
    settings: Settings, file: Path, database: Database
) -> None:
    await begun(database, 0.02, given_up=True)
    await rung(settings)
    assert written(file) is None
    async with database.begin() as connection:
        await connection.execute(text("UPDATE quota_recalibrations SET begun_at = now() - interval '61 minutes'"))
    await rung(settings)
    assert written(file) == settings.database_url


async def test_without_an_interval_nothing_is_ever_due(settings: Settings, file: Path) -> None:
    await rung(dataclasses.replace(settings, recalibrate_days=0.0))
    assert written(file) is None


async def test_a_worker_that_stops_ends_its_measurement(
    settings: Settings, file: Path, logged: list[EventDict]
) -> None:
    os.mkfifo(file)
    schedule = Schedule(settings, (sys.executable, "-c", WAITS))
    schedule.ring()
    await asyncio.to_thread(written, file)  # until the program has opened it, too
    schedule.ring()  # one at a time
    schedule.stop()
    await schedule.idle()
    assert [(each["event"], each["log_level"], each.get("code")) for each in logged] == [
        ("scheduled recalibration", "info", None),
        ("scheduled recalibration ended", "warning", -15),
    ]


async def test_a_worker_that_stops_while_its_measurement_is_being_started_ends_it(
    settings: Settings, logged: list[EventDict], monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = Schedule(settings, (sys.executable, "-c", "import time; time.sleep(60)"))
    start = asyncio.create_subprocess_exec

    async def started(*command: str, **more: Any) -> asyncio.subprocess.Process:
        process = await start(*command, **more)
        schedule.stop()
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", started)
    schedule.ring()
    await schedule.idle()
    assert [(each["event"], each.get("code")) for each in logged] == [
        ("scheduled recalibration", None),
        ("scheduled recalibration ended", -15),
    ]


async def test_a_program_that_is_not_there_and_a_database_that_is_away_are_logged_and_tried_again(
    settings: Settings, logged: list[EventDict]
) -> None:
    schedule = Schedule(settings, ("/no/such/program",))
    schedule.ring()
    await schedule.idle()
    away = dataclasses.replace(settings, database_url="postgresql://nobody@127.0.0.1:1/none")
    await rung(away)
    assert [(each["log_level"], each["event"]) for each in logged] == [
        ("error", "a scheduled recalibration could not be started"),
        ("warning", "whether a recalibration is due is not known; the next look finds out"),
    ]
