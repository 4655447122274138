"""Which notebooks there are, and what their parameters may be.

papermill passes silently where it should not: an unknown parameter is a warning, a missing `parameters` cell lets the
defaults win, a text is taken for a number. So before anything runs, the `parameters` cell is read, a typed model is
derived from its annotations, and every value is checked against it. That needs nothing slow; Jupyter's own reading of
the file comes after it, and must find the same cell. Next: `execution`, which runs them.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import yaml

from harness.errors import BadUsage
from harness.sample import Mode

if TYPE_CHECKING:
    from nbformat import NotebookNode

TAG = "parameters"
"""Marks the cell whose values papermill replaces."""

FIRST = "slo_compliance"
"""What a reader wants first; the other notebooks follow by name."""

APPLIES_TO: dict[str, frozenset[Mode]] = {
    "burst_limits": frozenset({Mode.BURST_LIMITS}),
    "quota_table": frozenset({Mode.CAPACITY}),
    "soak_drift": frozenset({Mode.SOAK}),
}
"""Loads without which a notebook has nothing to show; it is run on others only when it is named. All others always."""

NEEDS_BASELINE = frozenset({"regression"})
"""Notebooks that compare: run where a baseline is given, or when they are named."""

PARAMETER_TYPES: dict[str, Any] = {
    "str": str, "int": int, "float": float, "bool": bool,
    "list[str]": list[str], "list[int]": list[int], "list[float]": list[float],
}  # fmt: skip
"""What a parameter may be: what papermill carries into a notebook unchanged."""


class Notebook:
    """One notebook and the typed model of its parameters."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.stem
        self._source = _parameters_cell(self.name, path.read_text(encoding="utf-8"))
        self.parameters = _parameter_model(self.name, self._source)

    @functools.cached_property
    def node(self) -> NotebookNode:
        """Return it as Jupyter has it. Raises BadUsage when its parameters are not those that were checked."""
        import jupytext  # takes seconds; bad usage is told before

        node: NotebookNode = jupytext.read(self.path, fmt="py:percent")
        tagged = [cell.source for cell in node.cells if TAG in cell.metadata.get("tags", [])]
        if [source.strip() for source in tagged] != [self._source]:
            raise BadUsage(f'notebook {self.name}: its cell tagged `{TAG}` cannot be told; write # %% tags=["{TAG}"]')
        return node

    @property
    def title(self) -> str:
        """Return its first heading, or its name."""
        lines = (line for cell in self.node.cells if cell.cell_type == "markdown" for line in cell.source.splitlines())
        return next((line.lstrip("# ") for line in lines if line.startswith("# ")), self.name)

    @property
    def contents(self) -> str:
        """Return the headings of its sections, in a row."""
        lines = (line for cell in self.node.cells if cell.cell_type == "markdown" for line in cell.source.splitlines())
        return ", ".join(line[3:4].lower() + line[4:] for line in lines if line.startswith("## "))


def find_notebooks(names: Sequence[str] | None, folder: Path) -> tuple[Notebook, ...]:
    """Return the notebooks named, or all of the folder. Raises BadUsage for a name that is none of them."""
    known = sorted((path.stem for path in folder.glob("*.py")), key=lambda name: (name != FIRST, name))
    for name in names or ():
        if name not in known:
            there = ", ".join(known) or "none"
            raise BadUsage(f"--notebooks: no notebook is called {name!r}: there are {there} in {folder}")
    return tuple(Notebook(folder / f"{name}.py") for name in dict.fromkeys(names if names is not None else known))


def applicable(notebooks: Sequence[Notebook], modes: Collection[str], *, baseline: bool) -> tuple[Notebook, ...]:
    """Return those that have something to show for samples of these modes, in their order."""
    found = []
    for one in notebooks:
        load = APPLIES_TO.get(one.name)
        if (load is None or not load.isdisjoint(modes)) and (baseline or one.name not in NEEDS_BASELINE):
            found.append(one)
    return tuple(found)


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
            raise BadUsage(f"--parameter: {name!r} is set by the report itself: use its flag")
        if name not in known:
            there = ", ".join(sorted(known - set(ours))) or "none"
            raise BadUsage(f"--parameter: no notebook has a parameter {name!r}: there are {there}")
    read = {name: _read_value(name, text) for name, text in given.items()}
    checked: dict[str, dict[str, Any]] = {}
    for notebook in notebooks:
        fields = notebook.parameters.__struct_fields__
        values = {name: value for name, value in {**ours, **read}.items() if name in fields}
        try:
            msgspec.convert(values, notebook.parameters, strict=True)
        except msgspec.ValidationError as fault:
            raise BadUsage(f"--parameter: notebook {notebook.name}: {_plainly(str(fault))}") from None
        checked[notebook.name] = values
    return checked


def _parameters_cell(name: str, text: str) -> str:
    """Return the source of the parameters cell of a notebook in percent format. Raises BadUsage unless it has one."""
    _, *pieces = re.split(r"^# ?%%(.*)\n", text, flags=re.MULTILINE)
    tagged = [
        source.strip()
        for header, source in zip(pieces[::2], pieces[1::2], strict=True)
        if (tags := re.search(r"tags=\[(.*?)\]", header)) and f'"{TAG}"' in tags[1]
    ]
    if len(tagged) != 1:
        found = "no cell" if not tagged else f"{len(tagged)} cells"
        raise BadUsage(f"notebook {name} has {found} tagged `{TAG}`: it needs one, or its defaults would win")
    return tagged[0]


def _parameter_model(name: str, source: str) -> type[msgspec.Struct]:
    """Derive the typed model from the source of a notebook's parameters cell. Raises BadUsage for one untyped."""
    fields: list[tuple[str, Any, Any]] = []
    defaults: dict[str, object] = {}
    for line in _lines(name, source):
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
        raise BadUsage(f"--parameter {name}: {text!r} cannot be read ({' '.join(str(fault).split())})") from None


def _plainly(fault: str) -> str:
    """Turn msgspec's "Expected `int`, got `str` - at `$.slowest`" into a sentence that starts with the parameter."""
    what, _, where = fault.replace("`", "").partition(" - at $.")
    return f"parameter {where!r}: {what.lower()}" if where else what
