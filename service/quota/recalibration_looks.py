"""A worker's looks at the recalibration that is under way: one at a time, in the background of its ticks.

Any number of workers may look at the same time: a turn is one transaction under the lock of all revisions, and whoever
comes second finds that it was taken (`recalibration_record`).
"""

from __future__ import annotations

from service.chores import Chore
from service.db import PATIENT_STATEMENT_TIMEOUT_S, Database
from service.quota.recalibration_record import forget_counts, look


class Looks(Chore):
    """Looks, one at a time."""

    def __init__(self, database_url: str) -> None:
        super().__init__(
            "look after recalibration", "a recalibration was not looked after", "the next look finds it as it is"
        )
        self._database_url = database_url

    async def _do(self) -> None:
        """Take turns until none is due, on a connection of its own, which no tick waits for."""
        database = Database(self._database_url, pool_size=1, statement_timeout_s=PATIENT_STATEMENT_TIMEOUT_S)
        try:
            while not self._stopping and await look(database) is not None:
                continue
            await forget_counts(database)
        finally:
            await database.close()
