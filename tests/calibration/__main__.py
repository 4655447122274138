"""`make calibrate`: how often the statistics are wrong, measured in worlds whose truth is known.

Writes docs/evidence/burst-limits-calibration.md and docs/evidence/recalibration.md. Exit code 1 when what a page claims
does not hold.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.calibration import burst_page, recalibration_page
from tests.calibration.burst_page import Bar

EVIDENCE = Path("docs/evidence")


def bursts() -> tuple[str, Sequence[Bar]]:
    """Return the page on burst limits and what it must hold."""
    measured = burst_page.measure_bursts()
    return burst_page.page(measured), measured.bars


def recalibration() -> tuple[str, Sequence[Bar]]:
    """Return the page on recalibrations and what it must hold."""
    measured = recalibration_page.measure_recalibrations()
    return recalibration_page.page(measured), measured.bars


PAGES: Mapping[str, Callable[[], tuple[str, Sequence[Bar]]]] = {
    "burst-limits-calibration": bursts,
    "recalibration": recalibration,
}
"""Every page by its name; `python -m tests.calibration NAME` writes one of them."""


def main(names: Sequence[str]) -> int:
    """Measure, write the pages, and say what was missed."""
    if unknown := [name for name in names if name not in PAGES]:
        sys.stderr.write(f"{unknown[0]}: no such page; give some of {', '.join(PAGES)}\n")
        return 64
    EVIDENCE.mkdir(parents=True, exist_ok=True)
    missed = []
    for name in names or PAGES:
        content, bars = PAGES[name]()
        path = EVIDENCE / f"{name}.md"
        path.write_text(content, encoding="utf-8")
        missed += [bar.sentence for bar in bars if not bar.met]
        sys.stdout.write("\n".join([*(bar.sentence for bar in bars), f"written: {path}", ""]))
    sys.stderr.writelines(f"missed: {sentence}\n" for sentence in missed)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
