"""`make calibrate`: how often the statistics are wrong, measured in worlds whose truth is known.

Writes docs/evidence/*-calibration.md, of every study or of those that are named. Exit code 1 when what a page claims
does not hold, 64 for a name that is no study's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.calibration import (
    burst_page,
    drift_study,
    gate_study,
    history_study,
    quantile_study,
    rate_page,
    recalibration_page,
)
from tests.calibration.effort import DEFAULT, NIGHTLY, Bar, Effort

FOLDER = Path("docs/evidence")

Study = Callable[[Effort], tuple[str, Sequence[Bar]]]


def _study(module: Any) -> Study:
    """Return a module's study: it measures, says what must hold, and writes its page."""

    def carry_out(effort: Effort) -> tuple[str, Sequence[Bar]]:
        found = module.measure(effort)
        return module.page(found, effort), module.bars(found)

    return carry_out


def _bursts(_: Effort) -> tuple[str, Sequence[Bar]]:
    """Search for burst limits; one size, whatever the effort."""
    measured = burst_page.measure_bursts()
    return burst_page.page(measured), measured.bars


def _capacity(_: Effort) -> tuple[str, Sequence[Bar]]:
    """Search for capacities; one size, whatever the effort."""
    measured = rate_page.measure_rates()
    return rate_page.rate_page(measured), measured.bars


def _recalibration(_: Effort) -> tuple[str, Sequence[Bar]]:
    """Simulate recalibrations by the hundred; one size, whatever the effort."""
    measured = recalibration_page.measure_recalibrations()
    return recalibration_page.page(measured), measured.bars


STUDIES: dict[str, Study] = {
    "burst-limits": _bursts,
    "capacity": _capacity,
    "quantiles": _study(quantile_study),
    "drift": _study(drift_study),
    "regression": _study(gate_study),
    "history": _study(history_study),
    "recalibration": _recalibration,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the pages, and say what was missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.calibration", description=__doc__)
    parser.add_argument("studies", nargs="*", help=f"of {', '.join(STUDIES)}; all when none is named")
    parser.add_argument("--effort", choices=[DEFAULT.name, NIGHTLY.name], default=DEFAULT.name)
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.studies) - set(STUDIES))
    if unknown:
        sys.stderr.write(f"calibrate: no study {unknown[0]!r}; there are {', '.join(STUDIES)}\n")
        return 64
    effort = NIGHTLY if given.effort == NIGHTLY.name else DEFAULT
    FOLDER.mkdir(parents=True, exist_ok=True)
    missed: list[str] = []
    for name in given.studies or STUDIES:
        started = time.monotonic()
        text, bars = STUDIES[name](effort)
        path = FOLDER / f"{name}-calibration.md"
        path.write_text(text, encoding="utf-8")
        missed += [bar.sentence for bar in bars if not bar.met]
        sys.stdout.write("\n".join([*(bar.sentence for bar in bars), f"written: {path}", ""]))
        sys.stdout.write(f"{name}: {time.monotonic() - started:.0f} s\n")
        sys.stdout.flush()
    sys.stderr.writelines(f"missed: {sentence}\n" for sentence in missed)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
