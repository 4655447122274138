"""A model of the service that answers only so many requests of a burst, and lists what is unfinished."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

from tests.harness.fake_service import Asked, ModelService, http

TARGETS = {
    "create": r"POST /api/runs/",
    "spawn": r"POST /api/runs/[^/]+/spawn_subrun/",
    "snapshot": r"GET /api/runs/[^/]+/snapshot/.*",
}


class LimitedService(ModelService):
    """Refuses what comes beyond `capacity` in one burst at one endpoint: its burst limit is capacity / 0.95.

    A burst begins after connections were tried with /livez. Runs end at once, but for parents that wait.
    """

    def __init__(self, endpoint: str, capacity: int) -> None:
        super().__init__(polls_to_end=1)
        self.endpoint = endpoint
        self.capacity = capacity
        self.depths: list[int] = []  # what /metrics says next; then 0
        self.unfinished: list[str] = []  # what the list of runs says until it is cancelled
        self.taken = 0
        self.bursts: list[int] = []  # how many requests of each were answered or refused
        self.on_burst: Callable[[], None] = lambda: None

    async def __call__(self, asked: Asked, writer: asyncio.StreamWriter) -> None:
        line = f"{asked.method} {asked.path}"
        if line == "GET /livez":
            self.asked.append(asked)
            if self.taken or not self.bursts:
                self.bursts.append(0)
                self.on_burst()
            self.taken = 0
            writer.write(http(200, {"status": "ok"}))
        elif re.fullmatch(TARGETS[self.endpoint], line) and self.bursts:
            self.taken += 1
            self.bursts[-1] += 1
            if self.taken > self.capacity:
                self.asked.append(asked)
                writer.write(http(503, {"error": "too many at once"}))
            else:
                await super().__call__(asked, writer)
        elif line == "GET /metrics":
            self.asked.append(asked)
            depth = self.depths.pop(0) if self.depths else 0
            text = f"plimsoll_queue_depth {depth}\nplimsoll_oldest_due_tick_seconds {depth / 10}\n"
            writer.write(http(200, text.encode()))
        elif line.startswith("GET /api/runs/?"):
            self.asked.append(asked)
            left = [run_id for run_id in self.unfinished if run_id not in self.canceled]
            runs = [{"run_id": run_id, "status": "RUNNING"} for run_id in left if "status=RUNNING" in line]
            writer.write(http(200, {"runs": runs, "next_cursor": None}))
        else:
            await super().__call__(asked, writer)
