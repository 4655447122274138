"""Where one socket stands in what it follows, and what it must be pushed next.

States of a run in a tail: *behind* (the database is read, page by page, as fast as the client takes it) and *following*
(what Redis brings is pushed at once). Behind turns into following when a read finds nothing more and nothing was heard
meanwhile. Following turns into behind whenever something may be missing: a message that skips a number, a subscription
that was made anew, a look at the database that finds more than was pushed, a client whose outbox is full. What was
pushed before is dropped by its `seq`, whichever way it comes. So each event is pushed once, in order, whatever Redis
loses or repeats.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from service.events import EventType
from service.runs import FINAL, RunStatus
from service.stream.frames import APPROVALS, Happened, Topic, instant, push
from service.stream.history import PAGE, Compacted, History, rewind
from service.stream.outbox import Outbox
from service.telemetry import GAPS_FILLED

MOST_ENDED = 10_000
"""Ended runs whose last `seq` a workspace's tail remembers, against repeats."""


AT_ONCE = 64
"""Runs of a workspace that are read at the same time; their reads share queries."""


class Tail(Protocol):
    """What the hub tells a tail. None of it waits."""

    workspace_id: uuid.UUID

    def hear(self, happened: Happened) -> None:
        """Take in an event that Redis brought."""

    def doubt(self) -> None:
        """Take in that messages may have been lost."""

    def stands_at(self, run_id: uuid.UUID, last_seq: int) -> None:
        """Take in how far a run has come according to the database."""


class Overflow:
    """For how long a client has not kept up: since its outbox overflowed, until it has been sent everything again."""

    def __init__(self, patience_s: float, too_slow: Callable[[], None]) -> None:
        self._patience_s = patience_s
        self._too_slow = too_slow
        self._since_s: float | None = None  # the loop's clock

    def happens(self) -> None:
        """Take in that a live push found the outbox full."""
        if self._since_s is None:
            self._since_s = asyncio.get_running_loop().time()

    def ends(self) -> None:
        """Take in that the client has been sent everything."""
        self._since_s = None

    def check(self) -> None:
        """Give the client up when it has not kept up for too long."""
        if self._since_s is not None and asyncio.get_running_loop().time() - self._since_s >= self._patience_s:
            self._too_slow()


class RunTail:
    """One socket's place in the events of one run."""

    def __init__(
        self,
        workspace_id: uuid.UUID,
        run_id: uuid.UUID,
        since_seq: int,
        outbox: Outbox,
        history: History,
        overflow: Overflow,
    ) -> None:
        self.workspace_id = workspace_id
        self.run_id = run_id
        self.seq = since_seq
        """The last event that was pushed, or that the client said it has."""
        self._outbox = outbox
        self._history = history
        self._overflow = overflow
        self._behind = True
        self._news = asyncio.Event()
        self._news.set()

    def hear(self, happened: Happened) -> None:
        """Push the next event; read what is missing before a later one; drop one that was pushed."""
        if happened.seq <= self.seq:
            return
        if self._behind:
            self._news.set()
        elif happened.seq > self.seq + 1:
            GAPS_FILLED.inc()
            self.doubt()
        elif self._outbox.full:
            self._overflow.happens()
            self.doubt()
        else:
            self._outbox.add(happened.run_frame)
            self.seq = happened.seq

    def doubt(self) -> None:
        """Read the database before anything else is pushed."""
        self._behind = True
        self._news.set()

    def stands_at(self, run_id: uuid.UUID, last_seq: int) -> None:
        """Read what Redis did not bring."""
        self._overflow.check()
        if last_seq > self.seq:
            GAPS_FILLED.inc(not self._behind)
            self.doubt()

    async def pump(self) -> None:
        """Push from the database whenever the tail is behind, for as long as the socket lives; raises Compacted."""
        while True:
            await self._news.wait()
            await self._outbox.drained()  # a client that stalls costs no reads
            self._news.clear()
            page = await self._history.events(self.run_id, self.seq)
            for happened in page:
                if happened.seq != self.seq + 1:
                    raise RuntimeError(f"events of {self.run_id} have a gap before {happened.seq}")
                await self._outbox.put(happened.run_frame)
                self.seq = happened.seq
            if len(page) == PAGE:
                self._news.set()
            self._behind = self._news.is_set()
            if not self._behind:
                self._overflow.ends()


STARTED = (RunStatus.RUNNING, RunStatus.FAILED)
"""Statuses that only a worker's turn gives: a run whose subruns have failed may go to the second at its first turn."""


class WorkspaceTail:
    """One socket's place in all runs of a workspace: summaries, and approvals when asked for.

    First the live runs are listed, each with the `seq` that its summary includes; then every event after that is pushed
    with the summary that it leads to.
    """

    def __init__(self, workspace_id: uuid.UUID, outbox: Outbox, history: History, overflow: Overflow) -> None:
        self.workspace_id = workspace_id
        self.approvals = False
        """Whether the client asked for approvals too."""
        self._outbox = outbox
        self._history = history
        self._overflow = overflow
        self._listed_at: dt.datetime | None = None
        self._summaries: dict[uuid.UUID, dict[str, Any]] = {}  # of the live runs, as last pushed
        self._ended: OrderedDict[uuid.UUID, int] = OrderedDict()  # run -> the last `seq` that was pushed
        self._behind: dict[uuid.UUID, int] = {}  # run -> the highest `seq` that is known to exist
        self._heard: dict[uuid.UUID, int] = {}  # run that was not known -> the first `seq` that was heard of it
        self._news = asyncio.Event()

    def hear(self, happened: Happened) -> None:
        """Push a run's next event; read what is missing before a later one, and all about a run that is new."""
        summary = self._summaries.get(happened.run_id)
        follows = summary is not None and happened.seq == summary["last_seq"] + 1
        if summary is None or not follows or happened.run_id in self._behind:
            if self._pushed(happened.run_id) == 0:
                self._heard.setdefault(happened.run_id, happened.seq)
            self.stands_at(happened.run_id, happened.seq)
            return
        if self._outbox.full:
            self._overflow.happens()
            self.stands_at(happened.run_id, happened.seq)
            return
        for frame in self._frames(summary, happened):
            self._outbox.add(frame)
        self._keep(happened.run_id, summary)

    def doubt(self) -> None:
        """Nothing by itself: the hub looks at the database at once, and tells how far each run has come."""

    def stands_at(self, run_id: uuid.UUID, last_seq: int) -> None:
        """Read what is missing of a run that has come further than was pushed."""
        self._overflow.check()
        if last_seq > max(self._pushed(run_id), self._behind.get(run_id, 0)):
            self._behind[run_id] = last_seq
            self._news.set()

    def live_run_ids(self) -> Iterable[uuid.UUID]:
        """Return the runs that are live as far as was pushed: if one has ended, its end is still to be pushed."""
        return self._summaries.keys()

    async def pump(self) -> None:
        """List the live runs, then push from the database whatever is behind, for as long as the socket lives."""
        if self._listed_at is None:
            self._listed_at = await self._list()
        while True:
            await self._outbox.drained()  # a client that stalls costs no reads
            behind = list(self._behind)[:AT_ONCE]
            catching_up = (self._catch_up(run_id, self._listed_at) for run_id in behind)
            for outcome in await asyncio.gather(*catching_up, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    raise outcome
            if not self._behind:
                self._overflow.ends()
                self._news.clear()
                await self._news.wait()

    async def _list(self) -> dt.datetime:
        """Push the live runs, then how many there are; returns the instant of which that is true."""
        listing = await self._history.live(self.workspace_id)
        for summary in listing.summaries:
            run_id, seq = summary["run_id"], summary["last_seq"]
            await self._outbox.put(
                push(Topic.WORKSPACE, "run_listed", summary, seq, run_id, self.workspace_id, listing.at)
            )
            self._summaries[run_id] = summary
        count = {"live_runs": len(listing.summaries)}
        await self._outbox.put(push(Topic.WORKSPACE, "runs_listed", count, None, None, self.workspace_id, listing.at))
        return listing.at

    async def _catch_up(self, run_id: uuid.UUID, listed_at: dt.datetime) -> None:
        """Push one run's events until all that are known to exist were pushed."""
        summary = self._summaries.get(run_id) or await self._begin(run_id, listed_at)
        while summary is not None and summary["last_seq"] < self._behind[run_id]:
            try:
                page = await self._history.events(run_id, summary["last_seq"])
            except Compacted as gone:  # a summary needs no history: go on behind what was compacted
                summary.update(await self._history.summary(run_id) or summary, last_seq=gone.through_seq)
                continue
            for happened in page:
                for frame in self._frames(summary, happened):
                    await self._outbox.put(frame)
            self._keep(run_id, summary)
            if not page:  # purged
                break
        del self._behind[run_id]
        self._heard.pop(run_id, None)

    async def _begin(self, run_id: uuid.UUID, listed_at: dt.datetime) -> dict[str, Any] | None:
        """Return the summary from which a run that is not among the live ones goes on; None when nothing is to come."""
        summary = await self._history.summary(run_id)
        if summary is None:
            return None
        if run_id in self._ended:
            return {**summary, "last_seq": self._ended[run_id]}
        if summary["ended_at"] is None or dt.datetime.fromisoformat(summary["ended_at"]) >= listed_at:
            return rewind(summary)
        if run_id in self._heard:  # an ended run may have one more event: it was archived
            return {**summary, "last_seq": self._heard[run_id] - 1}
        self._keep(run_id, summary)  # it had ended before the list was read
        return None

    def _pushed(self, run_id: uuid.UUID) -> int:
        """Return the last `seq` of a run that was pushed; 0 for a run that is new."""
        summary = self._summaries.get(run_id)
        return int(summary["last_seq"]) if summary is not None else self._ended.get(run_id, 0)

    def _frames(self, summary: dict[str, Any], happened: Happened) -> list[str]:
        """Bring a summary up to an event, and return what is to be pushed for it."""
        summary["last_seq"] = happened.seq
        if happened.event_type == EventType.STATE_CHANGED:
            status = RunStatus(happened.payload["to"])
            summary["status"] = status
            if summary["started_at"] is None and status in STARTED:
                summary["started_at"] = instant(happened.created_at)
            if status in FINAL:
                summary["ended_at"] = instant(happened.created_at)
                summary["error_summary"] = happened.payload.get("reason")
        frames = [happened.frame(Topic.WORKSPACE, summary)]
        if self.approvals and happened.event_type in APPROVALS:
            frames.append(happened.frame(Topic.APPROVALS, happened.payload))
        return frames

    def _keep(self, run_id: uuid.UUID, summary: dict[str, Any]) -> None:
        """Remember how far a run was pushed; of one that has ended only that."""
        if summary["status"] not in FINAL:
            self._summaries[run_id] = summary
            return
        self._summaries.pop(run_id, None)
        self._ended[run_id] = summary["last_seq"]
        self._ended.move_to_end(run_id)
        if len(self._ended) > MOST_ENDED:
            self._ended.popitem(last=False)
