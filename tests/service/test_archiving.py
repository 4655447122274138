"""`archive-runs` and `rehydrate-run` as they are typed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from service.db import Database
from service.settings import Settings
from service.tallies import Tallies
from service.tick import Ticker
from service.workspaces import Agents
from tests.service.conftest import Command
from tests.tenants import Tenant, open_tenant

Ask = Callable[[str], list[str]]


@pytest.fixture
def command(
    command: Command, monkeypatch: pytest.MonkeyPatch, database_url: str, redis_url: str, tmp_path: Path
) -> Command:
    """Run commands on a database and an archive folder of the test's own."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("PLIMSOLL_ARCHIVE_DIR", str(tmp_path / "archives"))
    return command


@pytest.fixture
def ask(database_url: str) -> Ask:
    """Return a function that reads one column; commands have event loops of their own, so this has too."""

    async def read(statement: str) -> list[str]:
        database = Database(database_url, pool_size=1)
        async with database.read() as connection:
            found = [str(value) for value in (await connection.exec_driver_sql(statement)).scalars()]
        await database.close()
        return found

    return lambda statement: asyncio.run(read(statement))


@pytest.fixture
def runs(database_url: str, redis_url: str) -> list[str]:
    """Three runs that ended 0, 40 and 100 days ago."""

    async def finish(tenant: Tenant) -> list[str]:
        run_ids = await tenant.runs(3)
        ticker = Ticker(tenant.database, tenant.announcer, Agents(), Tallies(), Settings.lease_s)
        while claims := await ticker.claim():
            await ticker.settle(claims, await ticker.outcomes(claims))
        for run_id, days in zip(run_ids, (0, 40, 100), strict=True):
            statement = "UPDATE runs SET ended_at = ended_at - make_interval(days => :d) WHERE run_id = :r"
            await tenant.write(statement, d=days, r=run_id)
        return [str(run_id) for run_id in run_ids]

    async def make() -> list[str]:
        database = Database(database_url, pool_size=4)
        async with open_tenant(database, redis_url) as tenant:
            made = await finish(tenant)
        await database.close()
        return made

    return asyncio.run(make())


def test_each_bundles_path_is_printed_oldest_run_first_and_none_twice(
    command: Command, runs: list[str], tmp_path: Path
) -> None:
    _, forty, hundred = runs
    code, out, err = command("archive-runs")
    assert (code, err) == (0, "")
    paths = [Path(line) for line in out.splitlines()]
    assert [path.parent for path in paths] == [tmp_path / "archives/run_archives" / run for run in (hundred, forty)]
    assert all(path.is_file() for path in paths)
    assert command("archive-runs") == (0, "", "")


def test_json_is_one_object_with_the_bundles_and_the_counts(command: Command, runs: list[str], tmp_path: Path) -> None:
    code, out, _ = command("archive-runs", "--older-than", "0", "--compact", "--purge-older-than", "99.5", "--json")
    told = json.loads(out)
    assert code == 0
    assert [archive["run_id"] for archive in told.pop("archives")] == [runs[2], runs[1], runs[0]]
    assert told == {"archived": 3, "compacted": 3, "deleted_events": 6, "purged": 1, "faults": 0}
    assert json.loads(command("archive-runs", "--json")[1]) == {
        "archives": [], "archived": 0, "compacted": 0, "deleted_events": 0, "purged": 0, "faults": 0,
    }  # fmt: skip


def test_a_limit_and_an_age_are_kept(command: Command, runs: list[str]) -> None:
    assert runs[2] in command("archive-runs", "--limit", "1")[1]
    assert runs[1] in command("archive-runs", "--older-than", "39.5", "--limit", "5")[1]
    assert runs[0] in command("archive-runs", "--older-than", "0")[1]


@pytest.mark.parametrize(
    ("flags", "left"),
    [
        ([], {"run_created", "state_changed", "step_created", "run_archived"}),
        (["--compact", "--verbose-events", ""], {"run_created", "state_changed", "step_created", "run_archived"}),
        (["--compact"], {"run_created", "state_changed", "run_archived"}),
        (["--compact", "--verbose-events", "run_created,state_changed"], {"step_created", "run_archived"}),
    ],
)
def test_only_the_given_types_are_compacted_and_an_empty_list_deletes_nothing(
    command: Command, runs: list[str], ask: Ask, flags: list[str], left: set[str]
) -> None:
    assert command("archive-runs", *flags)[0] == 0
    assert set(ask(f"SELECT event_type FROM events WHERE run_id = '{runs[2]}'")) == left  # noqa: S608 - an id
    assert len(ask(f"SELECT seq FROM events WHERE run_id = '{runs[0]}'")) == 5  # noqa: S608 - an id


def test_what_the_flags_contradict_is_bad_usage(command: Command) -> None:
    assert command("archive-runs", "--verbose-events", "step_created") == (
        64, "", "python -m service: --verbose-events: says what --compact deletes; give --compact too\n",
    )  # fmt: skip
    code, out, err = command("archive-runs", "--compact", "--verbose-events", "steps")
    assert (code, out) == (64, "")
    assert err.startswith("python -m service: --verbose-events: 'steps' is no event type; give some of run_created, ")
    assert err.count("\n") == 1


def test_a_damaged_bundle_is_one_line_and_exit_code_1(command: Command, runs: list[str], tmp_path: Path) -> None:
    path = Path(command("archive-runs", "--limit", "1")[1].strip())
    path.write_bytes(path.read_bytes()[:-1])
    code, out, err = command("archive-runs", "--limit", "1", "--purge-older-than", "50")
    assert code == 1
    assert runs[1] in out
    relative = path.relative_to(tmp_path / "archives")
    assert err.startswith(f"python -m service: bundle {relative}: its file has ")
    assert err.count("\n") == 1
    assert runs[2] in command("archive-runs", "--limit", "1", "--purge-older-than", "50")[1]


def test_a_folder_that_cannot_be_made_is_one_line_and_the_json_is_still_whole(
    command: Command, runs: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PLIMSOLL_ARCHIVE_DIR", str(tmp_path / "file/archives"))
    code, out, err = command("archive-runs", "--json")
    assert code == 1
    assert err == f"python -m service: cannot make the archive folder {tmp_path}/file/archives: Not a directory\n"
    assert json.loads(out)["archives"] == []


def test_a_database_that_is_down_is_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:secret@127.0.0.1:1/x")
    code, out, err = command("archive-runs")
    assert (code, out) == (1, "")
    assert err.startswith("python -m service: cannot reach the database that DATABASE_URL names: ")
    assert err.count("\n") == 1


def test_without_redis_runs_are_archived_all_the_same(
    command: Command, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")
    code, out, err = command("archive-runs")
    assert (code, len(out.splitlines()), err) == (0, 2, "")


def test_a_purged_run_is_restored(command: Command, runs: list[str], ask: Ask) -> None:
    whole = f"SELECT r::text FROM runs r WHERE run_id = '{runs[2]}'"  # noqa: S608 - an id
    (path,) = command("archive-runs", "--limit", "1")[1].splitlines()
    before = ask(whole)
    command("archive-runs", "--purge-older-than", "50")
    assert ask(whole) == []
    assert command("rehydrate-run", path) == (0, f"run_id: {runs[2]}\n", "")
    assert ask(whole) == before
    code, out, err = command("rehydrate-run", path)
    assert (code, out) == (64, "")
    assert err == f"python -m service: run {runs[2]} is in the database: only a run that is not can be rehydrated\n"


def test_a_file_that_is_no_bundle_is_bad_usage(command: Command, tmp_path: Path) -> None:
    assert command("rehydrate-run", str(tmp_path / "none.zip")) == (
        64, "", f"python -m service: FILE: {tmp_path}/none.zip cannot be read: No such file or directory\n",
    )  # fmt: skip


@pytest.mark.parametrize("days", ["soon", "-1", "36501", "nan"])
def test_a_setting_that_is_no_number_of_days_is_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch, days: str
) -> None:
    monkeypatch.setenv("PLIMSOLL_ARCHIVE_AFTER_DAYS", days)
    assert command("archive-runs") == (
        1, "",
        f"python -m service: PLIMSOLL_ARCHIVE_AFTER_DAYS={days!r}: give a number of days from 0 to 36500\n",
    )  # fmt: skip
