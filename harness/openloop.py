"""Open loop: creates are sent when they are due, whatever the replies, by processes that do nothing else.

    OpenLoop (this process)                    sender 0 … sender N-1 (`sender`, a process each)
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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import IO, Any, TypeVar

import msgspec

from harness.api import Api
from harness.arrivals import Arrivals, Schedule
from harness.beside import Beside
from harness.client import REQUEST_TIMEOUT_S, Client
from harness.errors import HarnessError, ServiceUnreachable
from harness.openview import OpenTally
from harness.recorder import Recorder
from harness.resources import Resources
from harness.sample import Endpoint, Mode, RunRecord
from harness.samplebuffer import Batch
from harness.scenario import SCENARIO, Habits
from harness.selfwatch import Strain, together
from harness.sender import FRAME_HEAD, Go, Job, Ready, Report, Stop, Tenant, body_length, frame, share
from harness.target import end_with_parent

QUOTA_CLASS = "calibration"  # rates and caps lifted: at a rate of one's own choosing a quota would only refuse it
WORKSPACES = 16  # writes of one workspace wait for each other, as those of one tenant do; of so many they seldom do
START_LEAD_S = 0.25  # from Go to the first arrival: every sender has heard of it by then
READY_S = 60.0  # for a process to start and connect on a busy machine
END_S = 10.0  # for a sender to cancel what it left and to report, after an interruption
WARM_S = 0.02  # connections opened beforehand suffice for answers that take so long; more are opened when needed
WARM_MIN = 8
_PIPE_BYTES = 8 * 2**20

Message = TypeVar("Message", Ready, Report)


class SenderFailed(HarnessError):
    """A sending process ended, or never began; what was recorded is kept."""

    def __init__(self, worker: int, what: str) -> None:
        super().__init__(f"sending process {worker} {what}")
        self.worker = worker


@dataclasses.dataclass(frozen=True, slots=True)
class OpenPlan:
    """What was asked for on the command line."""

    schedule: Schedule
    workers: int  # sending processes
    connections: int  # of all of them together
    habits: Habits | None  # what follows each create; without it, an arrival is `request` and no more
    request: bytes = dataclasses.field(default=b"", repr=False)  # bytes to send at each arrival, where no run is made
    endpoint: Endpoint = Endpoint.OTHER  # of `request`
    mode: Mode = Mode.OPEN
    connections_flag: str = "--connections"

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
        own = {"workers": self.workers, "connections": self.connections, "request_timeout_s": REQUEST_TIMEOUT_S}
        return plain | habits | own


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
        self._beside = Beside(recorder, resources, check, lambda rows: None, self._watch)
        self._senders: list[_SenderProcess] = []
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
        try:
            for worker in range(plan.workers):
                self._senders.append(_SenderProcess(self._job(worker, tenants)))
            async with asyncio.timeout(READY_S):
                for sender in self._senders:
                    await sender.wait_until_ready()
        except TimeoutError:
            await self._end_senders()
            raise SenderFailed(len(self._senders), f"was not ready after {READY_S:g} s") from None
        except BaseException:
            await self._end_senders()
            raise

    def _job(self, worker: int, tenants: list[Tenant]) -> Job:
        plan = self._plan
        connections = share(plan.connections, worker, plan.workers)
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
        start_at_ns = time.monotonic_ns() + round(START_LEAD_S * 1e9)
        self._recorder.plan(self._arrivals * self._per_arrival)
        self.tally.begin(start_at_ns)
        for sender in self._senders:
            sender.say(Go(start_at_ns))
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

    async def _follow(self, sender: _SenderProcess) -> None:
        while not sender.reported_all:
            self._take(sender, await sender.read(Report))

    def _take(self, sender: _SenderProcess, report: Report) -> None:
        batch = Batch(list(report.chunks), report.errors)
        self._recorder.samples.absorb(batch)
        mine = share(self._arrivals, sender.worker, self._plan.workers)
        planned = report.planned + (mine - report.begun) * self._per_arrival
        # What is still to begin was planned at the start; what a run asks for beyond it is planned as it does.
        self._recorder.plan(planned - (sender.planned if sender.planned is not None else mine * self._per_arrival))
        sender.planned = planned
        sender.reported_all = report.last
        for record in report.live:
            self._live[record.run_key] = record
        for record in report.runs:
            self._live.pop(record.run_key, None)
            self._recorder.add_run(record)
        self._watch.note(sender.worker, report.strain)
        self.tally.take(batch.rows(), report)

    async def _end_senders(self) -> None:
        """Let every sender end, and take what it still has to say; one that does not end is killed."""
        try:
            async with asyncio.timeout(END_S):
                for sender in self._senders:
                    sender.say(Stop())
                await asyncio.gather(*(self._end_of(sender) for sender in self._senders))
        except TimeoutError:
            pass  # it is killed below, and lacks its last report: the set is incomplete by the rows that it lacks
        finally:
            for sender in self._senders:
                await sender.end()

    async def _end_of(self, sender: _SenderProcess) -> None:
        if not sender.begun:
            return
        try:
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


class _SenderProcess:
    """One sending process and the pipes to it."""

    def __init__(self, job: Job) -> None:
        self.worker = job.worker
        self.begun = False  # it was told to go
        self.reported_all = False
        self.planned: int | None = None
        self._url = job.url
        self._head = b""
        self._complaints: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "harness.sender"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for this process, which stops it
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )
        self._reader: asyncio.StreamReader | None = None
        self._transport: asyncio.ReadTransport | None = None
        self.say(job)

    @property
    def pid(self) -> int:
        """Return the process."""
        return self._process.pid

    def say(self, message: msgspec.Struct) -> None:
        """Send it a message; whether it is still there, reading will show."""
        self.begun |= isinstance(message, Go)
        assert self._process.stdin is not None  # noqa: S101 - it is a pipe
        try:
            self._process.stdin.write(frame(message))
        except (BrokenPipeError, ValueError):
            return

    async def wait_until_ready(self) -> None:
        """Wait for its connections; raises ServiceUnreachable or SenderFailed."""
        self._reader = asyncio.StreamReader(limit=_PIPE_BYTES)
        reader = self._reader
        self._transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._process.stdout
        )
        ready = await self.read(Ready)
        if ready.fault is not None:
            raise ServiceUnreachable(f"open connections to {self._url}", ready.fault)

    async def read(self, kind: type[Message]) -> Message:
        """Return its next message; raises SenderFailed when there is none."""
        assert self._reader is not None  # noqa: S101 - wait_until_ready() comes first
        try:
            # Kept until the rest has come: who waits may be cancelled in between, and another reads on.
            self._head = self._head or await self._reader.readexactly(FRAME_HEAD)
            body = await self._reader.readexactly(body_length(self._head))
            self._head = b""
            return msgspec.msgpack.decode(body, type=kind)
        except asyncio.IncompleteReadError:
            raise SenderFailed(self.worker, await self._how_it_ended()) from None

    async def _how_it_ended(self) -> str:
        code = await asyncio.to_thread(self._process.wait)
        self._complaints.seek(0)
        lines = [line.strip() for line in self._complaints.read().decode(errors="replace").splitlines() if line.strip()]
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        last = f": {lines[-1]}" if lines else ""
        return f"{how} before its part of the schedule was done{last}; what was recorded is kept"

    async def end(self) -> None:
        """See it out."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            await asyncio.to_thread(self._process.wait, 1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        if self._transport is not None:
            self._transport.close()
        elif self._process.stdout is not None:
            self._process.stdout.close()
        self._complaints.close()
