"""Which rows share a fate."""

from __future__ import annotations

import pandas as pd
import pytest

from harness.analysis.dataset import groups_of


@pytest.mark.parametrize(
    ("mode", "groups"),
    [
        ("smoke", [0, 0, 1, 2]),  # the run
        ("burst-limits", [0, 0, 0, 1]),  # the burst: a trial of one level is no trial of another
    ],
)
def test_the_independent_unit_is_the_run_or_where_runs_start_together_the_burst(mode: str, groups: list[int]) -> None:
    rows = pd.DataFrame(
        {
            "measurement_id": "m",
            "mode": mode,
            "root_key": ["1", "1", "2", "3"],
            "level": [10.0, 10.0, 10.0, 20.0],
            "trial": 0,
        }
    )
    assert groups_of(rows).tolist() == groups
