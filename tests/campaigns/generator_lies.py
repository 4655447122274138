"""Does the open loop know when it lies? `make bench-harness` spoils its runs and counts which of them it flags.

Each fault is done to the real sending process of a short measurement on a healthy target; a run is flagged when
`analysis/validity` finds a reason not to trust it, as `harness run` does before it exits with 2. Clean runs in between
must not be flagged. Writes docs/evidence/generator-lies.md.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from harness.evaluation import find_faults_in
from tests.campaigns.evidence import write_page
from tests.campaigns.flags import Flags
from tests.campaigns.openly import Interference, constant, measured, plan, served

PAGE = Path("docs/evidence/generator-lies.md")
RATE_PER_S, DURATION_S = 100.0, 2.0
SLOW_MS = 50.0
HOG_S = 0.4
HOG = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
if sys.argv[2] == "real-time":
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
end = time.monotonic() + float(sys.argv[3])
while time.monotonic() < end:
    pass
"""


def freeze(senders: list[int]) -> None:
    """Stop the sending process for 200 ms."""
    time.sleep(0.8)
    os.kill(senders[0], signal.SIGSTOP)
    time.sleep(0.2)
    os.kill(senders[0], signal.SIGCONT)


def hog(kind: str, count: int) -> Interference:
    """Return what keeps the core busy that the sending process is bound to."""

    def keep_busy(senders: list[int]) -> None:
        core = max(os.sched_getaffinity(0))
        os.sched_setaffinity(senders[0], {core})
        time.sleep(0.5)
        words = [sys.executable, "-c", HOG, str(core), kind, str(HOG_S)]
        hogs = [subprocess.Popen(words) for _ in range(count)]  # noqa: S603 - our own words
        for each in hogs:
            each.wait()

    return keep_busy


def exhaust(target: int) -> Interference:
    """Return what takes every free descriptor from the sending process, then makes it need one."""

    def take(senders: list[int]) -> None:
        used = len(os.listdir(f"/proc/{senders[0]}/fd"))
        resource.prlimit(senders[0], resource.RLIMIT_NOFILE, (used, used))
        time.sleep(0.3)
        os.kill(target, signal.SIGSTOP)  # requests that wait for their answer hold the connections
        time.sleep(0.3)
        os.kill(target, signal.SIGCONT)

    return take


@dataclass
class Tried:
    """What came of one kind of run."""

    what: str
    must_flag: bool | None  # None: it need not be one or the other
    runs: int = 0
    flagged: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def kept(self) -> bool:
        """Whether every run was flagged, or hardly one."""
        if self.must_flag is None:
            return True
        return self.flagged == self.runs if self.must_flag else self.flagged <= max(1, self.runs // 100)


def attempt(kind: Tried, url: str, folder: Path, connections: int, interfere: Interference | None) -> None:
    """Make one run of its kind."""
    schedule = constant(RATE_PER_S, DURATION_S)
    path = measured(plan(url, schedule, connections=connections), url, folder, interfere).path
    findings = find_faults_in(path)
    kind.runs += 1
    kind.flagged += bool(findings)
    for finding in findings:
        kind.reasons["".join("#" if each.isdigit() else each for each in finding.detail)] += 1


def campaign(faults: int, clean: int) -> list[Tried]:
    """Make all runs, the kinds in turn, so that whatever else this machine does meets them all."""
    kinds: list[tuple[Tried, int, Callable[[int], Interference] | None, int, str]] = [
        (Tried("generator stopped for 200 ms (SIGSTOP)", must_flag=True), 64, lambda _: freeze, faults, "fast"),
        (Tried(f"its core taken for {HOG_S:g} s by a busy process of real-time class", must_flag=True), 64,
         lambda _: hog("real-time", 1), faults, "fast"),
        (Tried(f"its core shared with 3 ordinary busy processes for {HOG_S:g} s", must_flag=None), 64,
         lambda _: hog("ordinary", 3), faults, "fast"),
        (Tried(f"1 connection where {RATE_PER_S:g} requests/s of {SLOW_MS:g} ms need 5", must_flag=True), 1, None,
         faults, "slow"),
        (Tried("no free descriptors", must_flag=True), 64, exhaust, faults, "fast"),
        (Tried("clean", must_flag=False), 64, None, clean, "fast"),
    ]  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as folder,
        served("tests.campaigns.targets") as fast,
        served("tests.campaigns.targets", "--delay-ms", str(SLOW_MS)) as slow,
    ):
        targets = {"fast": fast, "slow": slow}
        turns = max(faults, 1)
        for turn in range(turns):
            for kind, connections, interference, wanted, target in kinds:
                for _ in range((turn + 1) * wanted // turns - turn * wanted // turns):
                    url, pid = targets[target]
                    attempt(kind, url, Path(folder), connections, interference and interference(pid))
            done = sum(kind.runs for kind, *_ in kinds)
            print(f"turn {turn + 1}: {done} runs", file=sys.stderr, flush=True)  # noqa: T201 - a campaign prints
    return [kind for kind, *_ in kinds]


def page(tried: list[Tried]) -> list[str]:
    """Return the table."""
    lines = [
        (
            f"Runs of {DURATION_S:g} s at {RATE_PER_S:g} requests/s on a healthy target, one sending process, all kinds"
            " in turn. Flagged: `analysis/validity` found a reason, and `harness run` ends with 2."
        ),
        "",
        "| what was done | flagged | must be |",
        "|---|---|---|",
    ]
    wanted = {True: "all", False: "at most 1 of 100", None: "-"}
    lines += [f"| {kind.what} | {kind.flagged} of {kind.runs} | {wanted[kind.must_flag]} |" for kind in tried]
    lines += ["", "The reasons that were given, digits as #:", ""]
    for kind in tried:
        lines += [f"- {kind.what}: {reason} ({count})" for reason, count in kind.reasons.most_common(3)]
    lines += [
        "",
        (
            "Busy processes of ordinary class on the sender's own core do not make it late: Linux gives it at once"
            " to the one that slept. Those runs are what they say and need not be flagged. One of real-time class does."
        ),
    ]
    return lines


def main() -> int:
    parser = Flags("generator_lies", __doc__)
    parser.add_argument("--faults", type=int, default=50, help="runs of each fault (default: %(default)s)")
    parser.add_argument("--clean", type=int, default=100, help="clean runs (default: %(default)s)")
    asked = parser.parse_args()
    tried = campaign(asked.faults, asked.clean)
    write_page(PAGE, "The open loop knows when it lies", "generator_lies", page(tried))
    return 0 if all(kind.kept for kind in tried) else 1


if __name__ == "__main__":
    sys.exit(main())
