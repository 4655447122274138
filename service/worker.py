"""One worker process: wakes when something is due, and has it turned over until nothing is left.

Three things wake it: a ring (Huey's consumer thread answers it), the instant at which the database says that the next
run is due, and the sweep: at the latest after `sweep_interval_s` it looks for itself. So a lost ring costs at most that
long, and a scripted latency is kept to the millisecond. One batch is claimed at a time; up to two are being settled
meanwhile, which keeps PostgreSQL busy while Python decides. Runs that wait for a tool or a model are taken out of their
batch into a lane of their own, so that nobody waits behind them.

Beside its ticks a worker has chores (`chores`): a round of archiving when it starts, and one a day when the doorbell
says so (`archive.rounds`); once a minute a look after the recalibration of the quotas that is under way, if one is
(`quota.recalibration_looks`), and whether the next one is due (`schedule`).

SIGTERM, SIGINT and SIGHUP drain: nothing more is claimed, what is in hand is settled, and the process ends with 0,
within ten seconds; a second SIGINT leaves what is in hand to others. What a tick is, and why a killed worker loses
nothing: `tick`.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from contextlib import suppress

import structlog
import uvloop

from service.announce import Announcer
from service.archive import Rounds
from service.backstop import Backstop
from service.claims import BATCH, Claim
from service.conduct import calm_collector, heeds_hangup
from service.db import Database, is_outage
from service.doorbell import Doorbell
from service.due import next_due_in_s
from service.guarded import connect_redis
from service.outside import Outside
from service.quota.gate import Gate
from service.quota.inforce import Quotas
from service.quota.rates import Rates
from service.quota.recalibration_looks import Looks
from service.quota.shadow import ShadowTally
from service.quota.ticks import LocalLines, TickRates
from service.readiness import tell_ready
from service.schedule import Schedule
from service.settings import Settings
from service.tallies import Tallies
from service.telemetry import configure_logging
from service.tick import Ticker
from service.workspaces import Agents

log = structlog.get_logger()

LANES = 2
"""Batches being settled at the same time."""

UNHEARD_REST_S = 0.1
"""Longest time between two looks while Redis is away and nobody can ring: a run that waits for the sweep holds a slot
of its workspace's caps meanwhile, so that tenants within their rates would be refused for it."""

SHORTEST_REST_S = 0.005
"""Pause before looking again for due runs whose rows somebody else holds locked at this moment."""

FIRST_RETRY_S, LONGEST_RETRY_S = 0.1, 2.0
"""Pauses while the database is away: the first one, and the longest that doubling leads to."""

MOST_OUTSIDE = 256
"""Tools and models that one worker waits for at the same time. They hold no connection to the database."""

FULL_LANE_DELAY_S = 1.0
"""When a run is due again that found the outside lane full."""

DRAIN_S = 7.0
"""How long a stopping worker waits for the batches in its hands; after that their leases take over."""

CANCEL_S = 0.8
"""How long it then waits for what it leaves to be told so: a tool's row says that it was interrupted."""

ROUND_DRAIN_S = 1.0
"""How long a stopping worker waits, after its batches, for what it is archiving; after that it is undone."""


def run(settings: Settings) -> int:
    """Work until told to stop; returns the process's exit code."""
    configure_logging(settings.log_level)
    with calm_collector(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_work(settings))
    return 0


class Worker:
    """Turns due runs over, as long as it is not told to stop."""

    def __init__(
        self,
        database: Database,
        ticker: Ticker,
        sweep_interval_s: float,
        is_unheard: Callable[[], bool] = lambda: False,
    ) -> None:
        self._database = database
        self._ticker = ticker
        self._sweep_interval_s = sweep_interval_s
        self._is_unheard = is_unheard
        self._bell = asyncio.Event()
        self.stopping = False
        self._settling: set[asyncio.Task[None]] = set()
        self._outside: set[asyncio.Task[None]] = set()

    def ring(self) -> None:
        """Look for due runs; to be called in the loop's own thread."""
        self._bell.set()

    def stop(self) -> None:
        """Claim nothing more."""
        self.stopping = True
        self._bell.set()

    def hurry(self) -> None:
        """Leave what is in hand: leases take over, and a tool that runs is recorded as interrupted."""
        for task in (*self._settling, *self._outside):
            task.cancel()

    async def work(self) -> None:
        """Claim and settle until told to stop, then finish what is in hand."""
        retry_s = FIRST_RETRY_S
        while not self.stopping:
            # Cleared before looking: what becomes due during the look rings again.
            self._bell.clear()
            try:
                claims = await self._ticker.claim()
                rest_s = None if claims else await self._rest_s()
                retry_s = FIRST_RETRY_S
            except Exception as fault:
                _log_fault("looking for due runs failed; trying again", fault)
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, LONGEST_RETRY_S)
                continue
            if rest_s is None:
                await self._hand_over(claims)
            else:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._bell.wait(), rest_s)
        await self._drain()

    async def _rest_s(self) -> float:
        """Return for how long nothing will be due, unless somebody rings."""
        async with self._database.read() as connection:
            due_in_s = await next_due_in_s(connection)
        longest_s = min(self._sweep_interval_s, UNHEARD_REST_S) if self._is_unheard() else self._sweep_interval_s
        longest_s = min(longest_s, self._ticker.rest_s())
        return max(longest_s if due_in_s is None else min(due_in_s, longest_s), SHORTEST_REST_S)

    async def _hand_over(self, claims: list[Claim]) -> None:
        """Settle a batch in the background, as soon as one of the lanes is free."""
        while len(self._settling) >= LANES:
            await asyncio.wait(self._settling, return_when=asyncio.FIRST_COMPLETED)
        task = asyncio.create_task(self._settle(claims))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def _settle(self, claims: list[Claim]) -> None:
        try:
            at_once, outside = await self._ticker.part(claims)
            room = MOST_OUTSIDE - len(self._outside)
            for claim in outside[:room]:
                task = asyncio.create_task(self._settle_outside(claim))
                self._outside.add(task)
                task.add_done_callback(self._outside.discard)
            if outside[room:]:
                await self._ticker.hand_back(outside[room:], FULL_LANE_DELAY_S)
            if at_once:
                await self._ticker.settle(at_once, await self._ticker.outcomes(at_once), ring=len(claims) == BATCH)
        except Exception as fault:
            _log_fault("a batch was not written; its runs are due again when their leases end", fault)
        self._bell.set()  # what was written may be due at once, or sooner than what was known before

    async def _settle_outside(self, claim: Claim) -> None:
        """Wait for one run's tool or model, and settle its turn; nobody else waits for it."""
        try:
            await self._ticker.settle([claim], await self._ticker.outcomes([claim]))
        except Exception as fault:
            if is_outage(fault):
                _log_fault("a turn was not written; its run is due again when its lease ends", fault)
            else:
                await self._postpone(claim, fault)
        self._bell.set()

    async def _postpone(self, claim: Claim, fault: Exception) -> None:
        try:
            await self._ticker.postpone(claim, fault)
        except Exception as further:
            _log_fault("a run was not postponed; it is due again when its lease ends", further)

    async def _drain(self) -> None:
        if self._settling or self._outside:
            _, late = await asyncio.wait({*self._settling, *self._outside}, timeout=DRAIN_S)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=CANCEL_S)


async def _work(settings: Settings) -> None:
    """Put one worker together, run it, and take it apart."""
    loop = asyncio.get_running_loop()
    database = Database(settings.database_url, pool_size=LANES + 4)  # a few more for the outside lane
    client = connect_redis(settings.redis_url)
    doorbell = Doorbell(
        settings.redis_url,
        answer=lambda: loop.call_soon_threadsafe(worker.ring),
        archive=lambda: loop.call_soon_threadsafe(rounds.ring),
        recalibrate=lambda: loop.call_soon_threadsafe(each_minute),
    )
    announcer = Announcer(client, doorbell)
    rounds, looks, schedule = Rounds(settings, announcer), Looks(settings.database_url), Schedule(settings)
    outside = Outside(database, settings.lease_s, settings)
    tally, tallies = ShadowTally(database), Tallies()
    gate = Gate(Rates(client), client, tally)
    tick_rates = TickRates(client, LocalLines(settings.redis_away_rate_percent))
    backstop = Backstop(database, Quotas(database), tick_rates, tallies, gate)
    ticker = Ticker(database, announcer, Agents(), tallies, settings.lease_s, outside, backstop, tally)
    worker = Worker(database, ticker, settings.sweep_interval_s, announcer.is_unheard)

    def each_minute() -> None:
        looks.ring()
        schedule.ring()

    def stop(signum: signal.Signals) -> None:
        if worker.stopping and signum is signal.SIGINT:
            worker.hurry()
        worker.stop()
        rounds.stop()
        looks.stop()
        schedule.stop()

    signals = [signal.SIGTERM, signal.SIGINT]
    if heeds_hangup():
        signals.append(signal.SIGHUP)
    stop_listening = doorbell.listen()
    for signum in signals:
        loop.add_signal_handler(signum, stop, signum)
    log.info("worker ready")
    tell_ready()
    rounds.ring()
    each_minute()
    await worker.work()
    # Together: Huey's thread may take as long to end as all the rest, and ten seconds are promised for the whole.
    drains = [each.drain(ROUND_DRAIN_S) for each in (rounds, looks, schedule)]
    await asyncio.gather(*drains, asyncio.to_thread(stop_listening))
    await outside.close()
    await gate.drain()
    await tally.close()
    await client.aclose()
    await database.close()
    log.info("worker stopped")
    for signum in signals:  # one more Ctrl-C would only spoil the exit code
        loop.remove_signal_handler(signum)
        signal.signal(signum, signal.SIG_IGN)


def _log_fault(message: str, fault: Exception) -> None:
    """Log an outage in one line, and anything else, which is a bug, with its traceback."""
    if is_outage(fault):
        log.warning(message, fault=str(getattr(fault, "orig", fault)))  # without the statement's text
    else:
        log.error(message, exc_info=fault)
