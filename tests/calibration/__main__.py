"""`make calibrate`: how often the statistics are wrong, measured in worlds whose truth is known.

Writes docs/evidence/*-calibration.md; `python -m tests.calibration capacity` writes one of them alone. Exit code 1 when
what a page claims does not hold.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from tests.calibration.burst_page import Bar, measure_bursts, page
from tests.calibration.rate_page import measure_rates, rate_page

EVIDENCE = Path("docs/evidence")


def burst_limits() -> tuple[str, list[Bar]]:
    """Return the page on burst limits and what must hold."""
    measured = measure_bursts()
    return page(measured), measured.bars


def capacity() -> tuple[str, list[Bar]]:
    """Return the page on capacity and what must hold."""
    measured = measure_rates()
    return rate_page(measured), measured.bars


PAGES: dict[str, Callable[[], tuple[str, list[Bar]]]] = {"burst-limits": burst_limits, "capacity": capacity}


def main(names: list[str]) -> int:
    """Measure, write the pages named (all without names), and say what was missed."""
    if unknown := [name for name in names if name not in PAGES]:
        sys.stderr.write(f"{unknown[0]!r} is no page: give some of {', '.join(PAGES)}\n")
        return 64
    missed: list[str] = []
    EVIDENCE.mkdir(parents=True, exist_ok=True)
    for name in names or PAGES:
        text, bars = PAGES[name]()
        file = EVIDENCE / f"{name}-calibration.md"
        file.write_text(text, encoding="utf-8")
        missed += [bar.sentence for bar in bars if not bar.met]
        sys.stdout.write("\n".join([*(bar.sentence for bar in bars), f"written: {file}", ""]))
    sys.stderr.writelines(f"missed: {sentence}\n" for sentence in missed)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
