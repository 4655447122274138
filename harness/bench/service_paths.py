"""The service's paths, each asked for as fast as one serve process answers, with every feature on.

A workspace of the class without limits, a token that is looked up, events, Server-Timing; no worker beside it, whose
work would be measured as the paths'. What is asked for:

    create     POST /api/runs/, one body again and again
    spawn      POST .../spawn_subrun/, on parents accepted just before; none gets more than `CHILDREN_MAX` children
    warm       GET .../snapshot/ of a few finished runs that were read before
    304        the same with If-None-Match
    cold       GET .../snapshot/ of finished runs of which the process knows nothing: each is read once and never again

The finished runs are copies of one that a worker really finished, made in the database: the same rows under new ids.
"""

from __future__ import annotations

import asyncio
import http.client
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import msgspec

from harness.api import Api, CreateAnswer, Workspace
from harness.bench.load import Load, LoadFailed, run_load
from harness.bench.results import Repeat, repeat_of
from harness.bench.stage import Process, Stage, administer
from harness.client import Client

SERVE = ["service", "serve", "--port", "0"]
WORKER = ["service", "worker"]
SCRIPT = [{"kind": "PLAN"}, {"kind": "MODEL_CALL"}, {"kind": "OBSERVATION"}]  # a snapshot of 3 steps and 6 events
CHILDREN_MAX = 4  # what an ordinary workspace allows a parent at once
SPAWNS_PER_S_MAX = 4_000  # parents are accepted for so many; a faster service ends the cell early, which is no fault
COLD_PER_S_MAX = 2_000  # likewise: copies made for each second of a cold cell
WARM_RUNS = 64
FINISH_S = 30.0  # for a worker to finish one run


class ServicePaths:
    """One serve process on a database of its own, and what its paths need."""

    def __init__(self, stage: Stage, process: Process, workspace: Workspace, database_url: str) -> None:
        self._stage = stage
        self._workspace = workspace
        self._database_url = database_url
        self._host, self._port = process.address
        self._unread: Iterator[str] = iter(())
        self._warm: list[bytes] = []
        self._conditional: list[bytes] = []
        self.document = b"{}"  # a snapshot's body

    @property
    def create_wire(self) -> bytes:
        """The bytes of a create."""
        return self._workspace.create_wire(0)

    def finish_runs(self, environment: dict[str, str], cold: int) -> None:
        """Let a worker finish one run, copy it, and read the copies that shall be warm; `cold` are left unread."""
        (body,) = self._post("a first create", [self.create_wire], 1, 1)
        run_id = msgspec.json.decode(body, type=CreateAnswer).run_id
        with Process(WORKER, environment, listens=False) as worker:
            self._wait_for(worker, run_id)
        copies = self._copies(run_id, WARM_RUNS + cold)
        self._unread = iter(copies[WARM_RUNS:])
        for copy in copies[:WARM_RUNS]:
            wire = self._workspace.snapshot_wire(copy, 0)
            etag, self.document = self._read(copy)
            self._warm.append(wire)
            self._conditional.append(wire.replace(b"\r\n\r\n", b"\r\nIf-None-Match: %s\r\n\r\n" % etag.encode()))

    def _wait_for(self, worker: Process, run_id: str) -> None:
        """Return when the worker has finished the run."""
        unfinished = f"SELECT 1 FROM runs WHERE run_id = '{run_id}' AND ended_at IS NULL"  # noqa: S608 - the service's id
        give_up_at = time.monotonic() + FINISH_S
        while self._stage.sql(self._database_url, unfinished):
            worker.require_alive()
            if time.monotonic() > give_up_at:
                raise LoadFailed("a first run", f"no worker finished it within {FINISH_S:.0f} s")
            time.sleep(0.05)

    def create(self, connections: int, seconds: float) -> Repeat:
        """Accept runs."""
        found = self._ask("create", connections, seconds, [self.create_wire])
        self._stage.settle(self._database_url)
        return found

    def spawn(self, connections: int, seconds: float) -> Repeat:
        """Accept subruns of parents that were accepted just before."""
        parents = max(connections, int(SPAWNS_PER_S_MAX * seconds) // CHILDREN_MAX)
        bodies = self._post("parents for spawns", [self.create_wire], parents, min(parents, 64))
        self._stage.settle(self._database_url)
        run_ids = [msgspec.json.decode(body, type=CreateAnswer).run_id for body in bodies]
        wires = [self._workspace.spawn_wire(run_id) for run_id in run_ids]
        found = self._ask("spawn", connections, seconds, wires, most=len(wires) * CHILDREN_MAX)
        self._stage.settle(self._database_url)
        return found

    def snapshot_warm(self, connections: int, seconds: float) -> Repeat:
        """Read snapshots that were read before."""
        return self._ask("snapshot warm", connections, seconds, self._warm)

    def not_modified(self, connections: int, seconds: float) -> Repeat:
        """Ask for snapshots that the caller has."""
        return self._ask("304", connections, seconds, self._conditional, status=304)

    def snapshot_cold(self, connections: int, seconds: float) -> Repeat:
        """Read snapshots of runs of which the process knows nothing."""
        unread = islice(self._unread, cold_count(seconds))
        wires = [self._workspace.snapshot_wire(run_id, 0) for run_id in unread]
        if not wires:
            raise LoadFailed("snapshot cold", "every run that was made for it has been read")
        return self._ask("snapshot cold", connections, seconds, wires, most=len(wires))

    def _ask(
        self,
        what: str,
        connections: int,
        seconds: float,
        wires: list[bytes],
        most: int | None = None,
        status: int = 200,
    ) -> Repeat:
        load = Load(
            host=self._host,
            port=self._port,
            connections=connections,
            seconds=seconds,
            requests=wires,
            most=most,
            status=status,
        )
        measured = run_load(what, load)
        return repeat_of(measured.latencies_ns, measured.seconds)

    def _post(self, what: str, wires: list[bytes], count: int, connections: int) -> list[bytes]:
        """Send exactly `count` requests and return the bodies of their answers."""
        load = Load(
            host=self._host,
            port=self._port,
            connections=connections,
            seconds=60.0,
            requests=wires,
            most=count,
            keep_bodies=True,
        )
        return run_load(what, load).bodies

    def _read(self, run_id: str) -> tuple[str, bytes]:
        """Read one snapshot; returns its ETag and its body."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=10)
        try:
            headers = {"authorization": f"Bearer {self._workspace.token}"}
            connection.request("GET", f"/api/runs/{run_id}/snapshot/?since_seq=0", headers=headers)
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            raise LoadFailed("a first snapshot", f"answered {answer.status} {body[:300].decode(errors='replace')}")
        return answer.headers["etag"], body

    def _copies(self, run_id: str, count: int) -> list[str]:
        """Copy a run with its steps and events `count` times; returns the new ids."""
        tables = [
            f"INSERT INTO {table} SELECT copy.* FROM {table} original, new_id,"  # noqa: S608 - constants
            " LATERAL jsonb_populate_record(original, jsonb_build_object('run_id', new_id.run_id)) copy"
            f" WHERE original.run_id = '{run_id}'"
            for table in ("runs", "steps", "events")
        ]
        found = self._stage.sql(
            self._database_url,
            f"CREATE TEMPORARY TABLE new_id AS SELECT uuidv7() AS run_id FROM generate_series(1, {count})",  # noqa: S608
            *tables,
            "SELECT run_id FROM new_id",
        )
        self._stage.settle(self._database_url)
        return [row[0] for row in found]


def cold_count(seconds: float) -> int:
    """Return how many runs one cold cell may read."""
    return max(1, int(COLD_PER_S_MAX * seconds))


@contextmanager
def serving(stage: Stage, environment: dict[str, str]) -> Iterator[ServicePaths]:
    """Start a serve process and make a workspace without limits."""
    with Process(SERVE, environment, listens=True) as process:
        workspace = make_workspace(process.url, environment)
        yield ServicePaths(stage, process, workspace, environment["DATABASE_URL"])


def make_workspace(url: str, environment: dict[str, str]) -> Workspace:
    """Make a workspace without limits, its agent and its token."""
    token = administer(environment, "token", "create", "--installation", "--role", "OWNER")["token"]

    async def make() -> Workspace:
        client = Client(url)
        try:
            return await Api(client, token).make_workspace("bench", "calibration", SCRIPT)
        finally:
            await client.close()

    return asyncio.run(make())
