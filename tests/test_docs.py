"""What is written about the project is true of the project: links, commands, columns, statuses, modules.

Looks at every file that git would track, so that a new page is held to this before it is committed.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pathspec
import pyarrow as pa
import pytest
import yaml

from harness.sample import Endpoint, Mode, Outcome, ResourceSample, RunRecord, Sample, arrow_schema
from service.runs import FINAL, TRANSITIONS, RunStatus

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def tree() -> tuple[Path, ...]:
    """Return every file that git would track, tracked already or not."""
    ignored = pathspec.GitIgnoreSpec.from_lines([*(ROOT / ".gitignore").read_text().splitlines(), ".git"])
    found: list[Path] = []
    for folder, folders, names in os.walk(ROOT):
        here = Path(folder).relative_to(ROOT)
        folders[:] = [name for name in folders if not ignored.match_file(f"{(here / name).as_posix()}/")]
        found.extend(ROOT / here / name for name in names if not ignored.match_file((here / name).as_posix()))
    return tuple(sorted(found))


def tracked(pattern: str) -> list[Path]:
    """Return the files of the tree whose path ends in the pattern."""
    return [path for path in tree() if path.relative_to(ROOT).match(pattern)]


MARKDOWN = tracked("*.md")


def relative(path: Path) -> str:
    """Return a path as the tests' output names it."""
    return path.relative_to(ROOT).as_posix()


def text_of(path: Path) -> str:
    """Return a file's text, or nothing for a binary file."""
    content = path.read_bytes()
    return "" if b"\0" in content else content.decode(encoding="utf-8")


def anchor(heading: str) -> str:
    """Return the fragment under which a heading is linked."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def table(page: Path, heading: str) -> list[list[str]]:
    """Return the cells of the first table under a heading, without its two head rows and without code marks."""
    section = re.split(r"^#+ ", page.read_text(encoding="utf-8").partition(f"# {heading}\n")[2], flags=re.MULTILINE)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows[2:]]


@pytest.mark.parametrize("page", MARKDOWN, ids=relative)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)):
        if re.match(r"\w+:", target):
            continue
        name, _, fragment = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        headings = re.findall(r"^#+ (.*)$", text_of(linked), flags=re.MULTILINE) if fragment else []
        if not linked.exists() or (fragment and fragment not in map(anchor, headings)):
            broken.append(target)
    assert broken == []


def make_targets() -> set[str]:
    """Return the targets that `make help` lists."""
    return set(re.findall(r"^([a-z.][a-z-]*):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("page", [*MARKDOWN, *tracked("*.yml"), *tracked(".ci/*")], ids=relative)
def test_every_make_target_that_is_named_exists(page: Path) -> None:
    commands = re.findall(r"(?:^|[`(>\"]|run: )\s*make((?: -s)? [^\s`#|\")&]+)", text_of(page), re.MULTILINE)
    named = {command.split()[-1].rstrip(",;.") for command in commands}
    assert {name for name in named if "=" not in name} - make_targets() == set()


def test_the_help_has_one_line_for_every_target() -> None:
    lines = subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()  # noqa: S607
    assert [line.split()[:2] for line in lines if line.startswith("  make ")] == [
        ["make", target] for target in re.findall(r"^([a-z.][a-z-]*):.*## ", text_of(ROOT / "Makefile"), re.MULTILINE)
    ]
    phony = set(re.findall(r"^\.PHONY: (.*)$", text_of(ROOT / "Makefile"), re.MULTILINE)) - {"remake", "forget-code"}
    assert phony == make_targets()


def test_continuous_integration_calls_make_targets_only() -> None:
    for workflow in tracked(".github/workflows/*.yml"):
        jobs: dict[str, Any] = yaml.safe_load(text_of(workflow))["jobs"]
        commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
        assert all(re.match(r"make |cat data/reports/", command) for command in commands), relative(workflow)


def test_every_action_is_pinned_to_a_commit() -> None:
    for workflow in tracked(".github/workflows/*.yml"):
        used = re.findall(r"uses: (.*)$", text_of(workflow), re.MULTILINE)
        assert [action for action in used if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)] == []


# Each with a class of one letter, so that this page does not hold what it looks for.
REGISTRY_HOSTS = re.compile(r"p[y]pi\.(?:org|io)|pythonhoste[d]\.|npmj[s]\.|(?:de[b]|securit[y])\.debian\.")
MACHINE_PATHS = re.compile(r"(?<![\w.~$}-])/(?:hom[e]|roo[t]|User[s]|wor[k]|mn[t])/")


@pytest.mark.parametrize(
    ("forbidden", "what"), [(REGISTRY_HOSTS, "a package registry's host"), (MACHINE_PATHS, "a path of one machine")]
)
def test_no_tracked_file_names(forbidden: re.Pattern[str], what: str) -> None:
    found = [
        f"{relative(path)}:{number}: {what}"
        for path in tree()
        for number, line in enumerate(text_of(path).splitlines(), start=1)
        if forbidden.search(line)
    ]
    assert found == []


UNITS = {"ns": "ns", "ms": "ms", "s": "s", "bytes": "bytes", "percent": "%"}


def unit_in(column: str) -> str | None:
    """Return the unit that a column's name ends in, if it ends in one."""
    name, _, last = column.rpartition("_")
    return "1/s" if name.endswith("_per") else UNITS.get(last)


@pytest.mark.parametrize(
    ("row", "heading"),
    [(Sample, "samples-*.parquet"), (RunRecord, "runs.parquet"), (ResourceSample, "resources.parquet")],
)
def test_every_column_is_described_with_its_unit_and_whether_it_may_be_null(row: type, heading: str) -> None:
    described = table(ROOT / "data/README.md", heading)
    schema: pa.Schema = arrow_schema(row, "any")
    assert [(name, null) for name, _, null, _ in described] == [
        (field.name, "yes" if schema.field(field.name).nullable else "no") for field in dataclasses.fields(row)
    ]
    assert {name: unit for name, unit, _, _ in described if unit_in(name)} == {
        field.name: unit for field in dataclasses.fields(row) if (unit := unit_in(field.name))
    }
    assert [name for name, _, _, meaning in described if not meaning] == []


@pytest.mark.parametrize(("column", "enumeration"), [("endpoint", Endpoint), ("mode", Mode), ("outcome", Outcome)])
def test_every_value_of_a_column_is_described(column: str, enumeration: type[Endpoint | Mode | Outcome]) -> None:
    (meaning,) = [row[3] for row in table(ROOT / "data/README.md", "samples-*.parquet") if row[0] == column]
    assert set(re.findall(r"`([^`]+)`", f"`{meaning}`")) >= {value.value for value in enumeration}


def test_every_status_is_described_and_the_final_ones_are_marked() -> None:
    described = table(ROOT / "docs/run-states.md", "Statuses")
    assert [(name, final) for name, final, _ in described] == [
        (status.value, "yes" if status in FINAL else "no") for status in RunStatus
    ]


def test_the_transitions_of_the_page_are_those_of_the_code() -> None:
    described = table(ROOT / "docs/run-states.md", "Transitions")
    assert sorted((old, new) for old, new, _ in described) == sorted(
        (old.value, new.value) for old, ways in TRANSITIONS.items() for new in ways
    )
    assert {new for _, new, _ in described} == {status.value for status in RunStatus}


def test_the_architecture_page_names_every_module() -> None:
    page = text_of(ROOT / "docs/architecture.md")
    modules = [
        path
        for path in tracked("*.py")
        if path.relative_to(ROOT).parts[0] in ("service", "harness", "notebooks")
        and path.name != "__init__.py"
        and "migrations" not in path.parts
    ]
    assert modules
    unnamed = [relative(path) for path in modules if f"`{relative(path)}`" not in page]
    assert unnamed == [], "say in docs/architecture.md what each of these owns"


def test_every_environment_variable_is_explained() -> None:
    page = text_of(ROOT / "docs/operations.md")
    read = {
        name
        for path in tracked("*.py")
        if path.relative_to(ROOT).parts[0] in ("service", "harness")
        for name in re.findall(r"\bPLIMSOLL_[A-Z_]+[A-Z]\b", text_of(path))
    }
    assert read
    assert sorted(name for name in read if f"`{name}`" not in page) == []
