"""The rates' campaign: `make bench-quota` holds the service to docs/rates.md and writes docs/evidence/quota-rates.md.

Two HTTP processes and a worker on real PostgreSQL and Redis, four processes of clients. A cell is a rate, a behaviour
(`quota_audit.Behaviour`) and a number of clients, in a workspace of its own under the default quota. Cells run side by
side, in three rounds of 65 seconds. Then `quota_audit` judges what Redis saw (`quota_trace`) and what the clients were
told. Exit code 1 when anything was not kept, or not shown. Nothing is asserted about speed.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec

from service.auth import issue_token
from service.db import Database, migrate
from service.embedded import Stack
from service.quota.limits import DEFAULT, Limit
from service.settings import settings_for
from service.workspaces import create_agent, create_workspace
from tests.campaigns.flags import Flags
from tests.campaigns.quota_audit import Behaviour, Cell, Told
from tests.campaigns.quota_clients import Member, Plan
from tests.campaigns.quota_rates_report import Measured, page
from tests.campaigns.quota_trace import Trace, monitoring, read_traces
from tests.campaigns.servers import figure, running

PAGE = Path("docs/evidence/quota-rates.md")

HTTP_PROCESSES, WORKERS, CLIENT_PROCESSES = 2, 1, 4
CLIENTS = (1, 4, 16, 64)
DURATION_S, LEAST_S = 65.0, 60.0
SETTLE_S = 3.0  # for client processes to start
LIMITS = (Limit.RUN_CREATION, Limit.SUBRUN_SPAWN, Limit.SNAPSHOT_POLL)


class Shape(NamedTuple):
    """What a cell measures."""

    limit: Limit
    behaviour: Behaviour
    clients: int


ROUNDS = [
    [Shape(limit, Behaviour.GREEDY, n) for limit in (Limit.RUN_CREATION, Limit.SUBRUN_SPAWN) for n in CLIENTS],
    [Shape(Limit.SNAPSHOT_POLL, Behaviour.GREEDY, n) for n in CLIENTS],
    [
        *(Shape(limit, Behaviour.STEADY, n) for limit in LIMITS for n in CLIENTS),
        *(Shape(limit, Behaviour.OBEDIENT, 1) for limit in LIMITS),
    ],
]
"""What runs side by side: not all of it, or two cores would be busy with the clients alone."""


class Place(NamedTuple):
    """Where a cell's requests go."""

    workspace_id: uuid.UUID
    method: str
    path: str
    token: str
    body: str | None


async def make_place(http: httpx.AsyncClient, database: Database, limit: Limit) -> Place:
    """Make a workspace and, for spawns and snapshots, a run in it that stays for the whole measurement."""
    async with database.begin() as connection:
        workspace_id = await create_workspace(connection, "rates", "default")
        agent_id = await create_agent(connection, workspace_id, "agent")
        token = (await issue_token(connection, workspace_id, "OPERATOR")).token
    create = {"workspace_id": str(workspace_id), "agent_id": str(agent_id)}
    if limit is Limit.RUN_CREATION:
        return Place(workspace_id, "POST", "/api/runs/", token, msgspec.json.encode(create).decode())
    lasting = {**create, "expected_subruns": 10_000, "max_wait_seconds": 3600}
    answer = await http.post("/api/runs/", json=lasting, headers={"authorization": f"Bearer {token}"})
    run = f"/api/runs/{answer.raise_for_status().json()['run_id']}"
    if limit is Limit.SUBRUN_SPAWN:
        return Place(workspace_id, "POST", f"{run}/spawn_subrun/", token, "{}")
    return Place(workspace_id, "GET", f"{run}/snapshot/", token, None)


def plans(
    url: str, places: Sequence[Place], shapes: Sequence[Shape], start_at_s: float, duration_s: float
) -> list[Plan]:
    """Deal the clients of all cells out to the processes, those of one cell to different ones."""
    made = [Plan(url, start_at_s, duration_s, []) for _ in range(CLIENT_PROCESSES)]
    for cell, (place, shape) in enumerate(zip(places, shapes, strict=True)):
        rate = DEFAULT.rates[shape.limit]
        for index in range(shape.clients):
            made[(cell + index) % CLIENT_PROCESSES].members.append(
                Member(
                    cell, shape.behaviour, index, shape.clients, float(rate.per_s), rate.burst, shape.limit,
                    place.method, place.path, place.token, place.body,
                )
            )  # fmt: skip
    return made


def run_clients(made: Sequence[Plan]) -> dict[int, Told]:
    """Run one process for each plan; returns what the clients of each cell were told."""
    command = [sys.executable, "-m", "tests.campaigns.quota_clients"]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603 - our own
        for _ in made
    ]
    for process, plan in zip(processes, made, strict=True):
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(plan))
        process.stdin.close()
    told: dict[int, Told] = {}
    for process in processes:
        assert process.stdout is not None
        output = process.stdout.read()
        if process.wait() != 0:
            raise RuntimeError(f"a process of clients ended with {process.returncode}")
        for cell, one in msgspec.json.decode(output, type=dict[int, Told]).items():
            told.setdefault(cell, Told()).add(one)
    return told


async def make_places(url: str, database_url: str, shapes: Sequence[Shape]) -> list[Place]:
    """Make every cell's workspace."""
    database = Database(database_url)
    async with httpx.AsyncClient(base_url=url, timeout=30) as http:
        places = [await make_place(http, database, shape.limit) for shape in shapes]
    await database.close()
    return places


def measure(folder: Path, rounds: Sequence[Sequence[Shape]], duration_s: float) -> tuple[list[Cell], int]:
    """Run the rounds on a stack in the folder; returns the cells, and how many requests were decided without Redis."""
    cells: list[Cell] = []
    with Stack(folder / "stack") as stack:
        assert stack.redis is not None
        migrate(stack.database_url)
        with running(settings_for(stack.database_url, stack.redis_url), HTTP_PROCESSES, WORKERS) as url:
            for shapes in rounds:
                tell(f"{len(shapes)} cells side by side for {duration_s:g} s")
                places = asyncio.run(make_places(url, stack.database_url, shapes))
                with monitoring(stack.redis.socket, folder / "monitor"):
                    told = run_clients(plans(url, places, shapes, time.monotonic() + SETTLE_S, duration_s))
                cells += cells_of(folder / "monitor", places, shapes, told)
            without_redis = figure(url, "plimsoll_rates_local_total")
    return cells, int(without_redis)


def cells_of(monitor: Path, places: Sequence[Place], shapes: Sequence[Shape], told: dict[int, Told]) -> list[Cell]:
    """Put together what Redis saw and what the clients were told."""
    with monitor.open("rb") as lines:
        traces = read_traces(lines)
    cells = []
    for number, (place, shape) in enumerate(zip(places, shapes, strict=True)):
        rate = DEFAULT.rates[shape.limit]
        trace = traces.get((str(place.workspace_id), shape.limit), Trace())
        cells.append(Cell(*shape, rate.per_s, rate.burst, trace, told[number]))
    return cells


def main() -> int:
    """Run the campaign on a stack of its own, write the page, and return the exit code."""
    parser = Flags("quota_rates", __doc__)
    parser.add_argument("--seconds", type=float, default=DURATION_S, help="how long each cell lasts, seconds")
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write what was found")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="plimsoll-rates-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # PostgreSQL's user passes through it when this runs as root
        cells, without_redis = measure(folder, ROUNDS, arguments.seconds)
    measured = Measured(cells, min(LEAST_S, arguments.seconds - 3), without_redis)
    arguments.page.write_text(page(measured), encoding="utf-8")
    for sentence in measured.faults():
        tell(sentence)
    tell(f"{arguments.page}: {'; '.join(measured.verdicts())}")
    return 0 if measured.passed else 1


def tell(line: str) -> None:
    """Say what is going on."""
    sys.stdout.write(f"bench-quota: {line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
