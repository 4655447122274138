"""Open loop: creates are sent when they are due, whatever the replies, by processes that do nothing else.

    OpenLoop (this process)                    sender 0 … sender N-1 (`sender`, a process each; whose, says a `crew`)
      prepare    workspaces, a Job each  ───>  connections opened ──> Ready
      carry_out  one start instant: Go   ───>  arrival k of the schedule is begun by sender k mod N, at its instant
                 rows, runs, strain      <───  Report, four times a second
                 recorder, display

**Invariants.** An arrival's intended instant depends on the schedule and the start alone: not on replies, not on how
many senders there are, not on how late one is. Every arrival is begun exactly once; late ones at once and in order,
none is left out. Latency counts from the intended instant; a request that finds no connection free waits, and that wait
is in its latency; one that never left is a row with its reason. Requests that follow within an agent run (spawn, polls)
are due when the run is ready for them, as in a closed loop.

**What can fail, and how it shows.** A sender that is stopped, starved or too slow: requests leave late, its heartbeat
says so, `analysis/lateness` refuses the measurement. A sender that dies: HarnessError, the set stays incomplete. Too
few connections: requests wait although others are answered, refused too. No descriptors: `not_sent` rows that name it,
refused. A target that stalls or dies is none of these: its rows say so, and they count.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from harness.api import Api
from harness.arrivals import Arrivals, Schedule
from harness.beside import Beside
from harness.client import REQUEST_TIMEOUT_S, Client
from harness.crew import Crew, Sender, SenderFailed, Told
from harness.openview import OpenTally
from harness.recorder import Recorder
from harness.resources import Resources
from harness.sample import Endpoint, Mode, RunRecord
from harness.samplebuffer import Batch
from harness.scenario import SCENARIO, Habits
from harness.selfwatch import Strain, together
from harness.sender import Job, Tenant, share
from harness.sender_process import LocalCrew

QUOTA_CLASS = "calibration"  # rates and caps lifted: at a rate of one's own choosing a quota would only refuse it
WORKSPACES = 16  # writes of one workspace wait for each other, as those of one tenant do; of so many they seldom do
END_S = 10.0  # for a sender to cancel what it left and to report, after an interruption
WARM_S = 0.02  # connections opened beforehand suffice for answers that take so long; more are opened when needed
WARM_MIN = 8


@dataclasses.dataclass(frozen=True, slots=True)
class OpenPlan:
    """What was asked for on the command line."""

    schedule: Schedule
    workers: int  # sending processes
    pool: int  # connections of all of them together
    habits: Habits | None  # what follows each create; without it, an arrival is `request` and no more
    request: bytes = dataclasses.field(default=b"", repr=False)  # bytes to send at each arrival, where no run is made
    endpoint: Endpoint = Endpoint.OTHER  # of `request`
    mode: Mode = Mode.OPEN
    connections_flag: str = "--connections"
    crew: Crew = dataclasses.field(default_factory=LocalCrew, compare=False)  # who sends

    @property
    def connections(self) -> int:
        """Return how many connections may be open at once on this machine."""
        return self.pool if self.crew.shares_descriptors else 0

    @property
    def scenario(self) -> str:
        """Return the name of what each arrival does."""
        return "request" if self.habits is None else SCENARIO

    def load(
        self, client: Client, api: Api, recorder: Recorder, resources: Resources, check: Callable[[], None]
    ) -> OpenLoop:
        """Return what carries this plan out."""
        return OpenLoop(self, client, api, recorder, resources, check)

    def parameters(self) -> dict[str, Any]:
        """Return the plan as the manifest keeps it."""
        plain = dataclasses.asdict(self.schedule)
        plain["arrivals"] = str(plain.pop("kind"))
        if self.schedule.kind is not Arrivals.BURST:
            del plain["burst_size"]
        habits = {} if self.habits is None else dataclasses.asdict(self.habits)
        own = {"workers": self.workers, "connections": self.pool, "request_timeout_s": REQUEST_TIMEOUT_S}
        return plain | habits | own | self.crew.parameters()


class OpenLoop:
    """One open-loop measurement from the first arrival to the last answer."""

    def __init__(
        self,
        plan: OpenPlan,
        client: Client,
        api: Api,
        recorder: Recorder,
        resources: Resources,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`check` is called every second and may raise a HarnessError that ends the load.

        Raises EmptyArrivals for a schedule without an arrival.
        """
        self._plan = plan
        due_ns = plan.schedule.offsets_ns()
        self._arrivals = len(due_ns)
        self._per_arrival = 1 if plan.habits is None else plan.habits.children + 2  # create, spawns, at least one poll
        self.tally = OpenTally(due_ns, follow_up=plan.habits is not None)
        self._client = client
        self._api = api
        self._recorder = recorder
        self._live: dict[str, RunRecord] = {}
        self._watch = SendersWatch()
        self._crew = plan.crew
        self._beside = Beside(recorder, resources, check, lambda rows: None, self._watch)
        self._senders: Sequence[Sender] = ()
        self._begun = False  # the senders were told to go
        self._over: set[int] = set()  # senders that have told their last
        self._planned: dict[int, int] = {}  # requests that each plans, as it told last
        recorder.live_runs = lambda: self._live.values()

    async def prepare(self) -> None:
        """Make the workspaces and start the senders; raises ServiceUnreachable, ServiceDeclined or SenderFailed."""
        plan = self._plan
        tenants: list[Tenant] = []
        if plan.habits is not None:
            name = f"harness-{self._recorder.path.name}"
            count = min(WORKSPACES, self._arrivals)
            made = [await self._api.make_workspace(f"{name}-{number}", QUOTA_CLASS) for number in range(1, count + 1)]
            tenants = [Tenant(each.workspace_id, each.agent_id, each.token) for each in made]
        jobs = [self._job(worker, tenants) for worker in range(plan.workers)]
        self._senders = await self._crew.muster(jobs, self._recorder)

    def _job(self, worker: int, tenants: list[Tenant]) -> Job:
        plan = self._plan
        connections = share(plan.pool, worker, plan.workers)
        at_once = plan.schedule.burst_size if plan.schedule.kind is Arrivals.BURST else 0
        expected = math.ceil(max(plan.schedule.rate_per_s * WARM_S, at_once) / plan.workers)
        return Job(
            url=self._client.url,
            request_timeout_s=self._client.timeout_s,
            connections=connections,
            warm=min(connections, max(WARM_MIN, expected)),
            schedule=plan.schedule,
            worker=worker,
            workers=plan.workers,
            habits=plan.habits,
            workspaces=tenants,
            request=plan.request,
            endpoint=plan.endpoint,
        )

    async def carry_out(self) -> None:
        """Make the whole load; cancelled, clean up. Raises HarnessError when recording, `check` or a sender fails."""
        await self._beside.carry(self._load(), self._end_senders)

    async def _load(self) -> None:
        start_at_ns = time.monotonic_ns() + round(self._crew.start_lead_s * 1e9)
        self._recorder.plan(self._arrivals * self._per_arrival)
        self.tally.begin(start_at_ns)
        self._begun = True
        await asyncio.gather(*(sender.go(start_at_ns) for sender in self._senders))
        await self._take_reports()

    async def _take_reports(self) -> None:
        """Read every sender's reports to its last one."""
        reading = [asyncio.create_task(self._follow(sender)) for sender in self._senders]
        try:
            await asyncio.gather(*reading)
        finally:
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)

    async def _follow(self, sender: Sender) -> None:
        while sender.worker not in self._over:
            self._take(sender.worker, await sender.told())

    def _take(self, worker: int, told: Told) -> None:
        report = told.report
        self._recorder.samples.absorb(Batch(list(report.chunks), report.errors))
        for part in told.parts:
            self._recorder.add_part(part)
        mine = share(self._arrivals, worker, self._plan.workers)
        planned = report.planned + (mine - report.begun) * self._per_arrival
        # What is still to begin was planned at the start; what a run asks for beyond it is planned as it does.
        self._recorder.plan(planned - self._planned.get(worker, mine * self._per_arrival))
        self._planned[worker] = planned
        if report.last:
            self._over.add(worker)
        for record in report.live:
            self._live[record.run_key] = record
        for record in report.runs:
            self._live.pop(record.run_key, None)
            self._recorder.add_run(record)
        self._watch.note(worker, report.strain)
        self.tally.take(told.glimpse, report)

    async def _end_senders(self) -> None:
        """Let every sender end, and take what it still has to say; one that does not end is killed."""
        try:
            async with asyncio.timeout(END_S):
                await asyncio.gather(*(self._end_of(sender) for sender in self._senders))
        except TimeoutError:
            pass  # it is killed below, and lacks its last report: the set is incomplete by the rows that it lacks
        finally:
            for sender in self._senders:
                await sender.end()
            await self._crew.dismiss()

    async def _end_of(self, sender: Sender) -> None:
        try:
            await sender.stop()
            if self._begun:
                await self._follow(sender)
        except SenderFailed:
            return  # it was told already, or nobody waits for it any more


class SendersWatch:
    """What the senders told of themselves since the last look."""

    def __init__(self) -> None:
        self._told: dict[int, list[Strain]] = {}
        self._cpu_s: dict[int, float] = {}

    async def watch(self) -> None:
        """Wait: they watch themselves."""
        await asyncio.Event().wait()

    def note(self, worker: int, strain: Strain) -> None:
        """Take one report of one of them."""
        self._told.setdefault(worker, []).append(strain)
        self._cpu_s[worker] = strain.cpu_s

    def take(self) -> Strain:
        """Return the worst since the last call; the share of waiting is each one's mean, then the worst of them."""
        worst = []
        for worker, strains in self._told.items():
            waits = [each.wait_percent for each in strains if each.wait_percent is not None]
            mean = sum(waits) / len(waits) if waits else None
            worst.append(dataclasses.replace(together(strains, 0.0), wait_percent=mean, cpu_s=self._cpu_s[worker]))
        silent = [Strain(None, None, None, cpu_s) for worker, cpu_s in self._cpu_s.items() if worker not in self._told]
        self._told = {}
        return together([*worst, *silent], time.process_time())
