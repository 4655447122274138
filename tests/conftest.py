"""Real servers for tests: one embedded stack per session, a fresh database and an empty Redis for each test."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from service.embedded import Stack

# The same examples in every run: a change is judged, not luck. `--hypothesis-profile=default` draws new ones.
settings.register_profile("repeatable", derandomize=True, database=None)
settings.load_profile("repeatable")

REDIS_DATABASES = 16  # redis-server's default


def run_sql(stack: Stack, *statements: str) -> None:
    """Run statements on the stack's own database, each in a transaction of its own."""
    assert stack.postgres is not None
    commands = [part for statement in statements for part in ("-c", statement)]
    subprocess.run(  # noqa: S603 - the test's own statements
        [stack.postgres.binary("psql"), stack.database_url, "-qX", "-v", "ON_ERROR_STOP=1", *commands],
        check=True,
    )


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
def new_database(stack: Stack) -> Callable[[], str]:
    """Return a function that makes a fresh, migrated database and returns its URL; all go with the session."""
    from service.db import migrate

    assert stack.postgres is not None
    postgres, numbers = stack.postgres, itertools.count(1)
    run_sql(stack, "CREATE DATABASE template_for_tests")
    migrate(postgres.url_of("template_for_tests"))

    def make() -> str:
        name = f"test_{next(numbers)}"
        run_sql(stack, f"CREATE DATABASE {name} TEMPLATE template_for_tests")
        return postgres.url_of(name)

    return make


@pytest.fixture
def database_url(new_database: Callable[[], str]) -> str:
    """A fresh, migrated database of the test's own."""
    return new_database()


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
