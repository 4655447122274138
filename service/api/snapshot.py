"""The snapshot that clients poll: the run, its steps, its children, and the events since a sequence number.

All polls that wait in one turn of the loop share one query, in which PostgreSQL also builds the JSON. What was built is
kept under the version that it shows: the run's `last_seq` together with its children's, and how many groups were
decided. Every change of what a snapshot shows appends an event somewhere in that family, or decides a group whose time
is over, so a kept snapshot is right for as long as the version stands, and nothing ever expires. (Purging children
appends nothing, so the version counts the children too.) The query is told which version is kept and builds only what
has changed; for events that were compacted it answers with a bundle.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from service.api.answers import SnapshotView
from service.api.archives import events_gone
from service.api.sight import Sight
from service.api.wire import CHILDREN_JSON, EVENTS_JSON, GROUPS_JSON, RUN_JSON, STEPS_JSON
from service.archive.records import COVERING
from service.db import Database, is_outage
from service.direct import Direct
from service.errors import Gone, Invalid, NotFound
from service.events import Following
from service.exchange import Answer, Exchange, field_headers
from service.grouping import Grouping
from service.quota.gate import Gate
from service.quota.inforce import Quotas
from service.quota.limits import Limit

MOST_KEPT_BYTES = 64 << 20
"""Memory for kept snapshots, in one process: 64 MiB."""

LONGEST_WAIT_S = 30.0
"""Longest long-poll."""

LOOK_AGAIN_S = 1.0
"""How long a long-poll trusts Redis to wake it before it looks at the database by itself."""

MOST_SEQ = 2**31 - 1

READ = f"""
    SELECT q.n, r.last_seq, r.ended_at IS NOT NULL AS final, v.version,
           r.compacted_through_seq,
           CASE WHEN v.gone THEN {COVERING.format(since_seq="q.since_seq")} END AS archive_id,
           CASE WHEN NOT v.gone THEN
               json_build_object('run', {RUN_JSON}, 'steps', {STEPS_JSON}, 'events_since_seq', {EVENTS_JSON},
                                 'child_runs', {CHILDREN_JSON}, 'groups', {GROUPS_JSON}, 'last_seq', r.last_seq)::text
           END AS body
    FROM unnest($1::uuid[], $2::int[], $3::text[]) WITH ORDINALITY AS q(run_id, since_seq, kept, n)
    LEFT JOIN runs r ON r.run_id = q.run_id
    LEFT JOIN LATERAL (
        SELECT r.last_seq || CASE WHEN r.spawned_subruns = 0 THEN ''
            ELSE (SELECT '.' || coalesce(sum(c.last_seq), 0) || '.' || count(*)
                  FROM runs c WHERE c.parent_run_id = r.run_id)
              || (SELECT '.' || count(g.decided_at) FROM subrun_groups g WHERE g.run_id = r.run_id)
            END AS version, r.compacted_through_seq > q.since_seq AS gone
    ) v ON true
    WHERE v.gone OR v.version IS DISTINCT FROM q.kept
"""  # noqa: S608 - constants
"""What has changed since it was kept; a run that is kept and no longer exists has no version."""

LANES = 2
"""How many groups of polls may be under way: while one waits for its answer the next one gathers and asks."""

Asked = tuple[uuid.UUID, int]
"""A run and the sequence number after which events are wanted."""


class View(NamedTuple):
    """A snapshot as it stood at one version."""

    version: str
    last_seq: int
    final: bool
    body: bytes


class Views:
    """Reads snapshots for one process and keeps what it has built."""

    def __init__(self, database: Database) -> None:
        self._direct = Direct(database, LANES)
        self._kept: OrderedDict[Asked, View] = OrderedDict()
        self._kept_bytes = 0
        self._grouping: Grouping[Asked, View] = Grouping(
            self._read, lanes=LANES, retry_alone=lambda fault: not is_outage(fault)
        )

    async def warm(self) -> None:
        """Prepare the read before the first request."""
        await self._direct.fetch(READ, [], [], [])

    async def close(self) -> None:
        """Close the connections."""
        await self._direct.close()

    async def see(self, run_id: uuid.UUID, since_seq: int) -> View:
        """Return the snapshot as it stands now; raises NotFound, and Gone for events that were compacted."""
        return await self._grouping.submit((run_id, since_seq))

    async def _read(self, asked: Sequence[Asked]) -> Sequence[View | Exception]:
        distinct = list(dict.fromkeys(asked))
        kept = [self._kept.get(each) for each in distinct]
        changed = await self._direct.fetch(
            READ,
            [run_id for run_id, _ in distinct],
            [since_seq for _, since_seq in distinct],
            [view.version if view else None for view in kept],
        )
        seen: dict[Asked, View | Gone | None] = dict(zip(distinct, kept, strict=True))
        for row in changed:
            each = distinct[row["n"] - 1]
            if row["version"] is None:
                seen[each] = None
            elif row["body"] is None:
                seen[each] = events_gone(row["compacted_through_seq"], row["archive_id"])
            else:
                view = View(row["version"], row["last_seq"], row["final"], row["body"].encode())
                seen[each] = self._keep(each, view)
        return [seen[each] or NotFound("no such run") for each in asked]

    def _keep(self, asked: Asked, view: View) -> View:
        """Remember a view; the ones that were made longest ago make room."""
        old = self._kept.pop(asked, None)
        self._kept[asked] = view
        self._kept_bytes += len(view.body) - (len(old.body) if old else 0)
        while self._kept_bytes > MOST_KEPT_BYTES:
            _, forgotten = self._kept.popitem(last=False)
            self._kept_bytes -= len(forgotten.body)
        return view


class Snapshots:
    """The endpoint."""

    def __init__(self, views: Views, gate: Gate, quotas: Quotas, sight: Sight, following: Following) -> None:
        self._views = views
        self._gate = gate
        self._quotas = quotas
        self._sight = sight
        self._following = following

    async def get(self, exchange: Exchange[None]) -> Answer[SnapshotView]:
        """Return the snapshot, or 304 when the caller has it; with `wait`, hold the answer until there is news."""
        run_id = exchange.path_id("run_id", "run")
        since_seq, wait_s = 0, 0.0
        query = exchange.scope["query_string"]
        if query.startswith(b"since_seq=") and query[10:].isdigit():  # what nearly every poll says, and nothing else
            since_seq = _since_seq(query[10:].decode())
        elif query:
            since_seq = _since_seq(exchange.query().get("since_seq", "0"))
            wait_s = exchange.query_number("wait", 0.0, 0.0, LONGEST_WAIT_S)
        asked = time.perf_counter()
        try:  # a refusal's time too; cheaper than `timed` on the path that is polled
            facts = await self._sight.find(exchange.caller, run_id)
            quota = await self._quotas.of(facts.workspace_id)
        finally:
            exchange.db_ms = (time.perf_counter() - asked) * 1e3
        fields: dict[str, str] = {}
        if quota.rates or quota.shadow is not None:
            asked = time.perf_counter()
            try:
                fields = await self._gate.take(facts.workspace_id, quota, Limit.SNAPSHOT_POLL)
            finally:
                exchange.quota_ms = (time.perf_counter() - asked) * 1e3
        asked = time.perf_counter()
        try:
            view = await self._views.see(run_id, since_seq)
        finally:
            exchange.db_ms += (time.perf_counter() - asked) * 1e3
        if wait_s and view.last_seq <= since_seq and not view.final:
            view = await self._wait(facts.workspace_id, run_id, since_seq, wait_s)
        etag = f'"{since_seq}.{view.version}"'.encode()
        headers = ((b"etag", etag), (b"cache-control", b"private, no-cache"), *field_headers(fields))
        if exchange.has_representation(etag):
            return Answer(b"", 304, headers=headers)
        return Answer(view.body, headers=headers)

    async def _wait(self, workspace_id: uuid.UUID, run_id: uuid.UUID, since_seq: int, wait_s: float) -> View:
        """Return the view once it has an event after `since_seq` or the run is final, at the latest after `wait_s`."""
        give_up_at = asyncio.get_running_loop().time() + wait_s
        with self._following.follow(workspace_id, run_id) as bell:
            while True:
                bell.clear()
                view = await self._views.see(run_id, since_seq)
                left_s = give_up_at - asyncio.get_running_loop().time()
                if view.last_seq > since_seq or view.final or left_s <= 0 or self._following.closing:
                    return view
                try:
                    async with asyncio.timeout(min(left_s, LOOK_AGAIN_S)):
                        await bell.wait()
                except TimeoutError:
                    continue


def _since_seq(text_: str) -> int:
    if not (text_.isascii() and text_.isdigit() and len(text_) <= 10) or int(text_) > MOST_SEQ:
        raise Invalid("since_seq", f"give a whole number from 0 to {MOST_SEQ}")
    return int(text_)
