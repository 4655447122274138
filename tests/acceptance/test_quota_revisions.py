"""Real processes under load: a new quota revision takes over within a second, exactly, and nobody's request fails."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from service.__main__ import main
from service.auth import issue_token
from service.db import Database
from service.quota.limits import DEFAULT, Limit, Rate
from service.quota.tables import FIRST, RateValue, write
from service.serve import address_of, listen
from service.workspaces import create_agent, create_workspace
from tests.quotatables import tables

pytestmark = pytest.mark.acceptance

OLD = DEFAULT.rates[Limit.SNAPSHOT_POLL]
NEW = Rate(Fraction("40.5"), burst=41)
"""More than one step allows, so that the two rates can be told apart: it has to be forced."""

IN_FORCE_WITHIN_S = 1.0
OFFERED_PER_S, CONNECTIONS = 120, 8
LOAD_S = 2.5
"""How long each of the three tables is loaded once it is in force."""


class Poll(NamedTuple):
    """One answered request, on the test's monotonic clock."""

    sent_s: float
    done_s: float
    status: int
    policy: str  # what RateLimit-Policy said


@pytest.fixture
def url(service_environment: dict[str, str]) -> Iterator[str]:
    """Two HTTP processes behind one port: each learns of a change by itself."""
    with listen("127.0.0.1", 0) as listener:
        url = address_of(listener)
        port = url.rpartition(":")[2]
    command = [sys.executable, "-m", "service", "serve", "--processes", "2", "--port", port]
    with subprocess.Popen(command, env=service_environment, stdout=subprocess.DEVNULL) as process:  # noqa: S603 - our own
        try:
            _until_it_answers(url)
            yield url
        finally:
            process.terminate()
            process.wait(30)


Quotas = Callable[..., Awaitable[str]]


@pytest.fixture
def quotas(
    service_environment: dict[str, str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Quotas:
    """Run `python -m service quotas` beside the load; returns what it prints. Without the seconds that imports take."""
    for name in ("DATABASE_URL", "REDIS_URL"):
        monkeypatch.setenv(name, service_environment[name])

    async def run(*arguments: str) -> str:
        capfd.readouterr()
        assert await asyncio.to_thread(main, ["quotas", *arguments]) == 0
        return capfd.readouterr().out

    return run


def _until_it_answers(url: str) -> None:
    give_up_at = time.monotonic() + 60
    while True:
        try:
            httpx.get(f"{url}/readyz", timeout=5).raise_for_status()
        except httpx.HTTPError:
            assert time.monotonic() < give_up_at, "the service did not start"
            time.sleep(0.05)
        else:
            return


@pytest.fixture
async def poll(url: str, database_url: str) -> AsyncIterator[httpx.Request]:
    """A poll of a run of an ordinary workspace, to be sent again and again."""
    database = Database(database_url, pool_size=1)
    async with database.begin() as connection:
        workspace_id = await create_workspace(connection, "tenant")
        agent_id = await create_agent(connection, workspace_id, "agent")
        token = (await issue_token(connection, workspace_id, "OPERATOR")).token
    async with httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {token}"}, timeout=60) as client:
        body = {"workspace_id": str(workspace_id), "agent_id": str(agent_id)}
        created = await client.post("/api/runs/", json=body)
        yield client.build_request("GET", f"/api/runs/{created.json()['run_id']}/snapshot/")
    await database.close()


async def load(poll: httpx.Request, stop: asyncio.Event) -> list[Poll]:
    """Offer more than any of the tables admits, evenly, until told to stop; returns every answer."""
    seen: list[Poll] = []

    async def offer(number: int) -> None:
        # A connection of its own each, so that the kernel spreads them over the processes.
        async with httpx.AsyncClient(timeout=60) as client:
            due_s = time.monotonic() + number / OFFERED_PER_S
            while not stop.is_set():
                await asyncio.sleep(due_s - time.monotonic())
                sent_s = time.monotonic()
                answer = await client.send(poll)
                policy = answer.headers.get("ratelimit-policy", "")
                seen.append(Poll(sent_s, time.monotonic(), answer.status_code, policy))
                due_s = max(due_s + CONNECTIONS / OFFERED_PER_S, time.monotonic())

    await asyncio.gather(*(offer(number) for number in range(CONNECTIONS)))
    return seen


def assert_held(polls: list[Poll], rate: Rate, from_s: float, until_s: float) -> int:
    """Between two instants, admissions are what the rate says: never above it, and nothing of it is kept back.

    A refusal proves that at its moment, between its sending and its answer, less than a token was left. From there on a
    token comes every 1 / rate. Admissions that certainly came after it are bounded from above, those that may have
    come after it from below. What the load itself did not fetch in time is no fault of the limiter: while it offered
    nothing the bucket can have run full, and what came in the last gap may still lie there. Returns the admissions.
    """
    per_s = float(rate.per_s)
    offers = sorted(each for each in polls if from_s <= each.sent_s and each.done_s <= until_s)
    first = next(each for each in offers if each.status == 429)
    after = [each for each in offers if each.sent_s >= first.done_s]
    certain = [each for each in after if each.status == 200]
    possible = [each for each in offers if each.status == 200 and each.done_s >= first.sent_s]
    assert len(certain) <= per_s * (max(each.done_s for each in after) - first.sent_s) + 1
    gaps_s = [later.done_s - sooner.sent_s for sooner, later in itertools.pairwise([first, *after])]
    lost = sum(max(0.0, gap_s * per_s - rate.burst) for gap_s in gaps_s) + max(gaps_s) * per_s
    assert len(possible) >= per_s * (after[-1].sent_s - first.done_s) - lost - 1
    return len(certain)


async def test_the_old_and_the_new_rate_each_hold_exactly_on_their_side_and_no_request_fails(
    quotas: Quotas, poll: httpx.Request, tmp_path: Path
) -> None:
    file = tmp_path / "quota_revision.json"
    file.write_bytes(write(tables(snapshot_poll=RateValue(float(NEW.per_s), NEW.burst))))
    before = await quotas("show", "--json")
    assert json.loads(await quotas("propose", str(file), "--json")) == {"revision": 2}
    stop = asyncio.Event()
    running = asyncio.create_task(load(poll, stop))

    started_s = time.monotonic()
    await asyncio.sleep(LOAD_S)
    asked_s = time.monotonic()
    await quotas("activate", "2", "--force", "--by", "ada", "--reason", "a test")
    new_from_s = time.monotonic() + IN_FORCE_WITHIN_S
    await asyncio.sleep(IN_FORCE_WITHIN_S + LOAD_S)
    rolled_s = time.monotonic()
    await quotas("rollback")
    old_from_s = time.monotonic() + IN_FORCE_WITHIN_S
    await asyncio.sleep(IN_FORCE_WITHIN_S + LOAD_S)
    ended_s = time.monotonic()
    stop.set()
    polls = await running

    assert {each.status for each in polls} == {200, 429}
    old, new = f'"snapshot_poll";q={OLD.burst};w=2', f'"snapshot_poll";q={NEW.burst};w=2'
    assert {each.policy for each in polls if each.done_s <= asked_s} == {old}
    assert {each.policy for each in polls if each.sent_s >= new_from_s and each.done_s <= rolled_s} == {new}
    assert {each.policy for each in polls if each.sent_s >= old_from_s} == {old}
    counted = [
        assert_held(polls, OLD, started_s, asked_s),
        assert_held(polls, NEW, new_from_s, rolled_s),
        assert_held(polls, OLD, old_from_s, ended_s),
    ]
    assert counted[1] > max(counted[0], counted[2]), "the larger rate admitted no more"
    # Across both changes nobody gets more than the larger table allows.
    most = float(NEW.per_s) * (max(each.done_s for each in polls) - started_s) + NEW.burst
    assert sum(each.status == 200 for each in polls) <= most

    assert await quotas("show", "--json") == before == write(FIRST).decode()
    page = json.loads(await quotas("history", "--json"))["revisions"]
    assert [(each["revision"], each["state"]) for each in page] == [(2, "superseded"), (1, "active")]
    assert [each["change"] for each in page[1]["changes"]] == ["install", "supersede", "rollback"]
