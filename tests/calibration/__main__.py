"""`make calibrate`: how often the statistics are wrong, measured in worlds whose truth is known.

Writes docs/evidence/burst-limits-calibration.md. Exit code 1 when what the page claims does not hold.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.calibration.burst_page import measure_bursts, page

PAGE = Path("docs/evidence/burst-limits-calibration.md")


def main() -> int:
    """Measure, write the page, and say what was missed."""
    measured = measure_bursts()
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(measured), encoding="utf-8")
    missed = [bar.sentence for bar in measured.bars if not bar.met]
    sys.stdout.write("\n".join([*(bar.sentence for bar in measured.bars), f"written: {PAGE}", ""]))
    sys.stderr.writelines(f"missed: {sentence}\n" for sentence in missed)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
