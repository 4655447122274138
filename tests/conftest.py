"""Real servers for tests: one embedded stack per session, a fresh database and an empty Redis for each test."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from service.embedded import Stack
from tests.databases import Databases

# The same examples in every run: a change is judged, not luck. `--hypothesis-profile=default` draws new ones.
settings.register_profile("repeatable", derandomize=True, database=None)
settings.load_profile("repeatable")

REDIS_DATABASES = 16  # redis-server's default


@pytest.fixture(scope="session", autouse=True)
def heeding_signals() -> None:
    """Under `nohup`, or in the background of a script, the tests and all that they start would be deaf to signals."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """One private PostgreSQL and Redis for the whole session."""
    folder = Path(tempfile.mkdtemp(prefix="plimsoll-test-"))
    folder.chmod(0o711)  # PostgreSQL's user passes through it when the tests run as root
    with Stack(folder / "stack") as running:
        yield running
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def databases(stack: Stack) -> Databases:
    """The databases of that server."""
    assert stack.postgres is not None
    return Databases(stack.postgres)


@pytest.fixture(scope="session")
def new_database(databases: Databases) -> Callable[[], str]:
    """Return a function that makes a new, migrated database and returns its URL; all go with the session."""
    return databases.new


@pytest.fixture
def database_url(databases: Databases) -> Iterator[str]:
    """A migrated database of the test's own, as new."""
    url = databases.take()
    yield url
    databases.give_back(url)


@pytest.fixture(scope="session")
def redis_numbers() -> Iterator[int]:
    """Redis database numbers in turn, so that what one test left running does not meet the next test at once."""
    return itertools.cycle(range(1, REDIS_DATABASES))


@pytest.fixture
def redis_url(stack: Stack, redis_numbers: Iterator[int]) -> str:
    """An empty Redis database."""
    import redis

    url = f"{stack.redis_url}?db={next(redis_numbers)}"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
def service_environment(database_url: str, redis_url: str) -> dict[str, str]:
    """The environment of a service process that works on this test's database and Redis."""
    return {**os.environ, "DATABASE_URL": database_url, "REDIS_URL": redis_url}
