"""Commands on quota revisions: show, propose, activate, roll back, explain; and overrides for one workspace.

Each changes something in one transaction, or nothing. What a revision is and which states it has: docs/quotas.md. A
person is named in the history by `--by`, or else by the name under which the command runs.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import getpass
import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from service.administration import explained, in_one_transaction
from service.db import Database
from service.errors import BadUsage, Invalid, PlimsollError
from service.guarded import connect_redis
from service.quota import overrides, revisions
from service.quota.guardrails import Finding
from service.quota.history import RevisionPage, RevisionView, revision_views
from service.quota.inforce import Quotas
from service.quota.limits import RATES, Limit
from service.quota.tables import LARGEST_BYTES, RateValue, RevisionFile, parse, tables_by_class, write
from service.quota.usage import MOST_HOLDERS, Holder, LimitUse, Usage, WorkspaceQuotas
from service.settings import Settings
from service.telemetry import configure_logging


class ActivationRefused(PlimsollError):
    """Guardrails refused to put a revision in force; its state is as it was, and the history says so."""


def show(settings: Settings, revision: int | None, *, as_json: bool) -> str:
    """Return a revision's table: what `propose` reads, or a table for a person. None is the one in force."""

    async def work(connection: AsyncConnection) -> revisions.Revision:
        return await (revisions.active(connection) if revision is None else revisions.find(connection, revision))

    found = in_one_transaction(settings, work)
    if as_json:
        return write(found.limits).decode()
    tables = tables_by_class(found.limits)
    lines = [
        ["limit", *tables],
        *([limit, *(_shown(table.value(limit)) for table in tables.values())] for limit in Limit),
    ]
    return f"revision {found.revision}, {found.state}\n{columns(lines)}\n"


def history(settings: Settings, most: int, *, as_json: bool) -> str:
    """Return the newest revisions with all that happened to them."""

    async def work(connection: AsyncConnection) -> list[RevisionView]:
        return await revision_views(connection, await revisions.newest(connection, most), None)

    views = in_one_transaction(settings, work)
    if as_json:
        return msgspec.json.encode(RevisionPage(views, None)).decode() + "\n"
    return "".join(_story(view) for view in views)


def propose(settings: Settings, file: str, by: str | None) -> dict[str, Any]:
    """Store what a file holds (`-`: standard input) as a revision; returns its number."""
    proposal, who = parsed_file(file), person(by)
    return {"revision": in_one_transaction(settings, lambda connection: revisions.propose(connection, proposal, who))}


def activate(settings: Settings, revision: int, by: str | None, reason: str | None, *, force: bool) -> dict[str, Any]:
    """Put a revision in force; raises ActivationRefused with what the guardrails say."""
    if force and (by is None or reason is None):
        raise BadUsage("--force needs --by and --reason: the history says who overruled the guardrails, and why")
    who = person(by)
    outcome = in_one_transaction(
        settings, lambda connection: revisions.activate(connection, revision, who, reason, force=force)
    )
    if not outcome.activated:
        raise ActivationRefused(f"revision {revision} is not activated. {_said(outcome.findings)}")
    return {"revision": revision, "replaced": outcome.replaced, **_overruled(outcome.findings)}


def shadow(settings: Settings, revision: int, by: str | None, reason: str | None) -> dict[str, Any]:
    """Have a revision asked beside the active one."""
    who = person(by)
    in_one_transaction(settings, lambda connection: revisions.shadow(connection, revision, who, reason))
    return {"revision": revision, "state": "shadow"}


def rollback(settings: Settings, by: str | None, reason: str | None) -> dict[str, Any]:
    """Put back the revision that the active one replaced."""
    who = person(by)

    async def work(connection: AsyncConnection) -> dict[str, Any]:
        outcome = await revisions.rollback(connection, who, reason)
        return {"revision": (await revisions.active(connection)).revision, "replaced": outcome.replaced}

    return in_one_transaction(settings, work)


def reject(settings: Settings, revision: int, by: str | None, reason: str | None) -> dict[str, Any]:
    """Decide against a revision."""
    who = person(by)
    in_one_transaction(settings, lambda connection: revisions.reject(connection, revision, who, reason))
    return {"revision": revision, "state": "rejected"}


def override(
    settings: Settings,
    workspace_id: uuid.UUID,
    limit: Limit,
    value: str | None,
    burst: int | None,
    by: str | None,
    reason: str | None,
    *,
    clear: bool,
    as_json: bool,
) -> dict[str, Any]:
    """Give one workspace its own value of a limit, or take that back; the value is told as JSON or for a person."""
    who = person(by)
    told = {"workspace_id": str(workspace_id), "limit": limit.value}
    if clear:
        if value is not None or burst is not None:
            raise BadUsage("--clear: goes without VALUE and --burst")
        gone = in_one_transaction(
            settings, lambda connection: overrides.clear_override(connection, workspace_id, limit)
        )
        return {**told, "cleared": gone}
    wanted = _wanted(limit, value, burst)
    in_one_transaction(
        settings, lambda connection: overrides.set_override(connection, workspace_id, limit, wanted, who, reason)
    )
    return {**told, "value": msgspec.to_builtins(wanted) if as_json else _shown(wanted)}


def explain(settings: Settings, workspace_id: uuid.UUID, *, as_json: bool) -> str:
    """Return what a workspace uses of each limit, who holds its caps, and when a retry succeeds."""
    configure_logging("error")  # a Redis that is away is part of the answer

    async def work() -> WorkspaceQuotas:
        database, client = Database(settings.database_url, pool_size=1), connect_redis(settings.redis_url)
        try:
            return await Usage(database, client).of(workspace_id, await Quotas(database).of(workspace_id))
        finally:
            await client.aclose()
            await database.close()

    try:
        use = asyncio.run(work())
    except Exception as error:
        raise explained(error) from error
    if as_json:
        return msgspec.json.encode(use).decode() + "\n"
    head = f"workspace {workspace_id}, class {use.quota_class}, revision {use.revision} in force"
    lines = [["limit", "value", "used", "left", "a retry succeeds"], *(_use(each) for each in use.limits)]
    holders = "".join(_holders(each) for each in use.limits)
    return f"{head}\n\n{columns(lines)}\n{holders}"


def parsed_file(file: str) -> RevisionFile:
    """Return what a file holds (`-`: standard input); raises BadUsage."""
    try:
        return parse(_read(file))
    except Invalid as wrong:
        raise BadUsage(f"{file}: {wrong.detail}") from None


def _read(file: str) -> bytes:
    """Return a file's bytes, a little more than may be read at most; raises BadUsage."""
    if file == "-":
        return sys.stdin.buffer.read(LARGEST_BYTES + 1)
    try:
        with Path(file).open("rb") as opened:
            return opened.read(LARGEST_BYTES + 1)
    except OSError as error:
        raise BadUsage(f"FILE: cannot read {file}: {error.strerror}") from None
    except ValueError as error:  # a path that holds U+0000
        raise BadUsage(f"FILE: cannot read it: {error}") from None


def person(by: str | None) -> str:
    """Return who acts: the name given, or the one under which the command runs."""
    if by is not None:
        try:
            return revisions.require_name(by)
        except Invalid as wrong:
            raise BadUsage(f"--{wrong.detail}") from None
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"user id {os.getuid()}"


def _wanted(limit: Limit, value: str | None, burst: int | None) -> overrides.Value:
    """Return the value that a person typed; raises BadUsage."""
    if value is None:
        raise BadUsage("VALUE: give a number, or `lifted`; or --clear")
    if limit not in RATES and burst is not None:
        raise BadUsage(f"--burst: {limit} is a cap; only rates have a burst capacity")
    if value == "lifted":
        if burst is not None:
            raise BadUsage("--burst: a lifted rate has none")
        return None
    try:
        number = msgspec.json.decode(value, type=float | int)
    except msgspec.DecodeError:
        raise BadUsage(f"VALUE: {value!r} is not a number, nor `lifted`") from None
    if limit not in RATES:
        plain: object = number
    elif burst is None:
        raise BadUsage(f"--burst: {limit} is a rate; say how many requests may come at once")
    else:
        plain = {"per_s": number, "burst": burst}
    try:
        return overrides.parse_value(limit, plain)
    except Invalid as wrong:
        raise BadUsage(f"VALUE: {wrong.detail.partition(': ')[2]}") from None


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells as aligned text."""
    widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _shown(value: RateValue | int | None) -> str:
    if isinstance(value, RateValue):
        return f"{value.per_s:g}/s, burst {value.burst}"
    return "lifted" if value is None else str(value)


def _story(view: RevisionView) -> str:
    """Tell a revision's life in lines."""
    lines = [f"revision {view.revision}: {view.state}"]
    for each in view.changes:
        replaced = "" if each.replaced is None else f", in place of {each.replaced}"
        reason = "" if each.reason is None else f": {each.reason}"
        lines.append(f"  {each.at:%Y-%m-%d %H:%M:%SZ} {each.change} by {each.by}{replaced}{reason}")
        lines += [
            f"    {finding.guardrail}{' (overruled)' if finding.forced else ''}: {finding.refusal}"
            for finding in each.findings or ()
        ]
    told = msgspec.to_builtins(view.provenance)
    lines += [f"  {name}: {value}" for name, value in told.items()]
    lines += [
        f"  as shadow, {each.limit}: asked {each.asked}, would refuse {each.refused},"
        f" of which {each.newly_refused} were admitted"
        for each in view.shadow or ()
    ]
    return "\n".join([*lines, ""])


def _use(use: LimitUse) -> list[str]:
    value = (
        "lifted" if use.value is None else f"{use.value:g}" + ("" if use.burst is None else f"/s, burst {use.burst}")
    )
    when = use.retry_when
    if when is None:
        when = "at once" if not use.retry_after_s else f"in {use.retry_after_s:.3f} s, at {use.retry_at:%H:%M:%S.%fZ}"
    own = " (its own)" if use.overridden else ""
    return [use.limit, value + own, *("?" if n is None else str(n) for n in (use.used, use.remaining)), when]


def _holders(use: LimitUse) -> str:
    """Say who holds a cap: a heading, and a line for each holder."""
    if not use.holders:
        return ""
    names = [name for name in Holder.__struct_fields__ if any(_is_told(each, name) for each in use.holders)]
    lines = [names, *([_cell(getattr(each, name)) for name in names] for each in use.holders)]
    some = f", the first {MOST_HOLDERS}" if len(use.holders) == MOST_HOLDERS else ""
    return f"\n{use.limit} is held by{some}\n{columns(lines)}\n"


def _is_told(holder: Holder, name: str) -> bool:
    """Tell whether a field says anything: most do not apply to most caps, and most who hold a place hold one."""
    return getattr(holder, name) not in (None, 1)


def _cell(value: object) -> str:
    if isinstance(value, dt.datetime):
        return f"{value:%Y-%m-%d %H:%M:%SZ}"
    return "" if value is None else str(value)


def _said(findings: Sequence[Finding]) -> str:
    """Return what guardrails said, in one line."""
    return " ".join(f"{each.guardrail}: {each.refusal}." for each in findings if not each.forced)


def _overruled(findings: Sequence[Finding]) -> dict[str, Any]:
    return {"overruled": [each.guardrail for each in findings]} if findings else {}
