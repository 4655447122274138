"""Commands on recalibrations: hold the place of the one that measures, hand a measurement in, say how it stands.

Whoever measures takes minutes to hours, in another program (`python -m harness recalibrate`) and perhaps on another
machine. It needs nothing of the service but these commands: `quotas measuring` holds the one place for as long as its
standard input is open, so that a killed measurement is known to be dead, and `quotas recalibrate FILE` goes on from
there. The states: docs/recalibration.md. What they do to revisions: `quota.recalibration_record`.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from typing import Any, BinaryIO

import msgspec
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from service.administration import explained, in_one_transaction
from service.db import PATIENT_STATEMENT_TIMEOUT_S, Database, is_outage
from service.errors import IllegalState, PlimsollError
from service.quota import revisions
from service.quota.recalibration import Decision
from service.quota.recalibration_counts import observed_use
from service.quota.recalibration_cycle import Plan
from service.quota.recalibration_record import LEASE_S, abandon, begin, hand_in, newest, renew
from service.revising import parsed_file, person
from service.settings import Settings
from service.telemetry import configure_logging

log = structlog.get_logger()

RENEWED_EVERY_S = LEASE_S / 4
"""Pause between two signs of life: three of them may get lost."""

GIVEN_UP = b"given up"
"""What is said on standard input before it ends when nobody will go on with the measurement."""


class RecalibrationUnderWay(PlimsollError):
    """Another recalibration has not ended yet."""


def recalibrate(
    settings: Settings,
    file: str,
    by: str | None,
    plan: Plan,
    *,
    machine_worth: float | None = None,
    recalibration_id: int | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Decide on a measurement and begin to carry the decision out, or only say what it would be.

    With an id it is the measurement of the recalibration that `measuring` holds. Raises BadUsage for the file, and
    RecalibrationUnderWay.
    """
    measurement, who = parsed_file(file), person(by)
    configure_logging("error" if dry_run else settings.log_level)  # nothing is to be told of what is undone

    async def work(connection: AsyncConnection) -> dict[str, Any]:
        now = (await connection.execute(revisions.CLOCK)).scalar_one()
        usage = await observed_use(connection, now)
        taken = await hand_in(
            connection, measurement, plan, who, usage=usage, recalibration_id=recalibration_id,
            machine_worth=machine_worth,
        )  # fmt: skip
        told = {"recalibration": taken.recalibration_id, "revision": taken.revision}
        if dry_run:
            await connection.rollback()
            told = {}
        return {**told, "phase": taken.phase, **_decided(taken.decision)}

    try:
        return in_one_transaction(settings, work, PATIENT_STATEMENT_TIMEOUT_S)  # a week's runs are looked at
    except IllegalState as busy:
        raise RecalibrationUnderWay(busy.detail) from None


def stand(settings: Settings) -> dict[str, Any]:
    """Return how the newest recalibration stands; all null when there was none."""

    async def work(connection: AsyncConnection) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.to_builtins(await newest(connection))
        return found

    return in_one_transaction(settings, work)


def measuring(
    settings: Settings,
    by: str | None,
    plan: Plan,
    recalibration_id: int | None = None,
    *,
    say: Callable[[int], None],
    heard: BinaryIO | None = None,
    renewed_every_s: float = RENEWED_EVERY_S,
) -> None:
    """Hold the place of whoever measures until `heard` (default: standard input) ends; says its number.

    With an id, that recalibration is gone on with, if nobody has taken its place. Raises RecalibrationUnderWay when the
    place is somebody else's, or was lost meanwhile.
    """
    who = person(by)
    configure_logging(settings.log_level)
    try:
        asyncio.run(_hold(settings, who, plan, recalibration_id, say, heard or sys.stdin.buffer, renewed_every_s))
    except IllegalState as busy:
        raise RecalibrationUnderWay(busy.detail) from None
    except Exception as error:
        raise explained(error) from error


async def _hold(
    settings: Settings,
    who: str,
    plan: Plan,
    recalibration_id: int | None,
    say: Callable[[int], None],
    heard: BinaryIO,
    every_s: float,
) -> None:
    """Begin or go on, and give signs of life."""
    database = Database(settings.database_url, pool_size=1)
    try:
        async with database.begin() as connection:
            if recalibration_id is None:
                recalibration_id = await begin(connection, plan, who)
            else:
                await renew(connection, recalibration_id)
        say(recalibration_id)
        last_words = _until_its_end(heard)
        while (words := await _within(last_words, every_s)) is None:
            await _give_sign(database, recalibration_id)
        if words.strip() == GIVEN_UP:
            async with database.begin() as connection:
                await abandon(connection, recalibration_id)
    finally:
        await database.close()


async def _give_sign(database: Database, recalibration_id: int) -> None:
    """Renew the lease; a database that is away is tried again later, the lease is long enough for some of that."""
    try:
        async with database.begin() as connection:
            await renew(connection, recalibration_id)
    except Exception as fault:
        if not is_outage(fault):
            raise
        log.warning("the lease of a measurement was not renewed; trying again", fault=str(fault))


def _until_its_end(heard: BinaryIO) -> asyncio.Future[bytes]:
    """Return what will have been said once a stream ends; read in a thread that nobody has to wait for."""
    loop = asyncio.get_running_loop()
    said: asyncio.Future[bytes] = loop.create_future()

    def read() -> None:
        words = heard.read()
        loop.call_soon_threadsafe(said.set_result, words)

    threading.Thread(target=read, name="standard input", daemon=True).start()
    return said


async def _within(said: asyncio.Future[bytes], seconds: float) -> bytes | None:
    """Return what was said when it ends that soon, else None."""
    done, _ = await asyncio.wait([said], timeout=seconds)
    return said.result() if done else None


def _decided(decision: Decision) -> dict[str, Any]:
    """Return a decision, a value for each doubt and each rate."""
    doubts = {f"doubt about {each.guardrail}": each.refusal for each in decision.doubts}
    return {**doubts, **{move.limit.value: f"{move.outcome}: {move.reason}" for move in decision.moves}}
