"""What a simulated worker has in place of Redis and of the quotas' tables."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from service.quota.inforce import Quotas
from service.quota.limits import Quota
from service.quota.ticks import Asked, LocalLines, Verdict
from tests.simulator.database import switch

if TYPE_CHECKING:
    from tests.simulator.stage import Stage


class PaidTurns:
    """In place of Redis: one line for all workers, that keeps count of the turns that were paid."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._lines = LocalLines(monotonic_us=lambda: round(stage.passed_s() * 1e6))
        self.paid = 0

    async def take(self, asked: Sequence[Asked]) -> tuple[list[Verdict], bool]:
        await switch()
        verdicts = [self._lines.take(each) for each in asked]
        self.paid += sum(each.returned + each.fresh for each in verdicts)
        late = sum(each.returned + each.fresh for each in asked) - sum(each.returned + each.fresh for each in verdicts)
        self._stage.seen["delayed"] += late
        await switch()
        return verdicts, False

    async def forget_lines(self, workspace_ids: Collection[uuid.UUID]) -> None:
        await switch()
        self._stage.seen["called to come at once"] += len(workspace_ids)
        for workspace_id in workspace_ids:
            self._lines.forget_line(workspace_id)

    async def promised(self, workspace_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, int]:
        """Return none: lines are compared with those who stand in them by a clock that is not the world's."""
        del workspace_ids
        return {}


class KnownQuotas(Quotas):
    """The quotas as a worker knows them, which the world decides."""

    async def read(self, workspace_ids: Iterable[uuid.UUID]) -> dict[uuid.UUID, Quota]:
        await switch()
        return {each: self._known[each][1] for each in workspace_ids}
