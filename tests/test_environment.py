"""The three lists of what is installed say the same: pyproject.toml, requirements.lock and environment.yml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
CONDA: dict[str, Any] = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))

Machine = dict[str, str]  # values of environment markers (PEP 508)

# Where the project runs: each requirement that applies there must be in the lock, with a version that satisfies it.
MACHINES: list[Machine] = [
    {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": system} | names
    for python in ("3.11", "3.12", "3.13")
    for system, names in (
        ("linux", {"platform_machine": "x86_64", "platform_system": "Linux", "os_name": "posix"}),
        ("linux", {"platform_machine": "aarch64", "platform_system": "Linux", "os_name": "posix"}),
        ("darwin", {"platform_machine": "arm64", "platform_system": "Darwin", "os_name": "posix"}),
    )
]


def machine_name(machine: Machine) -> str:
    """Return a machine as the tests' output names it."""
    return "-".join(machine[marker] for marker in ("sys_platform", "platform_machine", "python_version"))


def applies(requirement: Requirement, machine: Machine) -> bool:
    """Tell whether a requirement's marker holds on a machine."""
    return requirement.marker is None or requirement.marker.evaluate(machine)


def required() -> list[Requirement]:
    """Return every requirement of the project and of its extras."""
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    return [Requirement(line) for line in lines]


def locked() -> list[tuple[Requirement, list[str]]]:
    """Return each locked requirement with its hashes."""
    entries = re.findall(r"^(\S+==[^\\\n]*?)((?: *\\\n +--hash=\S+)*)$", LOCK, flags=re.MULTILINE)
    return [(Requirement(pin.strip()), re.findall(r"--hash=(\S+)", hashes)) for pin, hashes in entries]


def installed_on(machine: Machine) -> dict[str, Version]:
    """Return name and version of what the lock installs on a machine."""
    return {
        canonicalize_name(pin.name): Version(str(pin.specifier).removeprefix("=="))
        for pin, _ in locked()
        if applies(pin, machine)
    }


@pytest.mark.parametrize("machine", MACHINES, ids=machine_name)
def test_the_lock_satisfies_every_requirement_of_the_project(machine: Machine) -> None:
    versions = installed_on(machine)
    absent = Version("0.dev0")
    unmet = [
        str(wanted)
        for wanted in required()
        if applies(wanted, machine) and versions.get(canonicalize_name(wanted.name), absent) not in wanted.specifier
    ]
    assert unmet == [], "run `make lock`"


def test_the_lock_is_made_of_pins_with_hashes_and_nothing_else() -> None:
    left_over = re.sub(r"^\S+==[^\\\n]*(?: *\\\n +--hash=sha256:[0-9a-f]{64})+\n", "", LOCK, flags=re.MULTILINE)
    assert left_over == ""
    assert [str(pin) for pin, hashes in locked() if not hashes] == []


def test_the_lock_names_no_address() -> None:
    assert re.findall(r"\S*://\S*|--(?:extra-)?index-url\S*|--find-links\S*", LOCK) == []


@pytest.mark.parametrize("machine", MACHINES, ids=machine_name)
def test_no_package_is_pinned_twice(machine: Machine) -> None:
    names = [pin.name for pin, _ in locked() if applies(pin, machine)]
    assert sorted(names) == sorted(set(names))


def test_the_build_backend_is_locked_so_that_the_project_installs_without_isolation() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    development = {Requirement(line).name: Requirement(line).specifier for line in EXTRAS["dev"]}
    for line in build:
        assert development[Requirement(line).name] == Requirement(line).specifier


def test_no_dependency_is_asked_for_twice() -> None:
    names = [canonicalize_name(wanted.name) for wanted in required()]
    assert sorted(names) == sorted(set(names))


def test_conda_users_get_the_same_python_bound_and_the_package_with_all_its_extras() -> None:
    named = [entry for entry in CONDA["dependencies"] if isinstance(entry, str)]
    (by_pip,) = [entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict)]
    (line,) = by_pip
    editable = re.fullmatch(r"-e \.\[([\w,]+)\]", line)
    assert editable is not None
    assert set(editable[1].split(",")) == set(EXTRAS)
    pythons = [entry.removeprefix("python") for entry in named if re.match(r"python\b(?!-)", entry)]
    assert [SpecifierSet(bound) for bound in pythons] == [SpecifierSet(PROJECT["requires-python"])]


def test_conda_brings_the_servers_and_no_python_package_that_pip_brings_too() -> None:
    named = {re.split(r"[<>=! ]", entry)[0] for entry in CONDA["dependencies"] if isinstance(entry, str)}
    assert named == {"python", "redis-server", "postgresql", "pip"}
    assert named.isdisjoint({canonicalize_name(wanted.name) for wanted in required()})
    assert CONDA["channels"] == ["conda-forge"]


def test_every_tool_that_names_a_python_means_the_oldest_supported_one() -> None:
    oldest = PROJECT["requires-python"].removeprefix(">=")
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    assert tools["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    assert tools["mypy"]["python_version"] == oldest
    assert f"--python-version {oldest} " in makefile
    assert f"sys.version_info < ({oldest.replace('.', ', ')})" in makefile
    assert workflow["jobs"]["check-and-test"]["strategy"]["matrix"]["python"][0] == oldest
