"""Twenty thousand racing attempts from two processes; and what happens to a service whose locks were taken out."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

import service.commits
from service.commits import Accepted, Commits, Spawn
from service.db import Database
from service.embedded import Stack
from service.quota.limits import LIFTED, Limit
from tests.campaigns.cap_arena import Arena
from tests.campaigns.cap_racers import NO_METADATA
from tests.campaigns.cap_races import CAPS, contradictions, exact_stack, new_database, race_for, racing
from tests.campaigns.cap_races_report import Result
from tests.tenants import open_tenant

ATTEMPTS = 20_000  # on all caps together
HOLD_S = 0.1


@pytest.fixture(scope="module")
def exact() -> Iterator[Stack]:
    """Servers of these tests' own: PostgreSQL has to know when each transaction committed."""
    with tempfile.TemporaryDirectory(prefix="plimsoll-caps-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        with exact_stack(folder) as stack:
            yield stack


def race_all(stack: Stack, name: str, limits: tuple[Limit, ...], attempts: int, mutant: str | None) -> list[Result]:
    """Race for one cap after the other, with the same two processes."""
    database_url = new_database(stack, name)

    async def run() -> list[Result]:
        arena = Arena(database_url, stack.redis_url, HOLD_S)
        try:
            async with racing(database_url, stack.redis_url, 2, mutant) as racers:
                results = [await race_for(arena, racers, limit, attempts) for limit in limits]
            results[0].faults += await contradictions(arena)
            return results
        finally:
            await arena.close()

    return asyncio.run(run())


@pytest.mark.timeout(400)  # seven caps and two servers: ten seconds of its own, many more on a machine that is busy
def test_no_cap_is_exceeded_and_no_place_is_lost_when_processes_race(exact: Stack) -> None:
    results = race_all(exact, "sound", CAPS, -(-ATTEMPTS // len(CAPS)), None)
    assert [fault for result in results for fault in result.all_faults()] == []
    assert sum(result.told.attempts for result in results) >= ATTEMPTS
    assert [(result.limit, result.history.peak) for result in results] == [(each.limit, each.most) for each in results]


@pytest.mark.parametrize("limit", [Limit.LIVE_PARENT_RUNS, Limit.LIVE_RUNS, Limit.PENDING_TOOL_CALLS])
def test_a_count_without_a_lock_is_found_out(exact: Stack, limit: Limit) -> None:
    attempts = 1_500 if limit is Limit.PENDING_TOOL_CALLS else 12_000  # 256 callers ask at once, of each process
    [result] = race_all(exact, f"unlocked_{limit}", (limit,), attempts, "unlocked")
    assert result.history.peak > result.most
    assert any(" held " in fault for fault in result.all_faults())


async def test_the_numbers_of_a_parents_steps_hold_its_cap_even_without_its_lock(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Why there is no such mutant: of two spawns that read the same count, one would write a step whose number is taken.
    unlocked = service.commits.LOCK_PARENTS.text.replace("FOR NO KEY UPDATE", "")
    monkeypatch.setattr(service.commits, "LOCK_PARENTS", text(unlocked))
    database = Database(database_url)
    refused: list[object] = []
    async with open_tenant(database, redis_url) as tenant:
        commits = [Commits(database, tenant.announcer) for _ in range(2)]
        for parent in await tenant.runs(20):
            spawn = Spawn(parent, tenant.workspace_id, tenant.agent_id, "", NO_METADATA, None, LIFTED)
            answers = await asyncio.gather(*(each.submit(spawn) for each in commits), return_exceptions=True)
            refused += [answer for answer in answers if isinstance(answer, BaseException)]
            assert (await tenant.row(parent))["pending_subruns"] == sum(isinstance(each, Accepted) for each in answers)
        assert await tenant.faults() == []
    await database.close()
    assert {type(answer) for answer in refused} == {IntegrityError}


@pytest.mark.parametrize("limit", [Limit.WEBSOCKETS, Limit.WEBSOCKETS_PER_USER])
def test_a_place_that_is_counted_and_taken_in_two_steps_is_found_out(exact: Stack, limit: Limit) -> None:
    [result] = race_all(exact, f"steps_{limit}", (limit,), 1500, "two steps")
    assert result.history.peak > result.most


def test_places_that_are_not_given_back_are_found_out(exact: Stack) -> None:
    [result] = race_all(exact, "forgetful", (Limit.WEBSOCKETS,), 1500, "forgetful")
    assert result.history.left > 0
    assert "websockets: after round 1, not every pool took exactly its cap again" in result.all_faults()
