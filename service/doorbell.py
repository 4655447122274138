"""The doorbell: Huey carries rings to the workers, and nothing else.

Huey pops a task before it runs it and keeps no receipt, so a killed worker loses what it held. A ring therefore has no
content: it says "something may be due". What is due stands in the database, and each worker sweeps: it looks for itself
at least once a second, so a lost ring costs no more (docs/decisions/0001-database-is-the-queue.md). Once a day Huey's
scheduler in each worker rings a second bell, for the archives, and once a minute a third one, for recalibrations of the
quotas; whoever hears one looks in the database what is to be done.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress

import redis
import structlog
from huey import RedisHuey, crontab
from huey.api import Task

log = structlog.get_logger()

QUEUE = "plimsoll"
"""Name of the Huey instance, and so part of its Redis keys."""

LONGEST_RETRY_S = 1.0
"""Longest pause between two tries to hear rings again while Redis is away."""

ARCHIVE_HOUR, ARCHIVE_MINUTE = "3", "17"
"""When the archives' bell rings every day, UTC: apart from midnight and the full hour, when other things begin."""

STOP_S = 2.0
"""How long stopping waits for the thread that listens; it looks up once a second."""


class Doorbell:
    """The Huey instance with its tasks.

    In a consumer thread, `answer` runs at each ring, `archive` once a day, `recalibrate` once a minute.
    """

    def __init__(
        self,
        redis_url: str,
        answer: Callable[[], object] | None = None,
        archive: Callable[[], object] | None = None,
        recalibrate: Callable[[], object] | None = None,
    ) -> None:
        self.huey = RedisHuey(QUEUE, url=redis_url, results=False)

        def tick() -> None:
            """Let the worker look for due runs."""
            if answer is not None:
                answer()

        def archive_runs() -> None:
            """Let the worker look for runs to archive."""
            if archive is not None:
                archive()

        def look_after_recalibration() -> None:
            """Let the worker look whether a recalibration has a turn to take."""
            if recalibrate is not None:
                recalibrate()

        self._task = self.huey.task(name="tick")(tick)
        self.huey.periodic_task(crontab(hour=ARCHIVE_HOUR, minute=ARCHIVE_MINUTE), name="archive_runs")(archive_runs)
        self.huey.periodic_task(crontab(minute="*"), name="look_after_recalibration")(look_after_recalibration)

    def message(self) -> tuple[str, bytes]:
        """Return the Redis list and the bytes whose LPUSH is one ring, for callers with a connection of their own."""
        task: Task = self._task.s()
        return self.huey.storage.queue_key, self.huey.serialize_task(task)

    def listen(self) -> Callable[[], None]:
        """Answer rings from now on, in a thread of Huey's; returns what stops it (and may take STOP_S).

        Must be called in the main thread, before the caller sets its own signal handlers: Huey sets some too. Rings
        that nobody has heard yet are dropped, since whoever starts to listen looks for due runs anyway.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("only the main thread can listen: Huey sets signal handlers")
        _tell_in_one_line(logging.getLogger("huey"))
        with suppress(redis.RedisError, OSError):
            self.huey.storage.flush_queue()
        consumer = self.huey.create_consumer(
            workers=1, max_delay=LONGEST_RETRY_S, check_worker_health=False, shutdown_timeout=STOP_S
        )
        consumer.start()
        return lambda: consumer.stop(graceful=True)


class _OneLine(logging.Handler):
    """Passes a library's log records on as structured lines, an error as its message rather than its traceback.

    That Redis is away is a warning, as everywhere here: the sweeper finds what is due.
    """

    def emit(self, record: logging.LogRecord) -> None:
        fault = record.exc_info[1] if record.exc_info else None
        level = (
            min(record.levelno, logging.WARNING) if isinstance(fault, (redis.RedisError, OSError)) else record.levelno
        )
        log.log(level, record.getMessage(), logger=record.name, **({"fault": str(fault)} if fault else {}))


def _tell_in_one_line(logger: logging.Logger) -> None:
    """Send a library's warnings to the service's log; what it says about each task is not worth its time."""
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.handlers[:] = [_OneLine()]
