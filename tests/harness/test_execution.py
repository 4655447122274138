"""Notebooks that do not run to their end; the whole report is in `test_report`."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.errors import ExitCode
from harness.execution import NotebookFailed, run_notebook
from harness.notebooks import Notebook

CELLS = """\
# %% tags=["parameters"]
count: int = 3

# %%
{code}
"""


def notebook(folder: Path, code: str) -> Notebook:
    (folder / "made_up.py").write_text(CELLS.format(code=code), encoding="utf-8")
    return Notebook(folder / "made_up.py")


def test_a_cell_that_raises_fails_the_notebook_and_names_the_error(tmp_path: Path) -> None:
    one = notebook(tmp_path, code="raise ValueError('only %d' % count)")
    with pytest.raises(NotebookFailed, match="notebook made_up failed: ValueError: only 7") as refusal:
        run_notebook(one, {"count": 7}, tmp_path / "made_up.ipynb", tmp_path)
    assert refusal.value.exit_code is ExitCode.INVALID


def test_a_cell_that_leaves_early_fails_the_notebook(tmp_path: Path) -> None:
    one = notebook(tmp_path, code="import sys\nsys.exit(0)")
    with pytest.raises(NotebookFailed, match="notebook made_up failed: it ended early"):
        run_notebook(one, {}, tmp_path / "made_up.ipynb", tmp_path)
