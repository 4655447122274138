"""The schedule of recalibrations: a worker starts the measurement when one is due, and it runs beside the service.

What is due is asked of the database ("when did the last one begin?"), never of a clock that may have slept, so however
many were missed, one makes up for all. Measuring is another program (`python -m harness recalibrate`), which takes the
one place of whoever measures: when several workers find the same moment due, one measures and the others are told so.
A worker that stops tells its measurement to end; what it has done is gone on with the next time.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

import structlog

from service.chores import Chore
from service.db import Database
from service.quota.recalibration_record import is_due
from service.settings import Settings, child_environment

log = structlog.get_logger()

COMMAND = (sys.executable, "-m", "harness", "recalibrate")
DAY_S = 86_400.0


class Schedule(Chore):
    """Recalibrations when they are due, one at a time; without an interval none ever is."""

    def __init__(self, settings: Settings, command: Sequence[str] = COMMAND) -> None:
        super().__init__(
            "scheduled recalibration", "whether a recalibration is due is not known", "the next look finds out"
        )
        self._settings = settings
        self._command = (*command, *settings.recalibrate_args)
        self._every_s = settings.recalibrate_days * DAY_S
        self._process: asyncio.subprocess.Process | None = None

    def ring(self) -> None:
        """Look whether one is due, unless one is at work; to be called in the loop's own thread."""
        if self._every_s:
            super().ring()

    def stop(self) -> None:
        """Begin nothing more, and tell the one at work to end, for which nobody waits for long."""
        super().stop()
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()

    async def _do(self) -> None:
        database = Database(self._settings.database_url, pool_size=1)
        try:
            async with database.read() as connection:
                due = await is_due(connection, self._every_s)
        finally:
            await database.close()
        if due and not self._stopping:
            await self._recalibrate()

    async def _recalibrate(self) -> None:
        """Measure in a process of its own, and log how it ended."""
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env=child_environment(self._settings),
                start_new_session=True,  # a signal to the worker's group is for the worker, which passes it on
            )
        except OSError as fault:
            log.error("a scheduled recalibration could not be started", fault=str(fault))
            return
        self._process = process
        log.info("scheduled recalibration", pid=process.pid)
        if self._stopping:  # since then: there was no process yet that could have been told
            process.terminate()
        assert process.stderr is not None  # noqa: S101 - it is a pipe
        said = ""
        while line := await process.stderr.readline():
            said = line.decode(errors="replace").strip() or said
        code = await process.wait()
        tell = log.info if code == 0 else log.warning
        tell("scheduled recalibration ended", code=code, said=said)
