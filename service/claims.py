"""Claims: how many workers take due runs without waiting for each other, in an order that is fair to workspaces.

One statement takes the runs that have been due longest, passing over rows that others hold. While a few workspaces
fill all batches, one batch is now and then that of all others, so nobody waits behind a long line of somebody else's.
What a claim means for a run, and what protects it: `tick`. Who asks: `tick.Ticker`.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import TextClause, text

from service.db import Database, rows
from service.turns import Delay

BATCH = 128
"""Most runs in one claim. Rows per second grow with the batch up to about 64 (docs/performance.md)."""

CROWD_PARTS = 4
"""A workspace that has one part in so many of a full batch crowds."""

OTHERS_EVERY_S, OTHERS_EVERY_TIMES = 0.05, 50
"""How often a batch is that of all others, while there is a crowd; and at most so that looking for them takes one part
in so many of the time, with however many workspaces."""

LONGEST_DELAY_S = 60.0
"""Longest pause before a run that could not be turned over is tried again."""

_TAKE = """
    UPDATE runs SET epoch = epoch + 1, next_tick_at = now() + make_interval(secs => :lease_s)
    FROM due WHERE runs.run_id = due.run_id
    RETURNING runs.run_id, runs.parent_run_id, runs.agent_id, runs.epoch,
              CAST(extract(epoch FROM now() - due.due_at) AS float8) AS wait_s,
              runs.status, runs.script_position, runs.tool_call_id, runs.workspace_id,
              coalesce(runs.step_due_at <= now(), false) AS pays,
              runs.delayed_under IS NOT NULL AS waited
"""
"""Raises the epoch, begins the lease, and returns the columns of `Claim` in their order."""

_CLAIM = text(f"""
    WITH due AS (
        SELECT run_id, next_tick_at AS due_at FROM runs WHERE next_tick_at <= now()
        ORDER BY next_tick_at LIMIT :most FOR NO KEY UPDATE SKIP LOCKED
    )
    {_TAKE}
""")  # noqa: S608 - our own words

_CLAIM_OTHERS = text(f"""
    WITH RECURSIVE busy AS (
        (SELECT workspace_id FROM runs WHERE ended_at IS NULL ORDER BY workspace_id LIMIT 1)
        UNION ALL
        SELECT (SELECT runs.workspace_id FROM runs WHERE ended_at IS NULL AND runs.workspace_id > busy.workspace_id
                ORDER BY runs.workspace_id LIMIT 1)
        FROM busy WHERE busy.workspace_id IS NOT NULL
    ), found AS MATERIALIZED (
        SELECT theirs.run_id FROM busy CROSS JOIN LATERAL (
            SELECT run_id FROM runs WHERE runs.workspace_id = busy.workspace_id AND ended_at IS NULL
                AND next_tick_at + interval '0' <= now() LIMIT :most
        ) AS theirs
        WHERE busy.workspace_id <> ALL(CAST(:crowds AS uuid[]))
    ), due AS (
        SELECT run_id, next_tick_at AS due_at FROM runs
        WHERE run_id = ANY(ARRAY(SELECT run_id FROM found)) AND next_tick_at <= now()
        ORDER BY next_tick_at LIMIT :most FOR NO KEY UPDATE SKIP LOCKED
    )
    {_TAKE}
""")  # noqa: S608 - our own words
"""Claims runs of other workspaces than those that crowd. It goes from one workspace with live runs to the next, and
looks at the live runs of each but those: their line is passed over, however long it is. The index of what is due, where
they stand in front, must not be used for it; hence the interval."""

_POSTPONE = text("""
    UPDATE runs SET vain_attempts = vain_attempts + 1, next_tick_at = now() + make_interval(
        secs => least(:longest_s, :lease_s * power(2, least(vain_attempts + 1, 20))))
    WHERE run_id = :run_id AND epoch = :epoch AND ended_at IS NULL
    RETURNING vain_attempts
""")
"""The delay doubles with each attempt, from two leases on. Whoever claims later has raised the epoch: then nothing is
written, and the attempt is not counted."""

_HAND_BACK = text("""
    UPDATE runs SET next_tick_at = now() + make_interval(secs => :delay_s)
    FROM json_to_recordset(CAST(:held AS json)) AS h(run_id uuid, epoch int)
    WHERE runs.run_id = h.run_id AND runs.epoch = h.epoch AND ended_at IS NULL AND next_tick_at IS NOT NULL
""")


class Claim(NamedTuple):
    """One run in this worker's hands until its lease ends."""

    run_id: uuid.UUID
    parent_run_id: uuid.UUID | None
    agent_id: uuid.UUID
    epoch: int  # what a write must find
    wait_s: float  # how long the run had been due
    status: str
    script_position: int
    tool_call_id: uuid.UUID | None  # what the run waits for, if it is a tool call
    workspace_id: uuid.UUID
    pays: bool  # its step is due, so the turn needs a token of the workspace's tick rate
    waited: bool  # its step was delayed before
    delay: Delay | None = None  # its step is put off, since there was no token


class Claims:
    """Takes due runs for one worker, and gives back what it cannot turn over."""

    def __init__(self, database: Database, lease_s: float) -> None:
        self._database = database
        self._lease_s = lease_s
        self._crowds: list[uuid.UUID] = []  # the workspaces that filled the last batch
        self._others_at_s = 0.0  # when it is the turn of all others, monotonic

    async def take(self, most: int) -> list[Claim]:
        """Take the runs that have been due longest, at most `most`, each under a lease.

        After a batch that few workspaces filled it is now and then the turn of all others.
        """
        claims = await self._claim_others(most) if self._crowds and time.monotonic() >= self._others_at_s else []
        if not claims:
            claims = await self._claim(_CLAIM, most=most)
            self._crowds = _crowds(claims) if len(claims) == most else []
        return claims

    async def hand_back(self, claims: Sequence[Claim], delay_s: float) -> None:
        """Let somebody else claim these runs after a while."""
        async with self._database.begin() as connection:
            held = rows({"run_id": claim.run_id, "epoch": claim.epoch} for claim in claims)
            await connection.execute(_HAND_BACK, {"held": held, "delay_s": delay_s})

    async def postpone(self, claim: Claim) -> int | None:
        """Make a run due later, each time twice as late.

        Returns how many attempts in a row were vain; None when the run has ended or is somebody else's by now.
        """
        asked = {
            "run_id": claim.run_id,
            "epoch": claim.epoch,
            "lease_s": self._lease_s,
            "longest_s": LONGEST_DELAY_S,
        }
        async with self._database.begin() as connection:
            attempts: int | None = (await connection.execute(_POSTPONE, asked)).scalar()
        return attempts

    async def _claim_others(self, most: int) -> list[Claim]:
        """Take runs of other workspaces than those that filled the last batch."""
        started_s = time.monotonic()
        claims = await self._claim(_CLAIM_OTHERS, most=most, crowds=self._crowds)
        ended_s = time.monotonic()
        self._others_at_s = ended_s + max(OTHERS_EVERY_S, OTHERS_EVERY_TIMES * (ended_s - started_s))
        return claims

    async def _claim(self, statement: TextClause, **asked: object) -> list[Claim]:
        async with self._database.read() as connection:
            found = await connection.execute(statement, {"lease_s": self._lease_s, **asked})
            return [Claim(*row) for row in found]


def _crowds(claims: Sequence[Claim]) -> list[uuid.UUID]:
    """Return the workspaces that have much of a batch."""
    counted = Counter(claim.workspace_id for claim in claims)
    return [workspace_id for workspace_id, count in counted.items() if count * CROWD_PARTS >= len(claims)]
