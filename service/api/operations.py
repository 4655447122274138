"""For operators: is the process alive, can it serve, and what are its figures."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import redis.asyncio
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from service.api.answers import Health
from service.db import Database
from service.due import queue
from service.errors import Unavailable
from service.exchange import Answer, Exchange, answer_json
from service.quota.shadow import revision_figures
from service.tallies import worker_figures

PROMETHEUS_TEXT = b"text/plain; version=0.0.4; charset=utf-8"

DATABASE_PATIENCE_S = 2.0
"""How long /metrics waits for the database, seconds: well below the ten that Prometheus gives a scrape."""


class Operations:
    """The endpoints on the process itself."""

    def __init__(self, database: Database, client: redis.asyncio.Redis) -> None:
        self._database = database
        self._redis = client

    async def livez(self, exchange: Exchange[None]) -> Answer[Health]:
        """Say that the process answers; nothing else is asked."""
        return answer_json({"status": "ok"})

    async def readyz(self, exchange: Exchange[None]) -> Answer[Health]:
        """Say whether requests can be served: PostgreSQL must answer; without Redis the service goes on, degraded."""
        try:
            with exchange.timed("db_ms"):
                async with self._database.read() as connection:
                    await connection.execute(text("SELECT 1 FROM runs LIMIT 1"))
        except (SQLAlchemyError, OSError, TimeoutError) as fault:
            raise Unavailable("the database does not answer, or its schema is not migrated") from fault
        try:
            await self._redis.ping()
        except (RedisError, OSError):
            return answer_json({"status": "degraded", "redis": "unreachable"})
        return answer_json({"status": "ok", "redis": "ok"})

    async def metrics(self, exchange: Exchange[None]) -> Answer[str]:
        """Return the figures in Prometheus' text format; those that the database does not tell in time are left out."""
        with exchange.timed("db_ms"):
            try:
                async with asyncio.timeout(DATABASE_PATIENCE_S):
                    told = await self._database_figures()
            except (SQLAlchemyError, OSError, TimeoutError):
                told = ""
        figures = [
            "# HELP plimsoll_database_figures_missing Whether the database did not tell its figures: 1, or 0.",
            "# TYPE plimsoll_database_figures_missing gauge",
            f"plimsoll_database_figures_missing {int(not told)}",
            "",
        ]
        body = _own_figures() + "\n".join(figures).encode() + told.encode()
        body += await worker_figures(self._redis)
        return Answer(body, content_type=PROMETHEUS_TEXT)

    async def _database_figures(self) -> str:
        """Return what the database knows at this moment."""
        async with self._database.read() as connection:
            waiting = await queue(connection)
            quota_figures = await revision_figures(connection)
        figures = [
            "# HELP plimsoll_queue_depth Runs that are due and not yet claimed.",
            "# TYPE plimsoll_queue_depth gauge",
            f"plimsoll_queue_depth {waiting.depth}",
            "# HELP plimsoll_oldest_due_tick_seconds How long the longest waiting due run has been due.",
            "# TYPE plimsoll_oldest_due_tick_seconds gauge",
            f"plimsoll_oldest_due_tick_seconds {waiting.oldest_due_s:.6f}",
            "",
        ]
        return "\n".join(figures) + quota_figures


def _own_figures() -> bytes:
    """Return what this process counted, or, where several share the port, what all of them did."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return generate_latest(REGISTRY)
    registry: Any = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)
