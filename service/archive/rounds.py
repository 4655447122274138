"""A round: every run that is due is archived, then compacted, then purged, batch by batch until nothing is left.

The command runs one round; a worker runs one when it starts and one a day, when the doorbell's periodic task rings. A
round keeps nothing in memory but its place, and any number of rounds may go on at once: each finds its work in the
database and passes over what another has in hand.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import structlog

from service.announce import Announcer
from service.archive.checkpoint import BATCH, START, Cursor, Made, Unbundled, create_checkpoints
from service.archive.folder import At, Folder, FolderFault, unwatched
from service.archive.retention import NOTHING, Deleted, compact_events, parse_event_types, purge
from service.chores import Chore
from service.db import PATIENT_STATEMENT_TIMEOUT_S, Database
from service.errors import ConfigurationError
from service.events import EventType
from service.settings import Settings

log = structlog.get_logger()

DAY_S = 86_400.0


class Plan(NamedTuple):
    """What a round does."""

    older_than_s: float  # runs are archived and compacted when they ended at least so long ago
    compact: Sequence[EventType] = ()  # types of events to delete; none: nothing is deleted
    purge_older_than_s: float | None = None  # runs are deleted when they ended at least so long ago; None: none is
    limit: int | None = None  # most runs archived, most compacted and most purged; None: all


@dataclass
class Tally:
    """What a round did."""

    archived: int = 0  # bundles made
    compacted: int = 0  # runs whose events of the given types are gone
    deleted_events: int = 0  # by compaction
    purged: int = 0  # runs deleted
    faults: int = 0  # runs that could not be archived, and bundles that could not be relied on


_DeleteBatch = Callable[[Cursor], Awaitable[Deleted]]
"""Compacts or purges one batch from a place on."""


class Round:
    """One round. `archived` is told each bundle once it is committed, `complain` each fault; `tally` counts them."""

    def __init__(
        self,
        database: Database,
        folder: Folder,
        plan: Plan,
        *,
        announcer: Announcer | None = None,
        archived: Callable[[Made], object] = lambda _: None,
        complain: Callable[[str], object] = lambda _: None,
        tally: Tally | None = None,
        at: At = unwatched,
    ) -> None:
        self.tally = tally or Tally()
        self._database = database
        self._folder = folder
        self._plan = plan
        self._announcer = announcer
        self._archived = archived
        self._complain = complain
        self._at = at
        self._stopping = False

    def stop(self) -> None:
        """End after the batch in hand."""
        self._stopping = True

    async def run(self) -> Tally:
        """Do all of it; raises FolderFault when the archive folder cannot be used."""
        await self._archive()
        if self._plan.compact:
            await self._pass_over(self._compact)
        while await self._pass_over(self._purge):  # children first, so their parents come with the next pass
            continue
        return self.tally

    def _left(self, done: int) -> int:
        """Return how many runs the next batch may take."""
        if self._stopping:
            return 0
        return BATCH if self._plan.limit is None else min(BATCH, self._plan.limit - done)

    async def _archive(self) -> None:
        cursor, skipped = START, list[uuid.UUID]()
        while most := self._left(self.tally.archived):
            try:
                batch = await create_checkpoints(
                    self._database,
                    self._folder,
                    self._plan.older_than_s,
                    most=most,
                    after=cursor,
                    skipped=skipped,
                    at=self._at,
                )
            except Unbundled as fault:
                skipped.append(fault.run_id)
                self._tell_fault(str(fault))
                continue
            if not batch.made or batch.created_at is None:
                return
            cursor = batch.cursor
            self.tally.archived += len(batch.made)
            if self._announcer is not None:
                await self._announcer.announce(batch.events, batch.created_at, due=False)
            for made in batch.made:
                self._archived(made)

    async def _pass_over(self, delete_batch: _DeleteBatch) -> bool:
        """Go through the runs once, in the order of their ends; tell whether anything was deleted."""
        cursor: Cursor | None = START
        anything = False
        while cursor is not None:
            deleted = await delete_batch(cursor)
            cursor = deleted.cursor
            anything = anything or bool(deleted.run_ids)
            for sentence in deleted.damaged:
                self._tell_fault(sentence)
        return anything

    async def _compact(self, after: Cursor) -> Deleted:
        if not (most := self._left(self.tally.compacted)):
            return NOTHING
        deleted = await compact_events(
            self._database,
            self._folder,
            self._plan.compact,
            self._plan.older_than_s,
            most=most,
            after=after,
            at=self._at,
        )
        self.tally.compacted += len(deleted.run_ids)
        self.tally.deleted_events += deleted.event_count
        return deleted

    async def _purge(self, after: Cursor) -> Deleted:
        most = self._left(self.tally.purged)
        if self._plan.purge_older_than_s is None or not most:
            return NOTHING
        deleted = await purge(
            self._database, self._folder, self._plan.purge_older_than_s, most=most, after=after, at=self._at
        )
        self.tally.purged += len(deleted.run_ids)
        return deleted

    def _tell_fault(self, sentence: str) -> None:
        self.tally.faults += 1
        self._complain(sentence)


class Rounds(Chore):
    """A worker's rounds, one at a time, in the background of its ticks."""

    def __init__(self, settings: Settings, announcer: Announcer) -> None:
        """Take the plan from the settings; raises ConfigurationError naming the variable."""
        try:
            compact = parse_event_types(settings.archive_compact_events)
        except ValueError as wrong:
            raise ConfigurationError(f"PLIMSOLL_ARCHIVE_COMPACT_EVENTS: {wrong}") from None
        super().__init__("archive round", "archive round given up", "the next one finds the same work")
        self._plan = Plan(settings.archive_after_days * DAY_S, compact)
        self._settings = settings
        self._announcer = announcer
        self._round: Round | None = None

    def stop(self) -> None:
        """Begin nothing more, and end the round that is going on after its batch."""
        super().stop()
        if self._round is not None:
            self._round.stop()

    async def _do(self) -> None:
        """Run one round on a connection of its own, which no tick waits for."""
        database = Database(self._settings.database_url, pool_size=1, statement_timeout_s=PATIENT_STATEMENT_TIMEOUT_S)
        try:
            self._round = Round(
                database,
                Folder(self._settings.archive_dir),
                self._plan,
                announcer=self._announcer,
                complain=lambda sentence: log.error("archive fault", fault=sentence),
            )
            if self._stopping:
                self._round.stop()
            tally = await self._round.run()
            log.info("archive round done", **asdict(tally))
        except FolderFault as fault:
            log.error("archive round given up", fault=str(fault))
        finally:
            await database.close()
