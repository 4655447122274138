"""What would settle an open question: so many more samples, and so many runs of the same load.

The unit of a bound (a run, a burst, a request) is not what a person can ask for; runs are. How many units a run gives
is counted in the samples at hand. Next: `judges` and `throughput`, whose reasons end with these words.
"""

from __future__ import annotations

import math

from harness.analysis.dataset import Dataset
from harness.analysis.slo import plural
from harness.arrivals import RUNS_MAX
from harness.sample import Mode

ASKED_BY_RUNS = frozenset({Mode.SMOKE, Mode.BURST, Mode.SOAK})
"""Loads whose size is given as a number of runs."""


def further_words(more: int | None, unit: str, units: int, mode: Mode, data: Dataset) -> str:
    """Return the sentence that says what would settle the question, with a space before it.

    `more` is how many more of `unit` (a noun in the plural) would do, null when no number would; `units` is how many
    these samples hold. The runs that `data` holds are those of `mode`.
    """
    if more is None:
        return " No number of further samples like these would settle it."
    words = f" {plural(more, f'more {unit}')} like these would settle it"
    runs = int(data.runs["parent_run_key"].isna().sum())
    if mode not in ASKED_BY_RUNS or not runs or not units:
        return f"{words}."
    needed = runs + math.ceil(more * runs / units)
    if needed > RUNS_MAX:
        return f"{words}, far more than a load of {RUNS_MAX:,} runs gives."
    make = f" (make report REPORT_RUNS={needed})" if mode is Mode.SMOKE else ""
    return f"{words}: {plural(needed, 'runs')} of this load instead of {runs:,}, --runs {needed}{make}."
