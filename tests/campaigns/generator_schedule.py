"""Does the open loop send when it should? A passive target stamps every arrival, and both ends are compared.

Send lag is what the sender's own rows say (sent - due); arrival is what the target saw, in the order of arrivals, less
the schedule. Drift is the difference of the median lag between the last and the first tenth of a run.
Writes docs/evidence/generator-schedule.md.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from harness.evaluation import find_faults_in
from harness.sampleset import read_sample_set
from tests.campaigns.evidence import write_page
from tests.campaigns.flags import Flags
from tests.campaigns.openly import constant, measured, plan, served

PAGE = Path("docs/evidence/generator-schedule.md")
RATES_PER_S = (1_000.0, 5_000.0)
P50_US, P99_US = 100.0, 1_000.0
DRIFT_US = 100.0
STAMPS_S = 10.0  # for the target to write them


@dataclasses.dataclass(frozen=True)
class Kept:
    """How one run kept its schedule."""

    rate_per_s: float
    duration_s: float
    workers: int
    arrivals: int
    lag_us: tuple[float, float, float, float]  # p50, p99, p99.9, worst
    seen_us: tuple[float, float]  # p50, p99 by the target's stamps
    drift_us: float
    valid: bool

    @property
    def good(self) -> bool:
        """Whether it reached what it should."""
        return self.lag_us[0] <= P50_US and self.lag_us[1] <= P99_US and abs(self.drift_us) <= DRIFT_US


def run(rate_per_s: float, duration_s: float, workers: int, folder: Path) -> Kept:
    """Make one run and compare it with the grid."""
    file = folder / f"stamps-{time.monotonic_ns()}"
    with served("tests.campaigns.targets", "--stamps", str(file)) as (url, _):
        path = measured(plan(url, constant(rate_per_s, duration_s), workers), url, folder).path
    samples = read_sample_set(path).samples
    due = np.sort(samples["intended_at_ns"].to_numpy())
    order = np.argsort(samples["intended_at_ns"].to_numpy(), kind="stable")
    lag_us = (samples["sent_at_ns"].to_numpy() - samples["intended_at_ns"].to_numpy())[order] / 1e3
    stamps = np.sort(np.frombuffer(file.read_bytes(), dtype=np.int64))
    # The senders' watcher asks for metrics once a second on the same target: its requests are the surplus.
    seen_us = (_nearest(stamps, due) - due) / 1e3
    tenth = max(1, len(due) // 10)
    return Kept(
        rate_per_s=rate_per_s,
        duration_s=duration_s,
        workers=workers,
        arrivals=len(due),
        lag_us=tuple(float(value) for value in np.quantile(lag_us, [0.5, 0.99, 0.999, 1.0])),  # type: ignore[arg-type]
        seen_us=tuple(float(value) for value in np.quantile(seen_us, [0.5, 0.99])),  # type: ignore[arg-type]
        drift_us=float(np.median(lag_us[-tenth:]) - np.median(lag_us[:tenth])),
        valid=not find_faults_in(path),
    )


def _nearest(stamps: np.ndarray, due: np.ndarray) -> np.ndarray:
    """Return for each due instant the first stamp at or after it."""
    place = np.minimum(np.searchsorted(stamps, due), len(stamps) - 1)
    return np.asarray(stamps[place])


def main() -> int:
    parser = Flags("generator_schedule", __doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of each rate (default: %(default)s)")
    parser.add_argument("--drift-seconds", type=float, default=60.0, help="of the run for drift (default: %(default)s)")
    asked = parser.parse_args()
    found: list[Kept] = []
    with tempfile.TemporaryDirectory() as folder:
        wanted = [(rate, asked.seconds, 1) for _ in range(asked.repeats) for rate in RATES_PER_S]
        wanted += [(RATES_PER_S[-1], asked.seconds, 2), (RATES_PER_S[0], asked.drift_seconds, 1)]
        for rate, seconds, workers in wanted:
            found.append(run(rate, seconds, workers, Path(folder)))
            print(found[-1], file=sys.stderr, flush=True)  # noqa: T201 - a campaign prints
    lines = [
        f"Aims: send lag p50 at most {P50_US:g} µs and p99 at most {P99_US:g} µs, drift within {DRIFT_US:g} µs.",
        "",
        "| rate/s | s | senders | arrivals | lag µs p50 | p99 | p99.9 | worst | seen p50 | p99 | drift | valid | aim |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for each in found:
        lag = " | ".join(f"{value:,.0f}" for value in each.lag_us)
        seen = " | ".join(f"{value:,.0f}" for value in each.seen_us)
        lines.append(
            f"| {each.rate_per_s:,.0f} | {each.duration_s:g} | {each.workers} | {each.arrivals:,} | {lag} | {seen} |"
            f" {each.drift_us:+.1f} | {'yes' if each.valid else 'no'} | {'reached' if each.good else 'missed'} |"
        )
    lines += [
        "",
        (
            "Lag: from the instant an arrival was due to its first byte handed to the kernel, by the sender. Seen: to"
            " the target's reading it, by the target's own stamp, which includes its loop. Both share the cores."
        ),
    ]
    write_page(PAGE, "The open loop keeps its schedule", "generator_schedule", lines)
    return 0 if all(each.good for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
