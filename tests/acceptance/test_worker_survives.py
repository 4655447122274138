"""A real worker process that is killed, or loses Redis or its connections: no run is lost, no step done twice."""

from __future__ import annotations

import asyncio
import itertools
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import redis

from service.db import Database
from tests.tenants import Tenant, open_tenant

pytestmark = pytest.mark.acceptance

WORKER = [sys.executable, "-m", "service", "worker"]

SCRIPT: list[dict[str, Any]] = [
    {"kind": "PLAN"},
    {"kind": "MODEL_CALL", "latency_ms": 150},
    {"kind": "TOOL_CALL", "latency_ms": 150},
    {"kind": "OBSERVATION", "latency_ms": 150},
    {"kind": "MESSAGE", "latency_ms": 150},
]
PARENTS, CHILDREN = 140, 60
ALL_STEPS = (PARENTS + CHILDREN) * len(SCRIPT)

StartWorker = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start_worker(service_environment: dict[str, str]) -> Iterator[StartWorker]:
    """Return a function that starts a worker process; whatever still runs at the end of the test is ended."""
    started: list[subprocess.Popen[bytes]] = []

    def start(**environment: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(WORKER, env={**service_environment, **environment})  # noqa: S603 - our own
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
async def tenant(database_url: str, redis_url: str) -> AsyncIterator[Tenant]:
    """A workspace with 200 runs, 60 of them subruns of runs that expect one."""
    database = Database(database_url)
    async with open_tenant(database, redis_url) as tenant:
        agent_id = await tenant.agent(*SCRIPT)
        await tenant.runs(PARENTS - CHILDREN, agent_id)
        parents = await tenant.runs(CHILDREN, agent_id, expected_subruns=1)
        await asyncio.gather(*(tenant.spawn(parent, agent_id) for parent in parents))
        yield tenant
    await database.close()


async def steps_done(tenant: Tenant) -> int:
    """Return how many steps of scripts have been written."""
    found = await tenant.rows("SELECT sum(script_position) AS done FROM runs")
    return int(found[0]["done"])


async def until_done(tenant: Tenant, steps: int) -> None:
    """Return when so many steps of scripts have been written; the test's own timeout bounds it."""
    for _ in itertools.count():
        if await steps_done(tenant) >= steps:
            return
        await asyncio.sleep(0.02)


async def until_all_ended(tenant: Tenant) -> None:
    """Return when every run has ended."""
    for _ in itertools.count():
        if not await tenant.rows("SELECT run_id FROM runs WHERE ended_at IS NULL LIMIT 1"):
            return
        await asyncio.sleep(0.05)


async def assert_all_completed_once(tenant: Tenant) -> None:
    """Every run COMPLETED, its script executed step by step, its events without gaps, its parent told once."""
    assert await tenant.rows("SELECT status, count(*) AS runs FROM runs GROUP BY status") == [
        {"status": "COMPLETED", "runs": PARENTS + CHILDREN}
    ]
    assert await steps_done(tenant) == ALL_STEPS
    assert await tenant.faults() == []


async def test_a_worker_killed_in_the_middle_again_and_again_loses_no_run(
    tenant: Tenant, start_worker: StartWorker
) -> None:
    for done in (ALL_STEPS // 5, 2 * ALL_STEPS // 5, 3 * ALL_STEPS // 5):
        worker = start_worker()
        await until_done(tenant, done)
        worker.kill()
        assert worker.wait() == -signal.SIGKILL
        assert await steps_done(tenant) < ALL_STEPS, "it was not killed in the middle"

    start_worker()
    await until_all_ended(tenant)

    await assert_all_completed_once(tenant)


async def test_two_workers_of_which_one_is_killed_complete_every_run(tenant: Tenant, start_worker: StartWorker) -> None:
    killed, _ = start_worker(), start_worker()
    await until_done(tenant, ALL_STEPS // 4)
    killed.kill()

    await until_all_ended(tenant)

    await assert_all_completed_once(tenant)


async def test_redis_emptied_in_the_middle_loses_no_run(
    tenant: Tenant, start_worker: StartWorker, redis_url: str
) -> None:
    start_worker()
    with redis.Redis.from_url(redis_url) as client:
        for done in (1, ALL_STEPS // 3, 2 * ALL_STEPS // 3):
            await until_done(tenant, done)
            client.flushall()
    await until_all_ended(tenant)

    await assert_all_completed_once(tenant)


async def test_a_resting_worker_is_woken_by_a_ring_even_after_redis_was_emptied(
    tenant: Tenant, start_worker: StartWorker, redis_url: str
) -> None:
    start_worker(PLIMSOLL_SWEEP_INTERVAL_S="3000")
    await until_all_ended(tenant)
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()

    await tenant.run()
    await until_all_ended(tenant)

    assert await tenant.faults() == []


async def test_without_redis_the_sweeper_completes_every_run(tenant: Tenant, start_worker: StartWorker) -> None:
    start_worker(REDIS_URL="redis://127.0.0.1:1")

    await until_all_ended(tenant)

    await assert_all_completed_once(tenant)


async def test_connections_cut_by_postgresql_lose_no_run(tenant: Tenant, start_worker: StartWorker) -> None:
    worker = start_worker()
    for done in (ALL_STEPS // 3, 2 * ALL_STEPS // 3):
        await until_done(tenant, done)
        await tenant.rows(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'plimsoll' AND pid <> pg_backend_pid()"
        )
        await tenant.database.engine.dispose()
    await until_all_ended(tenant)

    assert worker.poll() is None
    await assert_all_completed_once(tenant)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_worker_told_to_stop_ends_with_0_and_holds_nothing(
    tenant: Tenant, start_worker: StartWorker, signum: signal.Signals
) -> None:
    worker = start_worker()
    await until_done(tenant, 1)

    worker.send_signal(signum)

    assert await asyncio.to_thread(worker.wait) == 0
    # A run that was claimed and not written would have an epoch ahead of its ticks.
    assert await tenant.rows("SELECT run_id FROM runs WHERE epoch <> ticks") == []
    assert await tenant.faults() == []
