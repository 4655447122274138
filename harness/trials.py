"""One trial: requests to one endpoint, all intended at one instant, on a service that has come to rest.

Before it, what the requests need is made (parents to spawn from, finished runs to poll) and a connection is opened for
each of them, so that none waits for another's. After it, the service is waited for until its queue is empty and no run
is unfinished; what does not finish is cancelled. All of that is preparation: only the burst itself makes rows.
When bursts are made, and how large, is `burst_limits`' business.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

import numpy as np

from harness.analysis.dependence import Floats
from harness.analysis.dependence import Ints as Instants
from harness.api import Api, CreateAnswer, RunsAnswer, Snapshot, SpawnAnswer, Workspace, problem_of, read_answer
from harness.arrivals import burst
from harness.client import Client
from harness.connection import Exchange, parse_server_timing
from harness.errors import HarnessError, ServiceDeclined, ServiceUnreachable
from harness.recorder import Recorder
from harness.resources import OLDEST_DUE_TICK, QUEUE_DEPTH, gauge, read_metrics
from harness.sample import Endpoint, Outcome, RunRecord
from harness.samplebuffer import run_key

QUOTA_CLASS = "calibration"  # rates and caps lifted: the system is measured, not its quotas
WAITING = "WAITING_FOR_SUBRUN"
UNFINISHED = ("PENDING", "RUNNING", "PAUSED", "WAITING_FOR_APPROVAL", WAITING)
AT_ONCE = 16  # preparing calls side by side: preparation is not the load
REST_POLL_S = 0.05
REST_S = 60.0  # a parent that waits for its subrun gives up after so long by itself
CANCEL_REST_S = 20.0  # more, after everything was cancelled


class NotAtRest(HarnessError):
    """The service did not come to rest between two trials, so the next one would measure the last one's queue."""

    def __init__(self, endpoint: Endpoint, what: str) -> None:
        super().__init__(f"{endpoint}: the service did not come to rest after a trial: {what}")


class Trials:
    """Makes trials at one endpoint, in a calibration workspace of its own."""

    def __init__(
        self,
        endpoint: Endpoint,
        client: Client,
        api: Api,
        recorder: Recorder,
        numbers: Iterator[int],  # of runs, unique within the sample set
        look: Callable[[], Awaitable[None]],  # takes a row of the machine and the queue
    ) -> None:
        self.endpoint = endpoint
        self._client = client
        self._api = api
        self._recorder = recorder
        self._numbers = numbers
        self._look = look
        self._workspace: Workspace | None = None
        self._known: set[str] = set()  # runs that may be unfinished

    async def prepare(self, name: str) -> None:
        """Make the workspace; raises ServiceUnreachable or ServiceDeclined."""
        self._workspace = await self._api.make_workspace(name, QUOTA_CLASS)

    @property
    def workspace(self) -> Workspace:
        """The workspace of these trials."""
        assert self._workspace is not None  # noqa: S101 - prepare() comes first
        return self._workspace

    async def perform(self, level: int, trial: int, *, record: bool = True) -> Floats:
        """Make one burst and bring the service to rest; returns its latencies (level,) in ms, failures as infinity.

        Raises ServiceDeclined, ServiceUnreachable or NotAtRest when the service cannot be prepared or rested.
        """
        run_ids = await self._set_up(level)
        wires = self._wires(level, run_ids)
        await self._connect(level)
        due_at_ns, exchanges = await self._burst(wires)
        latency = self._take(due_at_ns, exchanges, run_ids, level, trial, record=record)
        if record:
            await self._look()  # the queue as the burst left it
        lost = [run_id for run_id, each in zip(run_ids, exchanges, strict=False) if each.outcome is not Outcome.OK]
        if self.endpoint is Endpoint.SPAWN:
            await self._cancel(lost)  # or they would wait for their subrun
        await self._rest(UNFINISHED)
        self._known.clear()
        return latency

    async def clean_up(self) -> None:
        """Cancel what is unfinished, after an interruption."""
        if self._workspace is not None:
            left = await self._unfinished(UNFINISHED)
            await self._cancel(sorted(self._known) if left is None else left)

    async def _set_up(self, level: int) -> list[str]:
        """Make the runs that the burst is about, and return their ids in its order; none for creates."""
        if self.endpoint is Endpoint.CREATE:
            return []
        spawns = self.endpoint is Endpoint.SPAWN
        wire = self.workspace.create_wire(1 if spawns else 0)
        run_ids: list[str] = []
        for begin in range(0, level, AT_ONCE):
            calls = [self._client.exchange(wire) for _ in range(min(AT_ONCE, level - begin))]
            run_ids += [created(exchange) for exchange in await asyncio.gather(*calls)]
            self._known.update(run_ids)
        # A parent waits for its subrun; a run to be polled has ended.
        await self._rest(UNFINISHED[:-1] if spawns else UNFINISHED)
        return run_ids

    def _wires(self, level: int, run_ids: Sequence[str]) -> list[bytes]:
        if self.endpoint is Endpoint.CREATE:
            return [self.workspace.create_wire(0)] * level
        if self.endpoint is Endpoint.SPAWN:
            return [self.workspace.spawn_wire(run_id) for run_id in run_ids]
        return [self.workspace.snapshot_wire(run_id, 0) for run_id in run_ids]

    async def _connect(self, level: int) -> None:
        """Have a connection open, and seen answering, for each request; what fails here fails again in the burst."""
        await self._all_at_once([self.workspace.alive_wire()] * level)

    async def _burst(self, wires: Sequence[bytes]) -> tuple[Instants, list[Exchange]]:
        """Send all at one instant; return when each was due and what became of it, in order."""
        await asyncio.sleep(REST_POLL_S)  # whatever the loop still had to do is done
        after_ns = (burst(len(wires)) * 1e9).astype(np.int64)
        return time.monotonic_ns() + after_ns, await self._all_at_once(wires)

    async def _all_at_once(self, wires: Sequence[bytes]) -> list[Exchange]:
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        left = len(wires)

        def count(_: Exchange) -> None:
            nonlocal left
            left -= 1
            if not left and not over.done():
                over.set_result(None)

        exchanges = [self._client.send(wire, count) for wire in wires]
        await over
        return exchanges

    def _take(
        self,
        due_at_ns: Instants,
        exchanges: Sequence[Exchange],
        run_ids: Sequence[str],
        level: int,
        trial: int,
        *,
        record: bool,
    ) -> Floats:
        """Read the answers, make the rows, and return the latencies."""
        latency = np.full(level, np.inf)
        if record:
            self._recorder.plan(level)
        for index, exchange in enumerate(exchanges):
            about = self._read(exchange, run_ids[index] if run_ids else None)
            intended_at_ns = int(due_at_ns[index])
            if exchange.outcome is Outcome.OK:
                latency[index] = (exchange.done_at_ns - intended_at_ns) / 1e6
            if record:
                self._record(exchange, about, intended_at_ns, float(level), trial)
        return latency

    def _read(self, exchange: Exchange, run_id: str | None) -> tuple[str | None, str | None]:
        """Return the run that a request was about, and the subrun that it made; note what may be unfinished."""
        child_id = None
        if exchange.outcome is Outcome.OK:
            if self.endpoint is Endpoint.CREATE:
                created = read_answer(exchange, CreateAnswer)
                run_id = created.run_id if created else None
            elif self.endpoint is Endpoint.SPAWN:
                spawned = read_answer(exchange, SpawnAnswer)
                child_id = spawned.child_run_id if spawned else None
            else:
                read_answer(exchange, Snapshot)
        elif exchange.outcome is Outcome.HTTP_ERROR:
            exchange.error = problem_of(exchange)
        self._known.update(each for each in (run_id, child_id) if each)
        return run_id, child_id

    def _record(
        self, exchange: Exchange, about: tuple[str | None, str | None], intended_at_ns: int, level: float, trial: int
    ) -> None:
        """Make the row of one request, and those of the runs that it was about."""
        assert exchange.outcome is not None  # noqa: S101 - it ended
        number, child = next(self._numbers), int(self.endpoint is Endpoint.SPAWN)
        self._recorder.samples.append(
            number, child, self.endpoint, level, trial, 0, intended_at_ns,
            exchange.sent_at_ns, exchange.first_byte_at_ns, exchange.done_at_ns, exchange.status,
            exchange.outcome, exchange.error, parse_server_timing(exchange.server_timing),
            exchange.response_bytes, exchange.connection_id,
        )  # fmt: skip
        run_id, child_id = about
        answered_at_ns = exchange.done_at_ns if exchange.outcome is Outcome.OK else None
        created_at_ns = answered_at_ns if self.endpoint is Endpoint.CREATE else None
        self._recorder.add_run(
            self._run(run_key(number), None, run_id, trial, created_at_ns, int(child_id is not None))
        )
        if child:
            key = run_key(number, child)
            self._recorder.add_run(self._run(key, run_key(number), child_id, trial, answered_at_ns, 0))

    def _run(
        self, key: str, parent: str | None, run_id: str | None, trial: int, created_at_ns: int | None, subruns: int
    ) -> RunRecord:
        """Return the record of a run whose end nobody polled for."""
        return RunRecord(
            run_key=key, run_id=run_id, parent_run_key=parent, workspace_id=self.workspace.workspace_id, trial=trial,
            worker=0, created_at_ns=created_at_ns, last_unfinished_at_ns=None, first_finished_at_ns=None,
            server_completion_ms=None, final_status=None, poll_timed_out=False, ticks=None, steps=None, events=None,
            subruns=subruns,
        )  # fmt: skip

    async def _rest(self, statuses: Sequence[str]) -> None:
        """Wait until the queue is empty and no run is in one of these statuses; cancel what is after REST_S."""
        for patience_s in (REST_S, CANCEL_REST_S):
            deadline = time.monotonic() + patience_s
            while True:
                waits = await self._waits()
                left = await self._left(statuses) if waits is None else []
                if waits is None and not left:
                    return
                if time.monotonic() > deadline:
                    break
                await asyncio.sleep(REST_POLL_S)
            await self.clean_up()
        raise NotAtRest(self.endpoint, waits or f"{len(left)} of its runs are unfinished, though cancelled")

    async def _waits(self) -> str | None:
        """Say what waits in the service's queue; None when nothing does, or when it does not tell."""
        text = await self._api.metrics_text()
        metrics = read_metrics(text) if text is not None else {}
        depth, oldest_s = gauge(metrics, QUEUE_DEPTH), gauge(metrics, OLDEST_DUE_TICK, max)
        return f"{depth or 0:g} runs are due, the oldest for {oldest_s or 0:.1f} s" if depth or oldest_s else None

    async def _left(self, statuses: Sequence[str]) -> list[str]:
        """Return runs that are in one of the statuses: by the workspace's list, or else by snapshots of the known."""
        listed = await self._unfinished(statuses)
        if listed is not None:
            return listed
        left = []
        known = sorted(self._known)
        for begin in range(0, len(known), AT_ONCE):
            some = known[begin : begin + AT_ONCE]
            wires = [self.workspace.snapshot_wire(run_id, 0) for run_id in some]
            for run_id, exchange in zip(some, await self._calls(wires), strict=True):
                seen = read_answer(exchange, Snapshot) if exchange.outcome is Outcome.OK else None
                if seen is None or seen.run.status in statuses:
                    left.append(run_id)
        return left

    async def _unfinished(self, statuses: Sequence[str]) -> list[str] | None:
        """Return this workspace's runs in these statuses, a page of each; None when the service does not list them."""
        found: list[str] = []
        for exchange in await self._calls([self.workspace.runs_wire(status) for status in statuses]):
            page = read_answer(exchange, RunsAnswer) if exchange.outcome is Outcome.OK else None
            if page is None:
                return None
            found += [run.run_id for run in page.runs]
        return found

    async def _cancel(self, run_ids: Sequence[str]) -> None:
        """Cancel runs; one that has ended meanwhile declines, which is as good."""
        for begin in range(0, len(run_ids), AT_ONCE):
            await self._calls([self.workspace.cancel_wire(run_id) for run_id in run_ids[begin : begin + AT_ONCE]])

    async def _calls(self, wires: Sequence[bytes]) -> list[Exchange]:
        return list(await asyncio.gather(*(self._client.exchange(wire) for wire in wires)))


def created(exchange: Exchange) -> str:
    """Return the id of a run made in preparation; raises ServiceDeclined or ServiceUnreachable."""
    what = "make a run for a trial"
    if exchange.outcome is Outcome.HTTP_ERROR:
        raise ServiceDeclined(what, exchange.status, problem_of(exchange))
    answer = read_answer(exchange, CreateAnswer) if exchange.outcome is Outcome.OK else None
    if answer is None:
        raise ServiceUnreachable(what, exchange.error or "unknown fault")
    return answer.run_id
