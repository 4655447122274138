"""One window of sustained load: requests to one endpoint, due at Poisson instants, sent whatever the replies.

As in `trials`, which this builds on, the service is at rest before and brought to rest after, and what the requests
need is made beforehand: parents that wait for their subruns, finished runs to poll, connections. Unlike a burst a
window lasts, so the queue is looked at while it does. Which rates, and how often, is `capacity`'s business.

Requests wait for nothing of ours: each has a connection or gets a fresh one, up to a bound so high that a service which
leaves as many requests unanswered has missed its target long before (Little's law). What is due beyond it is not sent,
and counts as failed.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

import numpy as np

from harness.analysis.capacity import Seen, Span, Window, observe
from harness.api import Api
from harness.arrivals import Seconds
from harness.client import Client
from harness.connection import Exchange
from harness.recorder import FLUSH_INTERVAL_S, Recorder
from harness.sample import Endpoint, Outcome, ResourceSample
from harness.trials import AT_ONCE, UNFINISHED, Trials, created

SPAWNS_EACH = 4
"""Subruns of one parent: what the service's default cap of pending subruns allows. Consecutive spawns have different
parents, so that they do not wait for each other's."""

POLLED_RUNS = 256
"""Finished runs that are polled in turn: enough that none is asked for twice at the same moment."""

LOOKS = 4
"""Looks at the queue within a window, besides the one at its end."""

YIELD_EVERY = 8
"""Requests sent in a row, when several are due, before answers are read: some 0.5 ms."""

SETTLE_S = FLUSH_INTERVAL_S + 0.1
"""After the rows of a trial are made, so that they are written before the next trial and not in it."""


class Windows(Trials):
    """Makes windows of load at one endpoint, in a calibration workspace of its own."""

    def __init__(
        self,
        endpoint: Endpoint,
        client: Client,
        api: Api,
        recorder: Recorder,
        numbers: Iterator[int],  # of runs, unique within the sample set
        look: Callable[[], Awaitable[None]],  # takes a row of the machine and the queue
        connections: int,  # requests that may be under way
        span: Span,
    ) -> None:
        super().__init__(endpoint, client, api, recorder, numbers, look)
        self._connections = connections
        self._span = span
        self._polled: list[str] = []
        self._under_way = 0
        self._over: asyncio.Future[None] | None = None

    async def perform_window(
        self, rate_per_s: float, trial: int, after_s: Seconds, looks: Sequence[ResourceSample], *, record: bool = True
    ) -> Window:
        """Make one window and bring the service to rest; returns what it shows.

        `after_s` (n_requests,) says when requests are due, in seconds from the first. `looks` is where `look` leaves
        its rows. Raises ServiceDeclined, ServiceUnreachable or NotAtRest when the service cannot be prepared or rested.
        """
        run_ids = await self._subjects(len(after_s))
        wires = self._wires(len(after_s), run_ids)
        await self._connect(min(self._connections, max(AT_ONCE, math.ceil(rate_per_s / 10.0))))
        due_at_ns, exchanges = await self._load(wires, after_s)
        self._take_rows(due_at_ns, exchanges, run_ids, rate_per_s, trial, record=record)
        await self._cancel(self._waiting_parents(run_ids, exchanges))
        await self._rest(UNFINISHED)
        self._known.clear()
        if record:
            await asyncio.sleep(SETTLE_S)
        return self._seen(due_at_ns, exchanges, looks, rate_per_s)

    async def _subjects(self, requests: int) -> list[str]:
        """Return the run that each request is about; none for creates."""
        if self.endpoint is Endpoint.CREATE:
            return []
        if self.endpoint is Endpoint.SNAPSHOT:
            if not self._polled:
                self._polled = await self._make_runs(POLLED_RUNS, 0)
                await self._rest(UNFINISHED)
            runs = self._polled
        else:
            runs = await self._make_runs(math.ceil(requests / SPAWNS_EACH), SPAWNS_EACH)
            await self._rest(UNFINISHED[:-1])
        return [runs[index % len(runs)] for index in range(requests)]

    async def _make_runs(self, count: int, children: int) -> list[str]:
        wire = self.workspace.create_wire(children)
        run_ids: list[str] = []
        for begin in range(0, count, AT_ONCE):
            calls = [self._client.exchange(wire) for _ in range(min(AT_ONCE, count - begin))]
            run_ids += [created(exchange) for exchange in await asyncio.gather(*calls)]
            self._known.update(run_ids)
        return run_ids

    async def _load(self, wires: Sequence[bytes], after_s: Seconds) -> tuple[list[int], list[Exchange]]:
        """Send each when it is due, and look at the queue meanwhile; return when each was due and what became of it."""
        self._over = asyncio.get_running_loop().create_future()
        begin_ns = time.monotonic_ns() + 50_000_000  # what the loop still had to do is done by then
        due_at_ns = [begin_ns + round(float(after) * 1e9) for after in after_s]
        looking = asyncio.create_task(self._watch(begin_ns))
        try:
            exchanges = await self._send_all(wires, due_at_ns)
            if self._under_way:
                await self._over
            await looking
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
        return due_at_ns, exchanges

    async def _send_all(self, wires: Sequence[bytes], due_at_ns: Sequence[int]) -> list[Exchange]:
        self._under_way, left = 0, len(wires)

        def end(_: Exchange) -> None:
            self._under_way -= 1
            if not self._under_way and not left and self._over is not None and not self._over.done():
                self._over.set_result(None)

        exchanges = []
        for index, wire in enumerate(wires):
            await _until(due_at_ns[index], give_way=index % YIELD_EVERY == 0)
            left -= 1
            if self._under_way < self._connections:
                self._under_way += 1
                exchanges.append(self._client.send(wire, end))
            else:
                unsent = Exchange(wire, end)
                unsent.outcome = Outcome.NOT_SENT
                unsent.error = f"{self._connections} requests were unanswered when this one was due"
                exchanges.append(unsent)
        return exchanges

    async def _watch(self, begin_ns: int) -> None:
        """Look at the queue from the window's begin to its end."""
        for part in range(LOOKS + 1):
            await _until(begin_ns + round((self._span.lead_s + self._span.window_s * part / LOOKS) * 1e9))
            await self._look()

    def _take_rows(
        self, due_at_ns: Sequence[int], exchanges: Sequence[Exchange], run_ids: Sequence[str], rate_per_s: float,
        trial: int, *, record: bool,
    ) -> None:  # fmt: skip
        """Read the answers and make the rows."""
        if record:
            self._recorder.plan(len(exchanges))
        for index, exchange in enumerate(exchanges):
            about = self._read(exchange, run_ids[index] if run_ids else None)
            if record:
                self._record(exchange, about, due_at_ns[index], rate_per_s, trial)

    def _waiting_parents(self, run_ids: Sequence[str], exchanges: Sequence[Exchange]) -> list[str]:
        """Return the parents that would go on waiting for a subrun."""
        if self.endpoint is not Endpoint.SPAWN:
            return []
        spawned = dict.fromkeys(run_ids, 0)
        for run_id, exchange in zip(run_ids, exchanges, strict=True):
            spawned[run_id] += exchange.outcome is Outcome.OK
        return [run_id for run_id, count in spawned.items() if count < SPAWNS_EACH]

    def _seen(
        self, due_at_ns: Sequence[int], exchanges: Sequence[Exchange], looks: Sequence[ResourceSample], rate: float
    ) -> Window:
        """Return what the window shows, from the same instants that were recorded."""
        seen = Seen(
            np.array([look.at_ns for look in looks], dtype=np.int64),
            np.array([look.queue_depth for look in looks], dtype=np.float64),
            np.array([look.oldest_due_tick_s for look in looks], dtype=np.float64),
        )
        return observe(
            np.array(due_at_ns, dtype=np.int64),
            np.array([exchange.sent_at_ns for exchange in exchanges], dtype=np.int64),
            np.array([exchange.done_at_ns for exchange in exchanges], dtype=np.int64),
            np.array([exchange.outcome is Outcome.OK for exchange in exchanges], dtype=bool),
            seen,
            self._span,
            rate,
        )


async def _until(due_at_ns: int, *, give_way: bool = False) -> None:
    """Sleep until an instant of the monotonic clock; when it has passed, let others run only if asked to."""
    late = True
    while (left_ns := due_at_ns - time.monotonic_ns()) > 0:
        late = False
        await asyncio.sleep(left_ns / 1e9)
    if late and give_way:
        await asyncio.sleep(0)
