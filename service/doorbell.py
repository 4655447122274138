"""The doorbell: Huey carries rings to the workers, and nothing else.

Huey pops a task before it runs it and keeps no receipt, so a killed worker loses what it held. A ring therefore has no
content: it says "something may be due". What is due stands in the database, and a sweeper rings again for whatever a
lost ring left waiting (docs/decisions/0001-database-is-the-queue.md).
"""

from __future__ import annotations

from collections.abc import Callable

from huey import RedisHuey
from huey.api import Task

QUEUE = "plimsoll"
"""Name of the Huey instance, and so part of its Redis keys."""


class Doorbell:
    """The Huey instance with its one task. `answer` runs in a consumer thread when somebody rings."""

    def __init__(self, redis_url: str, answer: Callable[[], None] | None = None) -> None:
        self.huey = RedisHuey(QUEUE, url=redis_url, results=False)

        def tick() -> None:
            """Let the worker look for due runs."""
            if answer is not None:
                answer()

        self._task = self.huey.task(name="tick")(tick)

    def message(self) -> tuple[str, bytes]:
        """Return the Redis list and the bytes whose LPUSH is one ring, for callers with a connection of their own."""
        task: Task = self._task.s()
        return self.huey.storage.queue_key, self.huey.serialize_task(task)
