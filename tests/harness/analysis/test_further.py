"""What would settle an open question, in samples and in runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.analysis.further import further_words
from harness.evaluation import load
from harness.sample import Mode
from tests.harness.synthetic import Plan, write_sample_set


@pytest.mark.parametrize(
    ("more", "unit", "units", "mode", "said"),
    [
        # 5 runs gave 10 polls, so 49 more polls are 24.5 more runs
        (49, "snapshot requests", 10, Mode.SMOKE,
         (" 49 more snapshot requests like these would settle it: 30 runs of this load instead of 5, --runs 30"
          " (make report REPORT_RUNS=30).")),
        # only smoke load is what `make report` makes
        (1, "runs", 5, Mode.SOAK,
         " 1 more run like these would settle it: 6 runs of this load instead of 5, --runs 6."),
        # a burst is several runs
        (3, "bursts", 1, Mode.BURST,
         " 3 more bursts like these would settle it: 20 runs of this load instead of 5, --runs 20."),
        # no load may be that large
        (10**9, "requests", 10, Mode.SMOKE,
         " 1,000,000,000 more requests like these would settle it, far more than a load of 100,000 runs gives."),
        # an imported load has no such flag
        (4, "requests", 10, Mode.IMPORT, " 4 more requests like these would settle it."),
        # nothing was counted by which to convert
        (4, "requests", 0, Mode.SMOKE, " 4 more requests like these would settle it."),
        # the share seen is the limit itself
        (None, "requests", 10, Mode.SMOKE, " No number of further samples like these would settle it."),
    ],
)  # fmt: skip
def test_further_samples_are_told_as_runs(
    tmp_path: Path, more: int | None, unit: str, units: int, mode: Mode, said: str
) -> None:
    data = load([write_sample_set(tmp_path, Plan(runs=5))]).data
    assert further_words(more, unit, units, mode, data) == said


def test_so_many_runs_do_settle_it(tmp_path: Path) -> None:
    found = load([write_sample_set(tmp_path, Plan(runs=30))])
    assert [one.verdict for one in found.verdicts if one.name == "snapshot-p95"] == ["PASS"]
