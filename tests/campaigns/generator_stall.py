"""The stall probe: what does each tool say of a target that is frozen for one second of five?

100 requests/s on 10 connections; the target is stopped (SIGSTOP) from 2 s to 3 s. What users who come at that rate
would wait is known: those of the frozen second wait for its rest, the others hardly at all. Our open loop beside wrk,
hey and Locust, each on the same target in the same round. Writes docs/evidence/generator-stall.md.
"""

from __future__ import annotations

import contextlib
import csv
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from harness.evaluation import find_faults_in
from harness.sampleset import read_sample_set
from tests.campaigns.evidence import write_page
from tests.campaigns.flags import Flags
from tests.campaigns.openly import PATH, constant, measured, plan, served

PAGE = Path("docs/evidence/generator-stall.md")
RATE_PER_S, DURATION_S, CONNECTIONS = 100, 5.0, 10
FROZEN_FROM_S, FROZEN_S = 2.0, 1.0
QUANTILES = (0.90, 0.95, 0.99)
TOLERANCE = 0.02
LOCUST = Path(".venv-tools/peers/bin/locust")  # `make peers`

WRK_PACE = (
    f"function delay() return {1000 * CONNECTIONS // RATE_PER_S} end\n"  # ms between the requests of a connection
)
LOCUST_USER = f"""
from locust import FastHttpUser, constant_throughput, task

class User(FastHttpUser):
    wait_time = constant_throughput({RATE_PER_S / CONNECTIONS})

    @task
    def ask(self):
        self.client.get("{PATH}")
"""

Told = tuple[int, list[float]]  # requests, and the quantiles in milliseconds


def truth() -> list[float]:
    """Return the quantiles of what the users of that rate wait: a ramp from one second to nothing, else nothing."""
    at_s = np.arange(int(RATE_PER_S * DURATION_S)) / RATE_PER_S
    frozen = (at_s >= FROZEN_FROM_S) & (at_s < FROZEN_FROM_S + FROZEN_S)
    wait_ms = np.where(frozen, (FROZEN_FROM_S + FROZEN_S - at_s) * 1e3, 0.0)
    return _quantiles(wait_ms)


def _quantiles(latency_ms: np.ndarray) -> list[float]:
    return [float(value) for value in np.quantile(latency_ms, QUANTILES, method="inverted_cdf")]


@contextlib.contextmanager
def freezing(pid: int, wait_s: float) -> Iterator[None]:
    """Freeze the target so many seconds from now, for a second."""

    def freeze() -> None:
        time.sleep(wait_s)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(FROZEN_S)
        os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=freeze)
    thread.start()
    yield
    thread.join()


def ours(url: str, pid: int, folder: Path) -> Told:
    """Ask by our open loop; the freeze is timed from its own start, as far as that can be seen from outside."""
    frozen = [0.0, 0.0]

    def freeze(senders: list[int]) -> None:
        time.sleep(FROZEN_FROM_S)
        frozen[0] = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        time.sleep(FROZEN_S)
        os.kill(pid, signal.SIGCONT)
        frozen[1] = time.monotonic()

    wanted = plan(url, constant(RATE_PER_S, DURATION_S), connections=CONNECTIONS)
    path = measured(wanted, url, folder, freeze).path
    samples = read_sample_set(path).samples
    refused = [finding.detail for finding in find_faults_in(path)]
    if refused:
        print("  refused:", *refused, file=sys.stderr)  # noqa: T201 - a campaign prints
    return len(samples), _quantiles(samples["latency_ms"].to_numpy())


def wrk(url: str, pid: int, folder: Path) -> Told:
    """Ask by wrk, slowed to the rate by its script, for it has no rate of its own."""
    script = folder / "pace.lua"
    script.write_text(
        WRK_PACE
        + "done = function(summary, latency, requests)\n"
        + 'print("told", summary.requests,'
        + " latency:percentile(90), latency:percentile(95), latency:percentile(99))\nend\n"
    )
    words = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{DURATION_S:g}s", "-s", str(script), url + PATH]
    with freezing(pid, FROZEN_FROM_S):
        text = subprocess.run(words, capture_output=True, text=True, check=True).stdout  # noqa: S603 - our own words
    told = re.search(r"told\s+(\d+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)", text)
    assert told is not None
    return int(told[1]), [float(told[place]) / 1e3 for place in (2, 3, 4)]


def hey(url: str, pid: int, folder: Path) -> Told:
    """Ask by hey, each of its workers limited to its part of the rate."""
    each = RATE_PER_S / CONNECTIONS
    words = ["hey", "-z", f"{DURATION_S:g}s", "-c", str(CONNECTIONS), "-q", f"{each:g}", "-o", "csv", url + PATH]
    with freezing(pid, FROZEN_FROM_S):
        text = subprocess.run(words, capture_output=True, text=True, check=True).stdout  # noqa: S603 - our own words
    latency_ms = np.array([float(row["response-time"]) * 1e3 for row in csv.DictReader(text.splitlines())])
    return len(latency_ms), _quantiles(latency_ms)


def locust(url: str, pid: int, folder: Path) -> Told:
    """Ask by Locust's FastHttpUser, each user at its part of the rate; its start is part of its time: more of it."""
    script = folder / "user.py"
    script.write_text(LOCUST_USER)
    words = [str(LOCUST), "-f", str(script), "--headless", "-u", str(CONNECTIONS), "-r", str(CONNECTIONS), "-t"]
    words += [
        f"{DURATION_S:g}s",
        "--host",
        url,
        "--csv",
        str(folder / "locust"),
        "--only-summary",
        "--loglevel",
        "ERROR",
    ]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:  # noqa: S603
        _wait_for_connection(process.pid)
        with freezing(pid, FROZEN_FROM_S):
            process.wait()
    with (folder / "locust_stats.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["Name"] == "Aggregated")
    return int(row["Request Count"]), [float(row[name]) for name in ("90%", "95%", "99%")]


def _wait_for_connection(pid: int) -> None:
    """Wait until a process has begun to ask."""
    import psutil

    give_up_at = time.monotonic() + 30
    while time.monotonic() < give_up_at:
        with contextlib.suppress(psutil.Error):
            if psutil.Process(pid).net_connections("tcp"):
                return
        time.sleep(0.02)


TOOLS: dict[str, tuple[Callable[[str, int, Path], Told], str]] = {
    "Plimsoll, open loop": (ours, ""),
    "wrk, paced": (wrk, "wrk"),
    "hey -q": (hey, "hey"),
    "Locust FastHttpUser": (locust, str(LOCUST)),
}


def main() -> int:
    parser = Flags("generator_stall", __doc__)
    parser.add_argument("--repeats", type=int, default=20, help="rounds of ours (default: %(default)s)")
    parser.add_argument("--peers", type=int, default=5, help="of them with the other tools (default: %(default)s)")
    asked = parser.parse_args()
    present = {name: call for name, (call, program) in TOOLS.items() if not program or shutil.which(program)}
    found: dict[str, list[Told]] = {name: [] for name in present}
    with served("tests.campaigns.targets") as (url, pid), tempfile.TemporaryDirectory() as folder:
        for turn in range(asked.repeats):
            for name, call in present.items():
                if call is ours or turn < asked.peers:
                    found[name].append(call(url, pid, Path(folder)))
                    print(turn + 1, name, found[name][-1], file=sys.stderr, flush=True)  # noqa: T201
    good = write(found, [name for name in TOOLS if name not in present])
    return 0 if good else 1


def write(found: dict[str, list[Told]], absent: list[str]) -> bool:
    """Write the page; return whether every round of ours was within the tolerance and lost nothing."""
    true = truth()
    mine = found["Plimsoll, open loop"]
    planned = int(RATE_PER_S * DURATION_S)
    off = [max(abs(told - want) / want for told, want in zip(each, true, strict=True)) for _, each in mine]
    within, whole = sum(each <= TOLERANCE for each in off), sum(count == planned for count, _ in mine)
    lines = [
        (
            f"{RATE_PER_S} requests/s for {DURATION_S:g} s on {CONNECTIONS} connections; the target is frozen for"
            f" {FROZEN_S:g} s. Medians over rounds [least to greatest], milliseconds."
        ),
        "",
        "| tool | rounds | requests | p90 | p95 | p99 |",
        "|---|---|---|---|---|---|",
        f"| truth | | {planned} | " + " | ".join(f"{value:.0f}" for value in true) + " |",
    ]
    for name, rounds in found.items():
        counts = statistics.median(count for count, _ in rounds)
        cells = []
        for place in range(len(QUANTILES)):
            values = [each[place] for _, each in rounds]
            cells.append(f"{statistics.median(values):.1f} [{min(values):.1f} to {max(values):.1f}]")
        lines.append(f"| {name} | {len(rounds)} | {counts:.0f} | {' | '.join(cells)} |")
    lines += [
        "",
        (
            f"Ours: every quantile within {TOLERANCE:.0%} of the truth in {within} of {len(mine)} rounds (worst"
            f" {max(off):.2%}); no arrival lost in {whole} of {len(mine)}."
        ),
        "wrk has no rate: its ten connections were paced to ten requests a second each by a script.",
        "Locust and hey count from the sending, and send nothing while they wait.",
    ]
    lines += [f"{name} was not there to be asked." for name in absent]
    write_page(PAGE, "What a stall looks like", "generator_stall", lines)
    return within == whole == len(mine)


if __name__ == "__main__":
    sys.exit(main())
