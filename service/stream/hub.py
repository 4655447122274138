"""One process's tails, and the two ways in which they learn what happened.

Redis brings each commit's events as they are published (`events.Following`); the hub hands each to the tails that want
it. And once a second the hub looks at the database: one query says how far every followed run has come. That look is
what finds a lost publication, and all there is while Redis is away.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from service.db import is_outage
from service.events import Following, Published
from service.stream.frames import Happened
from service.stream.history import History
from service.stream.tails import RunTail, Tail, WorkspaceTail

log = structlog.get_logger()


class Hub:
    """Connects the tails of one process with Redis and the database."""

    def __init__(self, following: Following, history: History, look_every_s: float) -> None:
        self._following = following
        self._history = history
        self._look_every_s = look_every_s
        self._runs: dict[uuid.UUID, set[RunTail]] = {}  # by run
        self._workspaces: dict[uuid.UUID, set[WorkspaceTail]] = {}  # by workspace
        self._look_now = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def attach(self, tail: RunTail | WorkspaceTail) -> Iterator[None]:
        """Tell a tail all that happens, for as long as the block lasts."""
        if self._task is None:
            self._task = asyncio.create_task(self._look_forever(), name="look at followed runs")
        with self._following.listen(tail.workspace_id, self._hear):
            if isinstance(tail, RunTail):
                self._runs.setdefault(tail.run_id, set()).add(tail)
            else:
                self._workspaces.setdefault(tail.workspace_id, set()).add(tail)
            try:
                yield
            finally:
                if isinstance(tail, RunTail):
                    _discard(self._runs, tail.run_id, tail)
                else:
                    _discard(self._workspaces, tail.workspace_id, tail)

    async def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _hear(self, workspace_id: uuid.UUID, published: Published | None) -> None:
        if published is None:
            for tails in self._runs.values():
                for tail in tails:
                    if tail.workspace_id == workspace_id:
                        tail.doubt()
            self._look_now.set()
            return
        summaries = self._workspaces.get(workspace_id, ())
        for event in published.events:
            followers: list[Tail] = [*self._runs.get(event.run_id, ()), *summaries]
            if followers:
                happened = Happened(
                    workspace_id, event.run_id, event.seq, event.event_type, event.payload, published.created_at
                )
                for follower in followers:
                    follower.hear(happened)

    async def _look_forever(self) -> None:
        """Look once a second, and at once when messages may have been lost."""
        loop = asyncio.get_running_loop()
        looked_at_s = loop.time()
        while True:
            try:
                async with asyncio.timeout(self._look_every_s):
                    await self._look_now.wait()
            except TimeoutError:
                pass
            self._look_now.clear()
            begun_at_s = loop.time()
            try:
                await self._look(begun_at_s - looked_at_s)
                looked_at_s = begun_at_s
            except Exception as fault:
                if is_outage(fault):
                    log.warning("streams cannot look at the database", fault=str(fault))
                else:
                    log.error("streams cannot look at the database", exc_info=fault)
                await asyncio.sleep(self._look_every_s)

    async def _look(self, blind_s: float) -> None:
        """Tell every tail how far its runs have come."""
        run_ids = set(self._runs)
        for tails in self._workspaces.values():
            for tail in tails:
                run_ids.update(tail.live_run_ids())
        if not run_ids and not self._workspaces:
            return
        for run_id, workspace_id, last_seq in await self._history.standing(run_ids, self._workspaces, blind_s):
            followers: list[Tail] = [*self._runs.get(run_id, ()), *self._workspaces.get(workspace_id, ())]
            for follower in followers:
                follower.stands_at(run_id, last_seq)


def _discard(
    index: dict[uuid.UUID, set[RunTail]] | dict[uuid.UUID, set[WorkspaceTail]], key: uuid.UUID, tail: Tail
) -> None:
    index[key].discard(tail)
    if not index[key]:
        del index[key]
