"""Small sample sets with known truth, written exactly as a harness writes them, and the means to spoil them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from harness.sample import Endpoint, Mode, Outcome, ResourceSample, RunRecord, Sample, arrow_schema

ORIGIN_NS = 1_000_000_000_000
WALL_NS = 1_700_000_000_000_000_000
SPREAD = 0.25
"""Of the logarithm of every latency: the middle 95 % lie within a factor of 1.6 of the median."""


@dataclasses.dataclass
class Plan:
    """What a synthetic load looks like; every field may be changed before it is written."""

    mode: Mode = Mode.SMOKE
    runs: int = 64
    children: int = 1
    side_by_side: int = 8
    polls: int = 2
    create_ms: float = 9.0
    spawn_ms: float = 7.0
    snapshot_ms: float = 5.0
    completion_ms: float = 90.0
    ticks: int = 3
    seed: int = 1
    measurement_id: str = "0190-synthetic-1"
    commit: str | None = "c0ffee"


@dataclasses.dataclass
class Rows:
    """The rows of one set before they are written."""

    samples: list[Sample]
    runs: list[RunRecord]
    resources: list[ResourceSample]


Spoil = Callable[[Rows], None]


def synthetic_rows(plan: Plan) -> Rows:
    """Make the rows of create, spawn and poll, as many runs side by side as the plan says."""
    random = np.random.default_rng(plan.seed)
    samples: list[Sample] = []
    runs: list[RunRecord] = []

    def request(run_key: str, endpoint: Endpoint, at_ns: int, typical_ms: float, trial: int, worker: int) -> int:
        service_ms = float(typical_ms * np.exp(random.normal(0.0, SPREAD)))
        sent = at_ns + int(random.uniform(10_000, 60_000))
        done = sent + int(service_ms * 1e6)
        burst = plan.mode is Mode.BURST
        parts = np.round(service_ms * random.dirichlet([6.0, 1.0, 1.0, 4.0]) * 0.8, 3)
        samples.append(
            Sample(
                run_key=run_key, scenario="create-spawn-poll", endpoint=endpoint, mode=plan.mode,
                level=float(plan.side_by_side) if burst else None, trial=trial, worker=worker,
                intended_at_ns=at_ns, sent_at_ns=sent, first_byte_at_ns=done - 20_000, done_at_ns=done,
                latency_ms=(done - at_ns) / 1e6, service_ms=(done - sent) / 1e6, status=200, outcome=Outcome.OK,
                error=None, server_db_ms=float(parts[0]), server_quota_ms=float(parts[1]),
                server_publish_ms=float(parts[2]), server_app_ms=float(parts[3]), response_bytes=420,
                connection_id=worker,
            )
        )  # fmt: skip
        return done

    free_at = [ORIGIN_NS + 50_000_000] * plan.side_by_side
    for number in range(plan.runs):
        trial = number // plan.side_by_side if plan.mode is Mode.BURST else 0
        worker = int(np.argmin(free_at))
        key = f"run-{number:05d}"
        created = request(key, Endpoint.CREATE, free_at[worker], plan.create_ms, trial, worker)
        completion_ms = float(plan.completion_ms * np.exp(random.normal(0.0, 0.1)))
        ended = created + int(completion_ms * 1e6)
        now, children = created, []
        for child in range(plan.children):
            now = request(f"{key}.{child + 1}", Endpoint.SPAWN, now, plan.spawn_ms, trial, worker)
            children.append((f"{key}.{child + 1}", now))
        last_sent, last_done = now, now
        for poll in range(plan.polls):
            due = ended + 1_000_000 if poll == plan.polls - 1 else max(now, last_done)
            last_sent, last_done = due, request(key, Endpoint.SNAPSHOT, due, plan.snapshot_ms, trial, worker)
        free_at[worker] = last_done
        common: dict[str, Any] = {
            "workspace_id": "w1", "trial": trial, "worker": worker, "last_unfinished_at_ns": min(last_sent, ended) - 1,
            "first_finished_at_ns": last_done, "final_status": "COMPLETED", "poll_timed_out": False,
        }  # fmt: skip
        runs.append(
            RunRecord(
                run_key=key, run_id=f"id-{key}", parent_run_key=None, created_at_ns=created, ticks=plan.ticks,
                server_completion_ms=completion_ms, steps=2, events=8, subruns=plan.children, **common,
            )
        )  # fmt: skip
        runs += [
            RunRecord(
                run_key=child, run_id=f"id-{child}", parent_run_key=key, created_at_ns=at, ticks=2, steps=2, events=5,
                server_completion_ms=completion_ms / 2, subruns=0, **common,
            )
            for child, at in children
        ]  # fmt: skip
    last = max(sample.done_at_ns or 0 for sample in samples)
    return Rows(samples, runs, [one_second(at, random) for at in range(ORIGIN_NS, last + 1_000_000_000, 1_000_000_000)])


def one_second(at_ns: int, random: np.random.Generator) -> ResourceSample:
    """Make one second of a machine that is not busy."""
    return ResourceSample(
        at_ns=at_ns, cpu_percent=float(random.uniform(20, 60)), load1=0.5, service_rss_bytes=180_000_000,
        service_cpu_percent=float(random.uniform(20, 50)), harness_cpu_percent=15.0, queue_depth=0.0,
        oldest_due_tick_s=0.0, ticks_per_s=float(random.uniform(20, 60)), redis_publish_lag_ms=0.4, db_write_ms=1.5,
        iowait_percent=1.0, generator_lag_ms=0.6,
    )  # fmt: skip


def write_sample_set(
    root: Path,
    plan: Plan | None = None,
    spoil: Sequence[Spoil] = (),
    manifest: dict[str, Any] | None = None,
    rows: Rows | None = None,
) -> Path:
    """Write a set as contract and recorder have it, spoiled first where asked; return its folder.

    `manifest` overrides keys of the manifest, `rows` those that the plan would give.
    """
    plan = plan or Plan()
    rows = rows or synthetic_rows(plan)
    planned = len(rows.samples)
    ends = max(sample.done_at_ns or 0 for sample in rows.samples) + 5_000_000
    for change in spoil:
        change(rows)
    path = root / f"20260101T000000Z-{plan.mode.value}-{plan.measurement_id}"
    path.mkdir(parents=True)
    for name, kind, content in (
        ("samples-00001.parquet", Sample, rows.samples),
        ("runs.parquet", RunRecord, rows.runs),
        ("resources.parquet", ResourceSample, rows.resources),
    ):
        schema = arrow_schema(kind, plan.measurement_id)
        columns = [pa.array([getattr(row, field.name) for row in content], field.type) for field in schema]
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), path / name)
    document = {
        "measurement_id": plan.measurement_id, "mode": plan.mode.value, "planned_requests": planned, "attempt": 1,
        "parameters": {"runs": plan.runs, "children": plan.children, "burst_size": plan.side_by_side},
        "commit": plan.commit, "versions": {"python": "3.11"}, "machine": {"cpu": "made up", "cpu_count": 2},
        "quota_revision": 1,
        "clock": {
            "start": {"monotonic_ns": ORIGIN_NS, "wall_ns": WALL_NS},
            "end": {"monotonic_ns": ends, "wall_ns": WALL_NS + ends - ORIGIN_NS},
        },
        "files": hashes(path), "complete": True, "source": {"tool": "plimsoll", "cannot_know": []},
    }  # fmt: skip
    (path / "manifest.json").write_text(json.dumps(document | (manifest or {})), encoding="utf-8")
    return path


def hashes(path: Path) -> dict[str, str]:
    """Return the sha256 of every Parquet file of a folder."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.glob("*.parquet"))}


def change(index: int, **values: Any) -> Spoil:
    """Return a spoil that changes fields of one sample."""

    def spoil(rows: Rows) -> None:
        rows.samples[index] = dataclasses.replace(rows.samples[index], **values)

    return spoil
