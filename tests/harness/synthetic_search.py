"""A search for burst limits on a made-up server, recorded as the harness records one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from harness.analysis.bursts import Requirement, judge, looks, trials_at
from harness.analysis.dependence import Bools, Floats
from harness.analysis.slo import Op, Status
from harness.sample import Endpoint, Mode, Outcome, Sample
from harness.search import burst_ladder, consider
from tests.harness.synthetic import ORIGIN_NS, Plan, Rows, one_second, write_sample_set

TRIALS = 10
LIMITS_MS = {Endpoint.CREATE: 300.0, Endpoint.SPAWN: 200.0, Endpoint.SNAPSHOT: 375.0}


def write_search(
    root: Path,
    *,
    most: int = 256,
    service_ms: float = 6.0,
    failing: float = 0.0,
    measurement_id: str = "0190-bursts-1",
    endpoints: tuple[Endpoint, ...] = (Endpoint.CREATE,),
) -> Path:
    """Search on one server that takes `service_ms` for each request, so a burst of n takes n times that; record it."""
    random = np.random.default_rng(7)
    rows, now = Rows([], [], []), ORIGIN_NS + 50_000_000
    for endpoint in endpoints:
        requirement = Requirement(endpoint, Op.LT, LIMITS_MS[endpoint], 0.05)
        tried: dict[int, Status] = {}
        while (level := consider(burst_ladder(most), tried).next_level) is not None:
            latency: Floats = np.empty((0, level))
            for look in looks(trials_at(level, TRIALS)):
                while len(latency) < look.trials:
                    waits = service_ms * np.arange(1.0, level + 1.0) * np.exp(0.1 * random.standard_normal(level))
                    lost = random.random(level) < failing
                    now = _record(rows, endpoint, now, np.asarray(waits, dtype=np.float64), lost, len(latency))
                    latency = np.vstack([latency, np.where(lost, np.inf, waits)])
                verdict = judge(latency, requirement, TRIALS)
                if verdict.status is not Status.INCONCLUSIVE:
                    break
            tried[level] = verdict.status
    rows.resources += [one_second(at, random) for at in range(ORIGIN_NS, now + 1_000_000_000, 1_000_000_000)]
    asked: dict[str, Any] = {
        "requirements": [
            {"endpoint": endpoint.value, "op": "lt", "limit_ms": LIMITS_MS[endpoint], "slow_share": 0.05}
            for endpoint in endpoints
        ],
        "trials": TRIALS,
        "max_burst": most,
    }
    plan = Plan(mode=Mode.BURST_LIMITS, measurement_id=measurement_id)
    return write_sample_set(root, plan, (), {"parameters": asked}, rows)


def _record(rows: Rows, endpoint: Endpoint, now: int, waits: Floats, lost: Bools, trial: int) -> int:
    """Record one burst that was due at `now`; return when the next is."""
    for number, (wait_ms, no_answer) in enumerate(zip(waits, lost, strict=True)):
        sent, done = now + 1_000 * number, now + int(wait_ms * 1e6) + 1_000 * number
        rows.samples.append(
            Sample(
                run_key=f"{endpoint.value}-{len(rows.samples):06d}", scenario="burst", endpoint=endpoint,
                mode=Mode.BURST_LIMITS, level=float(len(waits)), trial=trial, worker=0, intended_at_ns=now,
                sent_at_ns=sent, first_byte_at_ns=None if no_answer else done, done_at_ns=done,
                latency_ms=(done - now) / 1e6, service_ms=(done - sent) / 1e6,
                status=None if no_answer else 200, outcome=Outcome.TIMEOUT if no_answer else Outcome.OK,
                error="no answer" if no_answer else None, server_db_ms=None, server_quota_ms=None,
                server_publish_ms=None, server_app_ms=None, response_bytes=None, connection_id=number,
            )
        )  # fmt: skip
    return now + int(float(waits.max()) * 1e6) + 20_000_000
