"""Measured revision files for tests: sound unless told otherwise."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping
from typing import Any

import msgspec

from service.quota.limits import Limit
from service.quota.tables import FIRST, FORMAT, Measured, Provenance, RateValue, RevisionFile, Tables

NOW = dt.datetime(2026, 11, 23, 12, tzinfo=dt.UTC)
DIGEST = "a" * 64
MACHINE: dict[str, str | int | float | bool | None] = {
    "system": "Linux",
    "release": "6.1",
    "architecture": "x86_64",
    "cpu": "a processor",
    "cpu_count": 2,
    "memory_bytes": 8_000_000_000,
}
OTHER_MACHINE = MACHINE | {"cpu": "a faster processor", "cpu_count": 16}
SECONDS = 600.0


def measured(per_s: float, spread: float = 0.05, **changed: Any) -> Measured:
    """Return what was measured, with bounds that far below and above."""
    requests = round(per_s * SECONDS) if math.isfinite(per_s) else 0
    sound = Measured(
        per_s=per_s,
        lower_per_s=per_s * (1 - spread),
        upper_per_s=per_s * (1 + spread),
        verdict="PASS",
        requests_planned=requests,
        requests_recorded=requests,
        seconds=SECONDS,
        late_share=0.0,
        samples={"m": DIGEST},
        measured_at=NOW - dt.timedelta(hours=1),
        machine=MACHINE,
    )
    return msgspec.structs.replace(sound, **changed)


def measured_file(evidence: Mapping[Limit, Measured], limits: Tables = FIRST) -> RevisionFile:
    """Return the file that a report makes of it: a quarter of each lower bound, and the rest as it was."""
    values = {
        limit.value: RateValue(math.floor(each.lower_per_s * 250) / 1000, 10)
        for limit, each in evidence.items()
        if math.isfinite(each.lower_per_s)
    }
    default = msgspec.structs.replace(limits.default, **values)
    return RevisionFile(FORMAT, Tables(default, limits.calibration), Provenance(measured=dict(evidence)))
