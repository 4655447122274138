"""A revision as it is told, with all that happened to it: over HTTP, by the command, in a report.

Everybody with a token may read which values are and were in force. Who decided, why, on which machine, and what a
shadow counted over all workspaces is the installation's business: such fields are null for the token of a workspace.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from service.auth import Caller
from service.quota.revisions import Happened, Revision, State, changes
from service.quota.shadow import ShadowCount, shadow_counts
from service.quota.tables import Provenance, Tables


class RevisionView(msgspec.Struct, frozen=True):
    """A revision with its history."""

    revision: int
    state: State
    limits: Tables
    provenance: Provenance  # of which a workspace's token sees neither author nor note nor machine
    proposed_at: dt.datetime
    changes: list[Happened]  # oldest first
    shadow: list[ShadowCount] | None  # what it would have refused while it was the shadow, by limit


class RevisionPage(msgspec.Struct, frozen=True):
    """Revisions, newest first."""

    revisions: list[RevisionView]
    next_before: int | None  # `before` of the page that follows; null on the last one


async def revision_views(
    connection: AsyncConnection, found: Sequence[Revision], caller: Caller | None
) -> list[RevisionView]:
    """Return revisions with their history as a caller may see them; without a caller, as the installation does."""
    in_full = caller is None or caller.workspace_id is None
    numbers = [each.revision for each in found]
    happened = await changes(connection, numbers)
    counted = await shadow_counts(connection, numbers) if in_full else {}
    return [
        RevisionView(
            each.revision,
            each.state,
            each.limits,
            each.provenance if in_full else _for_tenants(each.provenance),
            each.proposed_at,
            [one if in_full else _without_names(one) for one in happened[each.revision]],
            counted[each.revision] if in_full else None,
        )
        for each in found
    ]


def _without_names(happened: Happened) -> Happened:
    return msgspec.structs.replace(happened, by=None, reason=None, findings=None)


def _for_tenants(provenance: Provenance) -> Provenance:
    measured = {limit: msgspec.structs.replace(each, machine={}) for limit, each in provenance.measured.items()}
    return msgspec.structs.replace(provenance, author=None, note=None, machine={}, measured=measured)
