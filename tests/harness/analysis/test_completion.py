from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from harness.analysis.slo import Interval, Status
from harness.evaluation import load
from harness.sample import Mode
from tests.harness.synthetic import Plan, Rows, Spoil, write_sample_set

SECOND = 1_000_000_000
BURST = Plan(mode=Mode.BURST, runs=6, side_by_side=2)


def first_run(**fields: Any) -> Spoil:
    """Return a spoil that changes the first parent; `after_*` fields are seconds after its creation."""

    def spoil(rows: Rows) -> None:
        row = rows.runs[0]
        assert row.created_at_ns is not None
        changed: dict[str, Any] = {
            name.removeprefix("after_"): row.created_at_ns + int(value * SECOND) if name.startswith("after_") else value
            for name, value in fields.items()
        }
        rows.runs[0] = dataclasses.replace(row, **changed)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        # every run was seen finished within a second
        ([], Status.PASS),
        # seen unfinished after 31 s
        ([first_run(after_last_unfinished_at_ns=31, after_first_finished_at_ns=32)], Status.FAIL),
        # it ended somewhere between 29 and 31 s
        ([first_run(after_last_unfinished_at_ns=29, after_first_finished_at_ns=31)], Status.INCONCLUSIVE),
        # polling gave up at 20 s: no completion, and no proof that it takes 30 s
        ([first_run(after_last_unfinished_at_ns=20, first_finished_at_ns=None, final_status=None,
                    poll_timed_out=True)], Status.INCONCLUSIVE),
        # it ended, but did not complete
        ([first_run(final_status="FAILED")], Status.FAIL),
        # it was never created
        ([first_run(created_at_ns=None, run_id=None, final_status=None)], Status.FAIL),
    ],
)  # fmt: skip
def test_the_slowest_run_decides(tmp_path: Path, spoil: list[Spoil], expected: Status) -> None:
    evaluation = load([write_sample_set(tmp_path, BURST, spoil)])
    assert [one.verdict for one in evaluation.verdicts if one.name == "burst-completion"] == [expected]


def test_completion_is_an_interval_because_polling_only_brackets_it(tmp_path: Path) -> None:
    spoil = [first_run(after_last_unfinished_at_ns=12, after_first_finished_at_ns=13)]
    evaluation = load([write_sample_set(tmp_path, BURST, spoil)])
    found = next(one for one in evaluation.verdicts if one.name == "burst-completion")
    assert found.interval == Interval("slowest run", "s", 13.0, 12.0, 13.0, 30.0)
    assert found.reason == "The slowest of 6 runs took between 12 and 13 s."
