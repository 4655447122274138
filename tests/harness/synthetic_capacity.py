"""A search for capacity on a made-up server, recorded as the harness records one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from harness.analysis.bursts import Requirement, looks
from harness.analysis.capacity import RateRequirement, RateVerdict, Seen, Span, Window, judge_rate, observe, rate_trials
from harness.analysis.dependence import Floats
from harness.analysis.ratesets import bracket_of
from harness.analysis.slo import Op, Status
from harness.arrivals import poisson
from harness.sample import Endpoint, Mode, Outcome, Sample
from harness.search import capacity_ladder, rate_per_s
from tests.calibration.rate_world import served
from tests.harness.synthetic import ORIGIN_NS, Plan, Rows, one_second, write_sample_set

TRIALS = 10
SPAN = Span(lead_s=0.2, window_s=0.5)
LIMITS_MS = {Endpoint.CREATE: 300.0, Endpoint.SPAWN: 200.0, Endpoint.SNAPSHOT: 375.0}
SERVERS = 4


def write_capacity(
    root: Path,
    per_s: Mapping[Endpoint, float],
    *,
    first: float = 100.0,
    most: float = 1600.0,
    measurement_id: str = "0190-capacity-1",
    manifest: Mapping[str, Any] | None = None,
) -> Path:
    """Search on servers that carry `per_s` of each endpoint and no more; record it, quota revision 1 in force."""
    random = np.random.default_rng(11)
    rows, now = Rows([], [], []), ORIGIN_NS + 50_000_000
    asked = tuple(RateRequirement(Requirement(one, Op.LT, LIMITS_MS[one], 0.05)) for one in per_s)
    for requirement in asked:
        endpoint = requirement.latency.endpoint
        tried: dict[int, RateVerdict] = {}
        while (level := bracket_of(capacity_ladder(first, most), tried).next_level) is not None:
            rate, seen = rate_per_s(level), list[Window]()
            for look in looks(rate_trials(rate, SPAN.window_s, TRIALS)):
                while len(seen) < look.trials:
                    window, now = _record(rows, endpoint, rate, len(seen), now, per_s[endpoint], random)
                    seen.append(window)
                verdict = judge_rate(seen, requirement, rate, SPAN.window_s, TRIALS)
                if verdict.status is not Status.INCONCLUSIVE:
                    break
            tried[level] = verdict
    # The queue is looked at several times a window, as the search does.
    rows.resources += [one_second(at, random) for at in range(ORIGIN_NS, now + 1_000_000_000, 100_000_000)]
    parameters = {
        "requirements": [dataclasses.asdict(one) for one in asked],
        "trials": TRIALS,
        "window_s": SPAN.window_s,
        "lead_s": SPAN.lead_s,
        "first_rate_per_s": first,
        "max_rate_per_s": most,
    }
    plan = Plan(mode=Mode.CAPACITY, measurement_id=measurement_id)
    return write_sample_set(root, plan, (), {"parameters": parameters, "quota_revision": 1, **(manifest or {})}, rows)


def _record(
    rows: Rows, endpoint: Endpoint, rate: float, trial: int, now: int, per_s: float, random: np.random.Generator
) -> tuple[Window, int]:
    """Record one trial that begins at `now`; return what it shows and when the next may begin."""
    due_s = np.concatenate([[0.0], poisson(rate, SPAN.whole_s, int(random.integers(2**32)))])
    done_s: Floats = served(due_s, SERVERS, SERVERS / per_s)
    due, done = (now + (each * 1e9).astype(np.int64) for each in (due_s, done_s))
    for number, (at, end) in enumerate(zip(due.tolist(), done.tolist(), strict=True)):
        rows.samples.append(
            Sample(
                run_key=f"{endpoint.value}-{len(rows.samples):06d}", scenario="rate", endpoint=endpoint,
                mode=Mode.CAPACITY, level=rate, trial=trial, worker=0, intended_at_ns=at, sent_at_ns=at,
                first_byte_at_ns=end, done_at_ns=end, latency_ms=(end - at) / 1e6, service_ms=(end - at) / 1e6,
                status=200, outcome=Outcome.OK, error=None, server_db_ms=None, server_quota_ms=None,
                server_publish_ms=None, server_app_ms=None, response_bytes=None, connection_id=number,
            )
        )  # fmt: skip
    looked = now + (np.arange(0.0, SPAN.whole_s + 0.01, 0.1) * 1e9).astype(np.int64)
    calm = np.zeros(len(looked))
    window = observe(due, due, done, np.ones(len(due), dtype=bool), Seen(looked, calm, calm), SPAN, rate)
    return window, int(max(done.max(), now + SPAN.whole_s * 1e9)) + 20_000_000
