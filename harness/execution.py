"""Runs notebooks through papermill, and turns them into pages that need no network.

The kernel is reached over a socket in a private folder, not over TCP, keeps its settings there and imports this very
`harness`. papermill takes a notebook that left early for success; here it is a failure. What a notebook's parameters
may be was checked before, by `notebooks`. Slow to import. Next: `report`.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import nbformat
import papermill
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

import harness
from harness.errors import HarnessError
from harness.notebooks import Notebook

TEMPLATES = Path(__file__).parent / "templates"
START_TIMEOUT_S = 60
"""A kernel starts in 1 to 3 s on an idle machine; a minute is a machine in trouble."""

CELL_TIMEOUT_S = 600
"""No cell of ours takes more than seconds; ten minutes is one that hangs."""

TEMPORARY_CHARACTERS_MAX = 70
"""A socket's path may have 103 characters on macOS, 107 on Linux; ours adds some 25 to that of the temporary folder."""


class NotebookFailed(HarnessError):
    """A notebook did not run to its end, so its page would not show what was measured."""

    def __init__(self, name: str, fault: str) -> None:
        super().__init__(f"notebook {name} failed: {fault}")
        self.name = name


def run_notebook(notebook: Notebook, parameters: Mapping[str, object], target: Path, root: Path) -> NotebookNode:
    """Execute a notebook in the checkout at `root`, keep it executed at `target`, and return it.

    Raises NotebookFailed with the cell's own error.
    """
    node = nbformat.from_dict(notebook.node)  # type: ignore[no-untyped-call]
    with _kernel_surroundings(root) as config:
        try:
            executed: NotebookNode = papermill.execute_notebook(
                node, str(target), parameters=dict(parameters), kernel_name="python3", cwd=str(root),
                language="python", progress_bar=False, start_timeout=START_TIMEOUT_S,
                execution_timeout=CELL_TIMEOUT_S, config=config,
                extra_arguments=["--IPKernelApp.log_level=50"],  # it calls its own shutdown an error
            )  # fmt: skip
        except PapermillExecutionError as fault:
            raise NotebookFailed(notebook.name, f"{fault.ename}: {fault.evalue}") from None
        except (RuntimeError, OSError) as fault:
            raise NotebookFailed(notebook.name, f"{type(fault).__name__}: {' '.join(str(fault).split())}") from fault
    # papermill takes sys.exit(0) for success and leaves out the cells after it.
    skipped = [cell for cell in executed.cells if cell.cell_type == "code" and cell.execution_count is None]
    broken = [one for cell in executed.cells for one in cell.get("outputs", []) if one.output_type == "error"]
    if skipped or broken:
        raise NotebookFailed(notebook.name, f"it ended early, {len(skipped)} of its cells did not run")
    return executed


def page_of(node: NotebookNode, resources: Mapping[str, object]) -> str:
    """Return an executed notebook as one page: no code, no script, nothing loaded from anywhere."""
    exporter = HTMLExporter(  # type: ignore[no-untyped-call]
        template_name="notebook", extra_template_basedirs=[str(TEMPLATES)], exclude_input=True,
        exclude_input_prompt=True, exclude_output_prompt=True, embed_images=True,
        exclude_anchor_links=True,
    )  # fmt: skip
    page, _ = exporter.from_notebook_node(node, resources={"plimsoll": dict(resources)})
    return page


@contextlib.contextmanager
def _kernel_surroundings(root: Path) -> Iterator[Config]:
    """Give a kernel a private folder for its sockets and settings, and this harness to import; undone afterwards."""
    package = Path(harness.__file__).parent.parent
    paths = [str(root), str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    room = len(tempfile.gettempdir()) <= TEMPORARY_CHARACTERS_MAX
    with tempfile.TemporaryDirectory(prefix="plimsoll-", dir=None if room else "/tmp") as private:  # noqa: S108 - made private
        wanted = {
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
            "JUPYTER_RUNTIME_DIR": private,
            "JUPYTER_CONFIG_DIR": private,
            "JUPYTER_DATA_DIR": private,
            "IPYTHONDIR": private,
        }
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield Config({"KernelManager": {"transport": "ipc", "ip": f"{private}/k"}})
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
