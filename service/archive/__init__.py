"""Archives: bundles of finished runs, and what may be deleted from the database because of them.

A bundle is one zip file with one JSON document: a run with all its rows, as the database has them. From it the run can
be restored to the very same rows. Bundles are written, checked and read; none is ever changed or deleted.

The protocol
    checkpoint   One transaction, one snapshot (REPEATABLE READ), a batch of final runs under their row locks; rows that
                 somebody else holds are passed over, so any number of archivers share the work. Each run first gets
                 its run_archived event, by its own numbering. Then its bundle is read, that event included, so what
                 the bundle holds is what the commit will show. The file is written under a temporary name, synced,
                 renamed, its folder synced, and read back and checked. Then the RunArchive row; then the commit.
    compact      Under the row lock: the bundle that covers the run as it stands is checked anew, events of the given
                 types are deleted, and the run remembers the highest number deleted: `compacted_through_seq`.
    purge        Under the row lock: the bundle is checked anew, and the run is deleted with all its rows. Children go
                 before their parents, and no child goes before its parent has ended and is archived.
    rehydrate    A checked bundle becomes rows again, in one transaction.

Invariants
    1. A RunArchive row is committed only after its file was synced under its last name and read back.
    2. Nothing is deleted unless a bundle that holds it was read and checked in the same transaction.
    3. A run whose `archived_seq` equals its `last_seq` has a bundle of exactly what it is now.
    4. `last_seq` only grows, and is never computed from the events that are left: no number is used twice.
    5. Above `compacted_through_seq` a run's events have no gap. Whoever asks for older ones is sent to a bundle.

Failures
    Killed before the commit: nothing happened. What it left in the run's folder is swept by the next bundle of that
    run: temporary files always, a finished file without a row only when the new bundle holds all that it holds.
    Killed after the commit: done; compaction and purging are transactions of their own, found again by their rows.
    A bundle is missing or damaged: nothing is deleted on its word, and its run is archived again.

Reading order: `records` (the row), `bundle` (what is in a bundle; pure), `folder` (files), `checkpoint`, `retention`
(compact and purge), `rehydrate`, `rounds` (all of it in turn, for the command and for the worker).
"""

from __future__ import annotations

from service.archive.bundle import Bundle, Damaged
from service.archive.checkpoint import Made, create_checkpoint, create_checkpoints
from service.archive.folder import Folder, FolderFault
from service.archive.records import RunArchive, Stored, covering
from service.archive.rehydrate import rehydrate
from service.archive.retention import compact_events, parse_event_types, purge
from service.archive.rounds import Plan, Round, Rounds, Tally

__all__ = [
    "Bundle",
    "Damaged",
    "Folder",
    "FolderFault",
    "Made",
    "Plan",
    "Round",
    "Rounds",
    "RunArchive",
    "Stored",
    "Tally",
    "compact_events",
    "covering",
    "create_checkpoint",
    "create_checkpoints",
    "parse_event_types",
    "purge",
    "rehydrate",
]
