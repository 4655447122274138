"""How fast is the open loop, what does recording cost, and what becomes of it when it is killed?

Against a target that answers at once: the highest rate that one sending process keeps on schedule, beside what Locust's
FastHttpUser reaches in a closed loop in the same round; two senders beside one; the recorder's share of the processor;
bytes per row; memory while rows come; rows that SIGKILL costs. Writes docs/evidence/generator-speed.md.
"""

from __future__ import annotations

import csv
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from harness.evaluation import find_faults_in
from harness.recorder import Recorder
from harness.sample import Endpoint, Mode, Outcome
from harness.samplebuffer import Batch, SampleBuffer
from harness.sampleset import newest_sample_set, read_sample_set
from tests.campaigns.evidence import write_page
from tests.campaigns.flags import Flags
from tests.campaigns.generator_stall import LOCUST
from tests.campaigns.openly import PATH, constant, measured, plan, served

PAGE = Path("docs/evidence/generator-speed.md")
RATES_PER_S = (4_000, 6_000, 8_000, 10_000, 12_000, 14_000, 16_000, 20_000, 24_000)
ON_SCHEDULE_MS = 10.0  # p99 of send lag
CONNECTIONS = 64
USERS = 32
BATCH_ROWS = 4_096

LOCUST_USER = f"""
from locust import FastHttpUser, task

class User(FastHttpUser):
    @task
    def ask(self):
        self.client.get("{PATH}")
"""


def highest(url: str, folder: Path, workers: int, seconds: float) -> float:
    """Return the highest rate of the ladder that was kept on schedule: every arrival answered, valid, hardly late."""
    best = 0.0
    for rate in RATES_PER_S:
        path = measured(plan(url, constant(rate, seconds), workers, CONNECTIONS), url, folder).path
        samples = read_sample_set(path).samples
        lag_ms = (samples["sent_at_ns"].to_numpy() - samples["intended_at_ns"].to_numpy()) / 1e6
        p99_ms = float(np.quantile(lag_ms, 0.99))
        good = not find_faults_in(path) and set(samples["outcome"].to_pylist()) == {"ok"} and p99_ms <= ON_SCHEDULE_MS
        print(f"  {workers} x {rate}/s: lag p99 {p99_ms:.2f} ms, {good}", file=sys.stderr, flush=True)  # noqa: T201
        shutil.rmtree(path)
        if not good:
            break
        best = rate
    return best


def locust(url: str, folder: Path, seconds: float) -> float | None:
    """Return what Locust reaches in a closed loop, requests per second by its own account; None without it."""
    if not LOCUST.exists():
        return None
    script = folder / "user.py"
    script.write_text(LOCUST_USER)
    words = [
        str(LOCUST),
        "-f",
        str(script),
        "--headless",
        "-u",
        str(USERS),
        "-r",
        str(USERS),
        "-t",
        f"{seconds + 2:g}s",
    ]
    words += ["--host", url, "--csv", str(folder / "locust"), "--only-summary", "--loglevel", "ERROR"]
    subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)  # noqa: S603
    with (folder / "locust_stats.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["Name"] == "Aggregated")
    return float(row["Requests/s"])


def recording_share(rate_per_s: float) -> float:
    """Return which share of one core the sending side spends on making rows at a rate, in percent."""
    buffer, rows = SampleBuffer(), 200_000
    began = time.process_time()
    for number in range(rows):
        _append(buffer, number)
        if number % BATCH_ROWS == 0:
            buffer.drain()
    return (time.process_time() - began) / rows * rate_per_s * 100


def _append(buffer: SampleBuffer, number: int) -> None:
    at = number * 100_000
    buffer.append(
        number, 0, Endpoint.CREATE, 1.0, 0, 0, at, at + 60_000, at + 200_000, at + 220_000, 200, Outcome.OK, None,
        (float("nan"),) * 4, 110, number % 10,
    )  # fmt: skip


def memory(folder: Path, rows: int) -> list[float]:
    """Record so many rows by the real recorder; return this process's memory at each tenth, MB."""
    recorder = Recorder(folder, Mode.OPEN, "request", {})
    source = SampleBuffer()
    for number in range(BATCH_ROWS):
        _append(source, number)
    batch: Batch = source.drain()
    process, seen = psutil.Process(), []
    batches = rows // BATCH_ROWS
    for number in range(batches):
        recorder.samples.absorb(batch)
        recorder.plan(BATCH_ROWS)
        recorder.write(recorder.collect())
        if (number + 1) * 10 // batches > number * 10 // batches:
            seen.append(process.memory_info().rss / 1e6)
    recorder.finish(complete=True)
    shutil.rmtree(recorder.path)
    return seen


def killed(url: str, folder: Path) -> tuple[float, bool]:
    """Kill a harness at work; return how many seconds of rows it lost, and whether its set can be read."""
    words = [sys.executable, "-c", KILLED, url, str(folder)]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:  # noqa: S603 - our own words
        while not list(folder.glob("*/samples-*.parquet")):
            time.sleep(0.05)
        time.sleep(4.0)
        process.send_signal(signal.SIGKILL)
        at_ns = time.monotonic_ns()
    path = newest_sample_set(folder)
    found = read_sample_set(path)
    last_ns = max(found.samples["done_at_ns"].to_pylist())
    return (at_ns - last_ns) / 1e9, not found.manifest.complete and len(found.samples) > 0


KILLED = """
import sys
from pathlib import Path
from tests.campaigns.openly import constant, measured, plan
from tests.campaigns.flags import Flags
measured(plan(sys.argv[1], constant(500.0, 60.0)), sys.argv[1], Path(sys.argv[2]))
"""


def bytes_per_row(url: str, folder: Path, seconds: float) -> tuple[int, float]:
    """Return how many rows a run wrote and what each takes on disk."""
    path = measured(plan(url, constant(2_000.0, seconds)), url, folder).path
    rows = len(read_sample_set(path).samples)
    return rows, sum(file.stat().st_size for file in path.glob("samples-*")) / rows


def main() -> int:
    parser = Flags("generator_speed", __doc__)
    parser.add_argument("--repeats", type=int, default=3, help="rounds of speed (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=10_000_000, help="for memory (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=5, help="harnesses killed (default: %(default)s)")
    asked = parser.parse_args()
    with served("tests.campaigns.targets") as (url, _), tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rounds = []
        for _ in range(asked.repeats):
            one, two = (highest(url, folder, workers, asked.seconds) for workers in (1, 2))
            rounds.append((one, two, locust(url, folder, asked.seconds)))
            print(rounds[-1], file=sys.stderr, flush=True)  # noqa: T201 - a campaign prints
        rows, each = bytes_per_row(url, folder, 10.0)
        losses = [killed(url, folder / f"killed-{number}") for number in range(asked.kills)]
        seen = memory(folder, asked.rows) if asked.rows else []
    one = statistics.median(each_round[0] for each_round in rounds)
    two = statistics.median(each_round[1] for each_round in rounds)
    peers = [each_round[2] for each_round in rounds if each_round[2] is not None]
    share = recording_share(one)
    lines = [
        (
            f"Medians of {len(rounds)} rounds of {asked.seconds:g} s. On schedule: valid, every request ok, p99 of lag"
            f" at most {ON_SCHEDULE_MS:g} ms. The target shares the {os.cpu_count()} cores."
        ),
        "",
        "| what | found | aim |",
        "|---|---|---|",
        f"| one sending process, on schedule, recorded | {one:,.0f}/s | |",
    ]
    if peers:
        peer = statistics.median(peers)
        lines.append(f"| Locust FastHttpUser, closed loop, {USERS} users, one process | {peer:,.0f}/s | |")
        lines.append(f"| ratio | {one / peer:.2f} | at least 1.5 |")
    lines += [
        f"| two sending processes, on schedule | {two:,.0f}/s, {two / max(one, 1):.2f} times one | 1.7, given cores |",
        f"| making rows, share of the sender's core at {one:,.0f}/s | {share:.1f} % | at most 3 % |",
        f"| bytes per row on disk ({rows:,} rows, constant arrivals) | {each:.1f} | at most 16 |",
    ]
    if losses:
        lines.append(
            f"| seconds of rows lost by SIGKILL, worst of {len(losses)} | {max(loss for loss, _ in losses):.2f},"
            f" {sum(readable for _, readable in losses)} sets readable | at most 1 |"
        )
    if seen:
        told = ", ".join(f"{megabytes:.0f}" for megabytes in seen)
        lines.append(f"| memory at each tenth of {asked.rows:,} rows, MB | {told} | flat |")
    lines += [
        "",
        "Rounds (one sender, two senders, Locust): " + "; ".join(str(each_round) for each_round in rounds) + ".",
    ]
    write_page(PAGE, "How fast the open loop is, and what recording costs", "generator_speed", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
