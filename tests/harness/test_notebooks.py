from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import BadUsage, ExitCode
from harness.notebooks import Notebook, applicable, check_parameters, find_notebooks

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "notebooks").glob("*.py"))

CELLS = """\
# %% [markdown]
# # A title
#
# Words.
#
# ## A section

# %% tags=["parameters"]
samples: list[str] = []
count: int = 3
share: float = 0.5

# %%
{code}
"""


def notebook(folder: Path, code: str = "count", cells: str = CELLS) -> Notebook:
    (folder / "made_up.py").write_text(cells.format(code=code), encoding="utf-8")
    return Notebook(folder / "made_up.py")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_notebook_is_thin(path: Path) -> None:
    lines = [cell.source.splitlines() for cell in Notebook(path).node.cells if cell.cell_type == "code"]
    code = [line for cell in lines for line in cell if line.strip() and not line.strip().startswith("#")]
    logic = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While, ast.If, ast.BinOp,
             ast.AugAssign, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.UnaryOp)  # fmt: skip
    found = [type(node).__name__ for node in ast.walk(ast.parse("\n".join(code))) if isinstance(node, logic)]
    assert (len(code) <= 60, found) == (True, [])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_notebook_shows_one_thing_per_cell(path: Path) -> None:
    cells = [cell for cell in Notebook(path).node.cells if cell.cell_type == "code"]
    shown = [cell.source for cell in cells if "parameters" not in cell.metadata.get("tags", [])]
    assert all(len(ast.parse(source).body) == 1 or source.startswith("from ") for source in shown)


def test_the_verdicts_are_shown_first() -> None:
    assert next(iter(find_notebooks(None, ROOT / "notebooks"))).name == "slo_compliance"


@pytest.mark.parametrize(
    ("modes", "baseline", "beside"),
    [
        # what every load has
        (["smoke"], False, []),
        (["smoke", "burst"], False, []),
        (["burst-limits"], False, ["burst_limits"]),
        (["capacity", "burst-limits"], False, ["burst_limits", "quota_table"]),
        (["soak", "burst"], False, ["soak_drift"]),
        (["smoke"], True, ["regression"]),
    ],
)
def test_a_notebook_with_nothing_to_show_is_left_out(modes: list[str], baseline: bool, beside: list[str]) -> None:
    shipped = find_notebooks(None, ROOT / "notebooks")
    found = [one.name for one in applicable(shipped, modes, baseline=baseline)]
    assert sorted(found) == sorted(["slo_compliance", "run_overview", *beside])


def test_a_notebook_of_somebody_s_own_is_always_run(tmp_path: Path) -> None:
    assert applicable([notebook(tmp_path)], ["smoke"], baseline=False) != ()


def test_a_notebook_tells_its_title_and_its_sections(tmp_path: Path) -> None:
    one = notebook(tmp_path)
    assert (one.title, one.contents) == ("A title", "a section")


def test_an_unknown_notebook_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(
        BadUsage, match=r"no notebook is called 'slo': there are slo_compliance, burst_limits"
    ) as refusal:
        find_notebooks(["slo"], ROOT / "notebooks")
    assert refusal.value.exit_code is ExitCode.USAGE


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"cuont": "3"}, "no notebook has a parameter 'cuont': there are count, share"),
        ({"count": "many"}, "notebook made_up: parameter 'count': expected int, got str"),
        ({"count": '"3"'}, "notebook made_up: parameter 'count': expected int, got str"),
        ({"count": "1.5"}, "notebook made_up: parameter 'count': expected int"),
        ({"count": "yes"}, "notebook made_up: parameter 'count': expected int, got bool"),
        ({"share": '"1.0"'}, "notebook made_up: parameter 'share': expected float, got str"),
        ({"count": "[1"}, "--parameter count: '\\[1' cannot be read"),
        ({"samples": "[a]"}, "--parameter: 'samples' is set by the report itself"),
    ],
)
def test_a_wrong_parameter_is_refused_before_anything_runs(tmp_path: Path, given: dict[str, str], said: str) -> None:
    with pytest.raises(BadUsage, match=said) as refusal:
        check_parameters([notebook(tmp_path)], {"samples": ["x"]}, given)
    assert refusal.value.exit_code is ExitCode.USAGE


def test_each_notebook_gets_the_parameters_that_it_has(tmp_path: Path) -> None:
    ours = {"samples": ["x"], "unasked": 1}
    assert check_parameters([notebook(tmp_path)], ours, {"count": "7"}) == {"made_up": {"samples": ["x"], "count": 7}}


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (CELLS.replace(' tags=["parameters"]', ""), "notebook made_up has no cell tagged `parameters`"),
        (CELLS + '\n# %% tags=["parameters"]\nmore: int = 1\n', "has 2 cells tagged `parameters`"),
        (CELLS.replace("count: int = 3", "count = 3"), "line 2 of its parameters is not `name: type = value`"),
        (CELLS.replace("count: int", "count: dict"), "parameter 'count' is a dict, known are str, int"),
        (
            CELLS.replace("count: int = 3", "count: int = 3 * 7"),
            "the default of parameter 'count' is computed, not written",
        ),
        (CELLS.replace("count: int = 3", "count: int ="), "line 2 of its parameters is no Python"),
        (
            CELLS.replace("count: int = 3", "count: int = 'three'"),
            "parameter 'count': expected int, got str by default",
        ),
    ],
)
def test_a_notebook_whose_parameters_cannot_be_trusted_is_refused(tmp_path: Path, cells: str, said: str) -> None:
    with pytest.raises(BadUsage, match=said):
        notebook(tmp_path, cells=cells)


def test_a_parameters_cell_that_jupyter_reads_otherwise_is_refused(tmp_path: Path) -> None:
    one = notebook(tmp_path, cells=CELLS.replace("count: int", "# %pwd\ncount: int"))
    with pytest.raises(BadUsage, match="notebook made_up: its cell tagged `parameters` cannot be told"):
        one.node  # noqa: B018 - reading it is the check


def test_nothing_slow_is_imported_to_refuse_a_parameter() -> None:
    asked = "import sys, harness.__main__, harness.notebooks as n, pathlib; "
    asked += "n.find_notebooks(None, pathlib.Path('notebooks')); print(*sys.modules)"
    loaded = subprocess.run(  # noqa: S603 - our own words
        [sys.executable, "-c", asked], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    assert {"pandas", "matplotlib", "papermill", "jupytext", "nbconvert"} & set(loaded) == set()
