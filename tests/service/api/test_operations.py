"""What operators are told while something is away."""

from __future__ import annotations

from typing import Any

import pytest

from service.api.operations import Operations
from service.db import Database
from service.exchange import Exchange
from service.guarded import connect_redis

FROM_THE_DATABASE = ("plimsoll_queue_depth ", "plimsoll_oldest_due_tick_seconds ", "plimsoll_quota_revision{")
SCOPE: Any = {"type": "http", "method": "GET", "path": "/metrics", "headers": [], "query_string": b""}


@pytest.mark.parametrize("is_away", [True, False])
async def test_without_the_database_metrics_are_what_the_processes_know(
    database_url: str, redis_url: str, is_away: bool
) -> None:
    database = Database("postgresql://127.0.0.1:1/nowhere" if is_away else database_url)
    async with connect_redis(redis_url) as client:
        answer = await Operations(database, client).metrics(Exchange(SCOPE))
    await database.close()

    lines = bytes(answer.body).decode().splitlines()
    assert f"plimsoll_database_figures_missing {int(is_away)}" in lines
    told = [any(line.startswith(figure) for line in lines) for figure in FROM_THE_DATABASE]
    assert told == [not is_away] * 3
    own = ("plimsoll_redis_away ", "plimsoll_ticks_total ")
    assert all(any(line.startswith(figure) for line in lines) for figure in own)
