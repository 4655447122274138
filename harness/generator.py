"""Carries a plan out: starts runs when they are due. When it is interrupted, what it left unfinished is cancelled.

What goes on beside the runs, recording and watching, is in `beside`; what one run does, in `scenario`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

from harness.api import Api
from harness.arrivals import closed_loop
from harness.beside import Beside, end
from harness.client import REQUEST_TIMEOUT_S, Client
from harness.progress import Tally
from harness.recorder import Recorder
from harness.resources import Resources
from harness.sample import Mode, RunRecord
from harness.samplebuffer import NAN
from harness.scenario import SCENARIO, AgentRun, Habits, Place
from harness.workspaces import Workspaces, prepared_count

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

    @property
    def scenario(self) -> str:
        """Return the name of what each run does."""
        return SCENARIO

    @property
    def connections(self) -> int:
        """Return how many connections may be open at once."""
        return min(self.runs, self.burst_size)

    @property
    def connections_flag(self) -> str:
        """Return the flag that makes them fewer."""
        return "--burst-size"

    def load(
        self, client: Client, api: Api, recorder: Recorder, resources: Resources, check: Callable[[], None]
    ) -> Generator:
        """Return what carries this plan out."""
        return Generator(self, client, api, recorder, resources, check)

    def parameters(self) -> dict[str, Any]:
        """Return the plan as the manifest keeps it."""
        plain = dataclasses.asdict(self)
        del plain["mode"]
        return plain | {"request_timeout_s": REQUEST_TIMEOUT_S}


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
        await Beside(self._recorder, self._resources, self._check, self._tell).carry(self._load(), self._clean_up)

    def _tell(self, rows: int) -> None:
        self.tally.requests = rows

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
            await end(workers)

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
