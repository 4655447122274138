"""`python -m tests.simulator --steps N [--seed S]`: simulate until N steps were taken, and say how fast."""

from __future__ import annotations

import argparse
import logging
import sys
import time

import structlog

from tests.simulator.audit import Broken
from tests.simulator.world import simulate

CHUNK = 100_000
"""Steps between two lines of progress."""


def main() -> int:
    """Return 0 when every promise held, 1 when one was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulator", description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000, help="how many steps to take")
    parser.add_argument("--seed", type=int, default=0, help="the first episode's seed; the next one's is one higher")
    asked = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    started, taken, seed = time.perf_counter(), 0, asked.seed
    while taken < asked.steps:
        try:
            taken += simulate(seed, min(CHUNK, asked.steps - taken))
        except Broken as broken:
            sys.stdout.write(f"broken: {broken}\n")
            return 1
        seed += CHUNK
        sys.stdout.write(f"{taken} steps, {taken / (time.perf_counter() - started):.0f} per second\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
