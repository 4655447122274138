"""What goes on beside every load: rows are flushed, the machine is looked at, and the sending is watched.

Those who send are watched too (`selfwatch`): how late they are says how far their stamps can be trusted. The garbage
collector is kept quiet meanwhile: its pauses would be measured as the service's. Whatever ends the load, what it left
unfinished is cleaned up before these end. Used by `generator`, `openloop` and `burst_limits`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from harness.errors import HarnessError
from harness.recorder import FLUSH_INTERVAL_S, Recorder
from harness.resources import Resources
from harness.selfwatch import SelfWatch, Strain, quiet_collector

LOOK_INTERVAL_S = 1.0


class Watch(Protocol):
    """What knows how those who send are doing: this process itself, or others that report to it."""

    async def watch(self) -> None:
        """Watch until cancelled."""

    def take(self) -> Strain:
        """Return what was suffered since the last call."""


class Beside:
    """Carries one load with all that goes on beside it."""

    def __init__(
        self,
        recorder: Recorder,
        resources: Resources,
        check: Callable[[], None],
        tell: Callable[[int], None],
        watch: Watch | None = None,
    ) -> None:
        """`check` is called every second and may raise a HarnessError that ends the load; `tell` hears of the rows.

        Without `watch` this process sends, and is watched itself.
        """
        self._recorder = recorder
        self._resources = resources
        self._check = check
        self._tell = tell
        self._watch = watch or SelfWatch()
        self._looking = asyncio.Lock()

    async def carry(self, load: Coroutine[Any, Any, None], clean_up: Callable[[], Awaitable[None]]) -> None:
        """Carry the load to its end. Raises what it raises, and HarnessError when recording or `check` fails."""
        with quiet_collector():
            work = asyncio.create_task(load)
            beside = [asyncio.create_task(each) for each in (self._flush(), self._keep_looking(), self._watch.watch())]
            try:
                await asyncio.wait([work, *beside], return_when=asyncio.FIRST_COMPLETED)
                for task in beside:
                    if task.done():  # these never end by themselves: it failed
                        task.result()
                await work
            finally:
                await end([work])
                await clean_up()
                await end(beside)
                self._tell(self._recorder.samples.rows)
            # A short load ends between two looks: what happened since the last one is told too.
            await self.look()
            self._check()

    async def look(self) -> None:
        """Take one look at the machine now."""
        async with self._looking:  # a look measures since the last one, so two must not overlap
            self._recorder.add_resources(await self._resources.look(self._watch.take()))

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_INTERVAL_S)
            self._tell(self._recorder.samples.rows)
            write = asyncio.create_task(asyncio.to_thread(self._recorder.write, self._recorder.collect()))
            try:
                # A write that has begun is waited for in any case: a thread cannot be called back.
                try:
                    await asyncio.shield(write)
                finally:
                    await write
            except OSError as fault:
                text = f"cannot go on writing {self._recorder.path} ({fault.strerror}); what was written is kept"
                raise HarnessError(text) from None

    async def _keep_looking(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            self._check()
            await self.look()
            due = max(due + LOOK_INTERVAL_S, loop.time())
            await asyncio.sleep(due - loop.time())


async def end(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel the tasks and wait for their end; what they failed of is known already."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
