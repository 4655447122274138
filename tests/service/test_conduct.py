"""A service leaves the process in which it ran as it found it."""

from __future__ import annotations

import gc
import subprocess
import sys

from service.app import create_app
from service.conduct import calm_collector
from service.settings import settings_for


def test_the_collector_is_calm_within_and_as_before_afterwards() -> None:
    before = gc.get_threshold()
    with calm_collector():
        assert gc.get_freeze_count() > 0
        assert gc.get_threshold() == (50_000, 20, 20)
    assert (gc.get_freeze_count(), gc.get_threshold()) == (0, before)


async def test_an_app_that_has_ended_keeps_nothing_from_the_collector(database_url: str, redis_url: str) -> None:
    app = create_app(settings_for(database_url, redis_url))
    async with app.router.lifespan_context(app):
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_a_c_extension_finds_nothing_leaked_when_the_interpreter_ends() -> None:
    words = "import duckdb\nfrom service.conduct import calm_collector\nwith calm_collector(): duckdb.connect().close()"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, check=True)  # noqa: S603 - our own
    assert (done.stdout, done.stderr) == (b"", b"")
