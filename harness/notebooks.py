"""Runs notebooks through papermill, and turns them into pages that need no network.

papermill passes silently where it should not: an unknown parameter is a warning, a missing `parameters` cell lets the
defaults win, a text is taken for a number. So before anything runs, the `parameters` cell is read, a typed model is
derived from its annotations, and every value is checked against it. The kernel is reached over a socket in a private
folder, not over TCP, and imports this very `harness`.
"""

from __future__ import annotations

import ast
import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jupytext
import msgspec
import nbformat
import papermill
import yaml
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

import harness
from harness.errors import BadUsage, HarnessError

FOLDER = "notebooks"
FIRST = "slo_compliance"
"""What a reader wants first; the other notebooks follow by name."""

TEMPLATES = Path(__file__).parent / "templates"
START_TIMEOUT_S = 60
"""A kernel starts in 1 to 3 s on an idle machine; a minute is a machine in trouble."""

CELL_TIMEOUT_S = 600
"""No cell of ours takes more than seconds; ten minutes is one that hangs."""

TEMPORARY_CHARACTERS_MAX = 70
"""A socket's path may have 103 characters on macOS, 107 on Linux; ours adds some 25 to that of the temporary folder."""

PARAMETER_TYPES: dict[str, Any] = {
    "str": str, "int": int, "float": float, "bool": bool,
    "list[str]": list[str], "list[int]": list[int], "list[float]": list[float],
}  # fmt: skip
"""What a parameter may be: what papermill carries into a notebook unchanged."""


class NotebookFailed(HarnessError):
    """A notebook did not run to its end, so its page would not show what was measured."""

    def __init__(self, name: str, fault: str) -> None:
        super().__init__(f"notebook {name} failed: {fault}")
        self.name = name


class Notebook:
    """One notebook and the typed model of its parameters."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.stem
        self.node: NotebookNode = jupytext.read(path, fmt="py:percent")
        self.parameters = _parameter_model(self.name, self.node)

    @property
    def title(self) -> str:
        """Return its first heading, or its name."""
        lines = (line for cell in self.node.cells if cell.cell_type == "markdown" for line in cell.source.splitlines())
        return next((line.lstrip("# ") for line in lines if line.startswith("# ")), self.name)

    @property
    def contents(self) -> str:
        """Return the headings of its sections, in a row."""
        lines = (line for cell in self.node.cells if cell.cell_type == "markdown" for line in cell.source.splitlines())
        return ", ".join(line.removeprefix("## ").lower() for line in lines if line.startswith("## "))


def find_notebooks(names: Sequence[str] | None, folder: Path) -> tuple[Notebook, ...]:
    """Return the notebooks named, or all of the folder. Raises BadUsage for a name that is none of them."""
    known = sorted((path.stem for path in folder.glob("*.py")), key=lambda name: (name != FIRST, name))
    for name in names or ():
        if name not in known:
            raise BadUsage(f"no notebook is called {name!r}: there are {', '.join(known) or 'none'} in {folder}")
    return tuple(Notebook(folder / f"{name}.py") for name in dict.fromkeys(names if names is not None else known))


def check_parameters(
    notebooks: Sequence[Notebook], ours: Mapping[str, object], given: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Return each notebook's parameters: ours where it has them, and those given, each checked against its type.

    A value given is read as YAML, and never turned into another type. Raises BadUsage for a name that no notebook has
    or a value of the wrong type.
    """
    known = {field for notebook in notebooks for field in notebook.parameters.__struct_fields__}
    for name in given:
        if name in ours:
            raise BadUsage(f"parameter {name!r} is set by the report itself: use its flag")
        if name not in known:
            raise BadUsage(f"no notebook has a parameter {name!r}: there are {', '.join(sorted(known - set(ours)))}")
    read = {name: _read_value(name, text) for name, text in given.items()}
    checked: dict[str, dict[str, Any]] = {}
    for notebook in notebooks:
        fields = notebook.parameters.__struct_fields__
        values = {name: value for name, value in {**ours, **read}.items() if name in fields}
        try:
            msgspec.convert(values, notebook.parameters, strict=True)
        except msgspec.ValidationError as fault:
            raise BadUsage(f"notebook {notebook.name}: {_plainly(str(fault))}") from None
        checked[notebook.name] = values
    return checked


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


def _parameter_model(name: str, node: NotebookNode) -> type[msgspec.Struct]:
    """Derive the typed model from the notebook's parameters cell. Raises BadUsage when it has none, or one untyped."""
    cells = [cell for cell in node.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        found = "no cell" if not cells else f"{len(cells)} cells"
        raise BadUsage(f"notebook {name} has {found} tagged `parameters`: it needs one, or its defaults would win")
    fields: list[tuple[str, Any, Any]] = []
    defaults: dict[str, object] = {}
    for line in _lines(name, cells[0].source):
        if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value is not None):
            raise BadUsage(f"notebook {name}: line {line.lineno} of its parameters is not `name: type = value`")
        written, parameter = ast.unparse(line.annotation), line.target.id
        if written not in PARAMETER_TYPES:
            known = ", ".join(PARAMETER_TYPES)
            raise BadUsage(f"notebook {name}: parameter {parameter!r} is a {written}, known are {known}")
        try:
            defaults[parameter] = ast.literal_eval(line.value)
        except ValueError:
            raise BadUsage(
                f"notebook {name}: the default of parameter {parameter!r} is computed, not written"
            ) from None
        fields.append((parameter, PARAMETER_TYPES[written], msgspec.UNSET))
    model = msgspec.defstruct(f"{name}_parameters", [(field, kind) for field, kind, _ in fields], kw_only=True)
    try:
        msgspec.convert(defaults, model, strict=True)
    except msgspec.ValidationError as fault:
        raise BadUsage(f"notebook {name}: {_plainly(str(fault))} by default") from None
    optional = [(field, kind | msgspec.UnsetType, msgspec.UNSET) for field, kind, _ in fields]
    return msgspec.defstruct(f"{name}_parameters", optional, frozen=True, forbid_unknown_fields=True)


def _lines(name: str, source: str) -> list[ast.stmt]:
    """Return a cell's statements. Raises BadUsage when it is no Python."""
    try:
        return ast.parse(source).body
    except SyntaxError as fault:
        raise BadUsage(f"notebook {name}: line {fault.lineno} of its parameters is no Python ({fault.msg})") from None


def _read_value(name: str, text: str) -> object:
    """Return the value that a parameter's text means."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as fault:
        raise BadUsage(f"parameter {name!r}: {text!r} cannot be read ({' '.join(str(fault).split())})") from None


def _plainly(fault: str) -> str:
    """Turn msgspec's "Expected `int`, got `str` - at `$.slowest`" into a sentence that starts with the parameter."""
    what, _, where = fault.replace("`", "").partition(" - at $.")
    return f"parameter {where!r}: {what.lower()}" if where else what


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
            "IPYTHONDIR": private,
            "MPLCONFIGDIR": os.environ.get("MPLCONFIGDIR", private),
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
