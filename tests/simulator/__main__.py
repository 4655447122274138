"""`python -m tests.simulator --steps N [--seed S]`: simulate until N steps were taken, and say what that came to."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter
from pathlib import Path

import structlog

from harness.machine import commit
from tests.simulator.breach import Broken
from tests.simulator.evidence import Simulated, find_mutants, page
from tests.simulator.world import simulate

CHUNK = 100_000
"""Steps between two lines of progress, and seeds between two chunks."""


def main() -> int:
    """Return 0 when every promise held, 1 when one was broken or a seeded bug was not found."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulator", description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000, help="how many steps to take")
    parser.add_argument("--seed", type=int, default=0, help="the first episode's seed; the next one's is one higher")
    parser.add_argument("--evidence", type=Path, help="also look for every seeded bug, and write this page")
    asked = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    began_at = commit()
    began_s, taken, episodes, seen, seed = time.perf_counter(), 0, 0, Counter[str](), asked.seed
    while taken < asked.steps:
        try:
            lived = simulate(seed, min(CHUNK, asked.steps - taken))
        except Broken as broken:
            sys.stdout.write(f"broken: {broken}\n")
            return 1
        taken, episodes, seen = taken + lived.steps, episodes + lived.episodes, seen + lived.seen
        seed += CHUNK
        sys.stdout.write(f"{taken} steps, {taken / (time.perf_counter() - began_s):.0f} per second\n")
    duration_s = time.perf_counter() - began_s
    mutants = find_mutants() if asked.evidence is not None else []
    simulated = Simulated(asked.seed, taken, episodes, duration_s, seen, mutants, began_at)
    sys.stdout.write("".join(f"{line}\n" for line in simulated.lines()))
    if asked.evidence is not None:
        command = f"make simulate STEPS={asked.steps} SEED={asked.seed} EVIDENCE={asked.evidence}"
        asked.evidence.write_text(page(simulated, command), encoding="utf-8")
    return int(any(each.episode is None for each in mutants))


if __name__ == "__main__":
    sys.exit(main())
