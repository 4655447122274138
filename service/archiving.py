"""The commands on bundles: `archive-runs`, one round at the prompt, and `rehydrate-run`.

What a round does is in `archive.rounds`; here is how it is asked for and told. Ctrl-C and SIGTERM end it after the
batch in hand; what is left is found by the next one.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from service.administration import explained
from service.announce import Announcer
from service.archive import Damaged, Folder, Made, Plan, Round, Tally, parse_event_types, rehydrate
from service.archive.retention import VERBOSE
from service.archive.rounds import DAY_S
from service.db import PATIENT_STATEMENT_TIMEOUT_S, Database
from service.doorbell import Doorbell
from service.errors import BadUsage
from service.events import EventType
from service.guarded import connect_redis
from service.settings import Settings
from service.telemetry import configure_logging


def plan_of(
    older_than_days: float,
    compact: bool,
    verbose_events: str | None,
    limit: int | None,
    purge_older_than_days: float | None,
) -> Plan:
    """Return what the flags ask for; raises BadUsage naming the flag."""
    if verbose_events is not None and not compact:
        raise BadUsage("--verbose-events: says what --compact deletes; give --compact too")
    types: tuple[EventType, ...] = VERBOSE if compact else ()
    if verbose_events is not None:
        try:
            types = parse_event_types(verbose_events)
        except ValueError as wrong:
            raise BadUsage(f"--verbose-events: {wrong}") from None
    purge_older_than_s = None if purge_older_than_days is None else purge_older_than_days * DAY_S
    return Plan(older_than_days * DAY_S, types, purge_older_than_s, limit)


def archive_runs(
    settings: Settings,
    plan: Plan,
    *,
    as_json: bool,
    write: Callable[[str], object],
    complain: Callable[[str], object],
) -> Tally:
    """Run one round; each bundle is written once it is committed: a line with its path, or an item of one JSON object.

    `complain` is told each fault as one sentence. Raises FolderFault and what says that the database is down.
    """
    configure_logging("error")  # announcements that Redis did not take are nobody's concern here
    separator = '{"archives": ['

    def tell(made: Made) -> None:
        nonlocal separator
        path = str(settings.archive_dir / made.path)
        if as_json:
            item = {"archive_id": str(made.archive_id), "run_id": str(made.run_id), "path": path}
            write(separator + json.dumps({**item, "sha256": made.sha256, "size_bytes": made.size_bytes}))
            separator = ", "
        else:
            write(f"{path}\n")

    tally = Tally()
    try:
        asyncio.run(_run_round(settings, plan, tally, tell, complain))
    except Exception as error:
        raise explained(error) from error
    finally:
        if as_json:
            opening = separator if separator.startswith("{") else ""
            write(f"{opening}], {json.dumps(asdict(tally))[1:]}\n")
    return tally


async def _run_round(
    settings: Settings,
    plan: Plan,
    tally: Tally,
    archived: Callable[[Made], object],
    complain: Callable[[str], object],
) -> None:
    """Run one round on connections of its own."""
    database, client = (
        Database(settings.database_url, pool_size=1, statement_timeout_s=PATIENT_STATEMENT_TIMEOUT_S),
        connect_redis(settings.redis_url),
    )
    announcer = Announcer(client, Doorbell(settings.redis_url))
    round_ = Round(
        database,
        Folder(settings.archive_dir),
        plan,
        announcer=announcer,
        archived=archived,
        complain=complain,
        tally=tally,
    )
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, round_.stop)
    try:
        await round_.run()
    finally:
        await client.aclose()
        await database.close()


def restore_run(settings: Settings, file: Path) -> dict[str, Any]:
    """Rehydrate the run whose bundle is in a file; returns its id. Raises BadUsage for a file that holds none."""

    async def run() -> dict[str, Any]:
        database = Database(settings.database_url, pool_size=1, statement_timeout_s=PATIENT_STATEMENT_TIMEOUT_S)
        try:
            return {"run_id": str(await rehydrate(database, Folder(settings.archive_dir), file))}
        finally:
            await database.close()

    try:
        return asyncio.run(run())
    except Damaged as reason:
        raise BadUsage(f"FILE: {reason}") from None
    except Exception as error:
        raise explained(error) from error
