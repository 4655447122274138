"""Chores: what a worker does beside its ticks, each kind one at a time, begun by a bell and ended with the worker.

A chore finds its work in the database whenever it is rung, so nothing is lost by a bell that finds it busy, by one that
was not heard, or by an end halfway: the next one goes on from what is written. The kinds are `archive.Rounds`,
`quota.recalibration_looks.Looks` and `schedule.Schedule`; `worker` rings them.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod

import structlog

from service.db import is_outage

log = structlog.get_logger()

CANCEL_S = 0.8
"""How long a chore that is given up may take to let go: a database that hangs need not answer its farewell."""


class Chore(ABC):
    """One kind of chore."""

    def __init__(self, name: str, given_up: str, why_no_harm: str) -> None:
        """Take the task's name, the line that is logged when the chore fails, and why an outage does no harm to it."""
        self._name = name
        self._given_up = given_up
        self._why_no_harm = why_no_harm
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    @abstractmethod
    async def _do(self) -> None:
        """Do what there is to do; `_stopping` says whether to begin nothing more."""

    def ring(self) -> None:
        """Begin unless one is going on; to be called in the loop's own thread."""
        if not self._stopping and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._carry_out(), name=self._name)

    def stop(self) -> None:
        """Begin nothing more."""
        self._stopping = True

    async def idle(self) -> None:
        """Return when none is going on."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def drain(self, patience_s: float) -> None:
        """Stop and wait for what is in hand; after that long it is given up, which undoes what is not committed."""
        self.stop()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=patience_s)
            self._task.cancel()
            await asyncio.wait([self._task], timeout=CANCEL_S)

    async def _carry_out(self) -> None:
        """Do it, and log an outage in one line, and anything else, which is a bug, with its traceback."""
        try:
            await self._do()
        except Exception as fault:
            if is_outage(fault):
                log.warning(f"{self._given_up}; {self._why_no_harm}", fault=str(getattr(fault, "orig", fault)))
            else:
                log.error(self._given_up, exc_info=fault)
