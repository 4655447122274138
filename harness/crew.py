"""What an open loop needs of those who send for it, wherever they are.

A crew is given a `Job` each, opens connections, is told one start instant and tells what became of its arrivals until
each has told its last. `sender_process` has the crew of this machine, `cluster` one on the workers of a Dask cluster;
`openloop` knows neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from harness.errors import HarnessError
from harness.openview import Glimpse
from harness.recorder import Recorder
from harness.sender import Job, Report
from harness.tablefiles import Part

READY_S = 60.0  # for a process to start and connect on a busy machine
UNDONE = "before its part of the schedule was done"
KEPT = "what was recorded is kept"


class SenderFailed(HarnessError):
    """A sending process ended, or never began; what was recorded is kept."""

    def __init__(self, worker: int, what: str) -> None:
        super().__init__(f"sending process {worker} {what}")
        self.worker = worker
        self.what = what


class Told(msgspec.Struct, frozen=True):
    """What one sender tells at a time. Its rows are in the report, or in parts that were written where it is."""

    report: Report
    glimpse: Glimpse
    parts: list[Part] = []


class Sender(Protocol):
    """One of those who send."""

    worker: int  # from 0

    async def go(self, start_at_ns: int) -> None:
        """Tell it the instant from which the schedule counts, on the clock of this process."""

    async def stop(self) -> None:
        """Tell it to end before the schedule does."""

    async def told(self) -> Told:
        """Wait for what it tells next; raises SenderFailed when it tells no more, before its last report."""

    async def end(self) -> None:
        """See it out, willing or not."""


class Crew(Protocol):
    """Where the sending is done."""

    @property
    def start_lead_s(self) -> float:
        """How long before the first arrival the start instant must be told."""

    @property
    def shares_descriptors(self) -> bool:
        """Whether the connections count against this process's limit of open files."""

    def parameters(self) -> dict[str, Any]:
        """Return what the manifest keeps of it, nothing for the machine of its own."""

    async def muster(self, jobs: Sequence[Job], recorder: Recorder) -> Sequence[Sender]:
        """Return a sender for each job, its connections open.

        Raises ServiceUnreachable, SenderFailed or another HarnessError, and leaves nothing behind then.
        """

    async def dismiss(self) -> None:
        """Let go of where they were, after each sender's end."""
