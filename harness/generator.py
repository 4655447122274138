"""Carries a plan out: starts runs when they are due, records beside them, and watches itself.

Four things share one event loop: the runs, the flush of what they recorded, the look at the machine, and a heartbeat
whose lateness says how far the loop's own stamps can be trusted. The garbage collector is kept quiet meanwhile: its
pauses would be measured as the service's. When the load is interrupted, what it left unfinished is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

from harness.api import Api
from harness.arrivals import closed_loop
from harness.client import REQUEST_TIMEOUT_S, Client
from harness.errors import HarnessError
from harness.progress import Tally
from harness.recorder import FLUSH_INTERVAL_S, Recorder
from harness.resources import Resources
from harness.sample import Mode, RunRecord
from harness.samplebuffer import NAN
from harness.scenario import AgentRun, Habits, Place
from harness.workspaces import Workspaces, prepared_count

LOOK_INTERVAL_S = 1.0
HEARTBEAT_S = 0.01  # a twentieth of the tightest latency target (200 ms): a stall that matters cannot hide between two
CLEAN_UP_S = 5.0  # what cancelling may take after an interruption


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for on the command line."""

    mode: Mode
    runs: int
    children: int  # per run
    burst_size: int  # smoke: at most so many side by side; burst: so many at one instant
    poll_interval_s: float
    poll_timeout_s: float
    soak_interval_s: float  # from the last finish to the next start

    def parameters(self) -> dict[str, Any]:
        """Return the plan as the manifest keeps it."""
        plain = dataclasses.asdict(self)
        del plain["mode"]
        return plain | {"request_timeout_s": REQUEST_TIMEOUT_S}


class LoopLag:
    """How late the event loop wakes: a heartbeat on a fixed grid, the worst of the time since it was last taken."""

    def __init__(self) -> None:
        self._worst_s: float | None = None

    async def watch(self) -> None:
        """Beat until cancelled."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due = max(due + HEARTBEAT_S, loop.time())
            await asyncio.sleep(due - loop.time())
            self._worst_s = max(self._worst_s or 0.0, loop.time() - due)

    def take_ms(self) -> float | None:
        """Return the worst lateness since the last call, in milliseconds; None when it did not beat since."""
        worst_s, self._worst_s = self._worst_s, None
        return None if worst_s is None else worst_s * 1e3


@contextlib.contextmanager
def quiet_collector() -> Iterator[None]:
    """Keep the garbage collector from walking what was there before, and from walking often."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


class Generator:
    """One closed-loop measurement from the first run to the last."""

    def __init__(
        self,
        plan: Plan,
        client: Client,
        api: Api,
        recorder: Recorder,
        resources: Resources,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`check` is called every second and may raise a HarnessError that ends the load."""
        self.tally = Tally(plan.runs)
        self._plan = plan
        self._client = client
        self._recorder = recorder
        self._resources = resources
        self._check = check
        self._lag = LoopLag()
        self._habits = Habits(plan.children, plan.poll_interval_s, plan.poll_timeout_s)
        self._loop_plan = closed_loop(plan.mode, plan.runs, plan.burst_size, plan.soak_interval_s)
        self._workspaces = Workspaces(api, f"harness-{recorder.path.name}", plan.children)
        self._live: set[AgentRun] = set()
        recorder.live_runs = self._live_records

    def _live_records(self) -> list[RunRecord]:
        return [record for run in self._live for record in run.records()]

    async def prepare(self) -> None:
        """Make the workspaces, before anything is measured; raises ServiceUnreachable or ServiceDeclined."""
        plan, loop_plan = self._plan, self._loop_plan
        count = prepared_count(plan.runs, loop_plan.side_by_side, plan.children, loop_plan.pause_s)
        await self._workspaces.prepare(count)

    async def carry_out(self) -> None:
        """Make the whole load. Raises HarnessError when recording or `check` fails; cancelled, it cleans up."""
        with quiet_collector():
            load = asyncio.create_task(self._load())
            beside = [asyncio.create_task(work) for work in (self._flush(), self._look(), self._lag.watch())]
            try:
                await asyncio.wait([load, *beside], return_when=asyncio.FIRST_COMPLETED)
                for task in beside:
                    if task.done():  # these never end by themselves: it failed
                        task.result()
                await load
            finally:
                await _end([load])
                await self._clean_up()
                await _end(beside)
                self.tally.requests = self._recorder.samples.rows
            # A short load ends between two looks: what happened since the last one is told too.
            self._recorder.add_resources(await self._resources.look(self._lag.take_ms()))
            self._check()

    async def _load(self) -> None:
        first = 1
        for group, size in enumerate(self._loop_plan.group_sizes):
            if group:
                await asyncio.sleep(self._loop_plan.pause_s)
            await self._group(group, first, size)
            first += size

    async def _group(self, group: int, first: int, size: int) -> None:
        """Run one group: its first runs are due at one instant, each later one when a worker is free."""
        numbers = iter(range(first, first + size))
        burst = self._plan.mode is Mode.BURST
        level, trial = (float(size), group) if burst else (NAN, 0)

        async def work(worker: int, run: AgentRun, due_at_ns: int) -> None:
            while True:
                await self._one(run, due_at_ns)
                number = next(numbers, None)
                if number is None:
                    return
                run = await self._next_run(Place(number, level, trial, worker))
                due_at_ns = time.monotonic_ns()

        width = min(self._loop_plan.side_by_side, size)
        places = [Place(next(numbers), level, trial, worker) for worker in range(width)]
        ready = await asyncio.gather(*(self._next_run(place) for place in places))
        due_at_ns = time.monotonic_ns()
        workers = [asyncio.create_task(work(worker, run, due_at_ns)) for worker, run in enumerate(ready)]
        try:
            await asyncio.gather(*workers)
        finally:
            await _end(workers)

    async def _next_run(self, place: Place) -> AgentRun:
        workspace = await self._workspaces.borrow()
        return AgentRun(self._client, self._recorder, workspace, self._habits, place)

    async def _one(self, run: AgentRun, due_at_ns: int) -> None:
        self._live.add(run)
        await run.perform(due_at_ns)
        self._end_run(run)

    def _end_run(self, run: AgentRun) -> None:
        self._live.discard(run)
        for record in run.records():
            self._recorder.add_run(record)
        parent = run.parent
        self.tally.end_run(final_status=parent.final_status, timed_out=parent.poll_timed_out)
        if run.left_nothing:
            self._workspaces.give_back(run.workspace)

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_INTERVAL_S)
            self.tally.requests = self._recorder.samples.rows
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

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            self._check()
            self._recorder.add_resources(await self._resources.look(self._lag.take_ms()))
            due = max(due + LOOK_INTERVAL_S, loop.time())
            await asyncio.sleep(due - loop.time())

    async def _clean_up(self) -> None:
        """Cancel what an interruption left unfinished, and keep what is known of it."""
        left = list(self._live)
        if not left:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLEAN_UP_S):
                await asyncio.gather(*(run.cancel_unfinished() for run in left))
        for run in left:
            self._end_run(run)


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel the tasks and wait for their end; what they failed of is known already."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
