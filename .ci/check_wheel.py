"""Builds the wheel and proves that it is whole: every file of the packages is in it, and it runs outside the checkout.

The throwaway environment borrows the third-party packages of the environment that runs this script, by a path file;
path files found on such a path are not read in turn, so the checkout's own editable install stays out of sight.
Called by `make wheel`.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_SHIPPED = {"__pycache__"}

# Runs in the throwaway environment. Alembic's scripts run under Alembic only, commands under `-m` only.
IMPORT_ALL = """
import importlib, pathlib, pkgutil, sys
home = pathlib.Path(sys.prefix).resolve()
count = 0
for package in sys.argv[1:]:
    found = importlib.import_module(package)
    if home not in pathlib.Path(found.__file__).resolve().parents:
        sys.exit(f"{package} was imported from {found.__file__}, not from the wheel")
    for module in pkgutil.walk_packages(found.__path__, package + "."):
        if not {"__main__", "migrations"} & set(module.name.split(".")):
            importlib.import_module(module.name)
            count += 1
print(f"wheel: {count} modules of {' and '.join(sys.argv[1:])} import outside the checkout")
"""


def shipped_files(packages: list[str]) -> dict[str, bytes]:
    """Return every file under the packages as the wheel should hold it, by its name in the wheel."""
    return {
        path.relative_to(ROOT).as_posix(): path.read_bytes()
        for package in packages
        for path in sorted((ROOT / package).rglob("*"))
        if path.is_file() and not NOT_SHIPPED & set(path.parts)
    }


def differences(wheel: Path, expected: dict[str, bytes]) -> list[str]:
    """Return a line for each file that the wheel lacks, changes or has too many."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        held = {name: archive.read(name) for name in names}
    return (
        [f"missing: {name}" for name in sorted(expected.keys() - held.keys())]
        + [f"unexpected: {name}" for name in sorted(held.keys() - expected.keys())]
        + [f"changed: {name}" for name in sorted(held.keys() & expected.keys()) if held[name] != expected[name]]
    )


def run(*command: str | Path, cwd: Path) -> str:
    """Return what a command prints; end this script with what it said when it fails."""
    done = subprocess.run(command, cwd=cwd, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{done.stdout}wheel: {command[0]} ended with {done.returncode}")
    return done.stdout


def main() -> None:
    """Build into the folder named first on the command line, then check."""
    out = (ROOT / sys.argv[1]).resolve()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages: list[str] = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    commands: dict[str, str] = project["project"]["scripts"]
    for old in out.glob("*.whl"):
        old.unlink()
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=ROOT)
    (wheel,) = out.glob("*.whl")

    if faults := differences(wheel, shipped_files(packages)):
        sys.exit("\n".join([f"wheel: {wheel.name} is not what the tree holds", *faults]))

    with tempfile.TemporaryDirectory(prefix="plimsoll-wheel-") as folder:
        home = Path(folder).resolve() / "venv"
        venv.create(home, with_pip=False)
        python = home / "bin" / "python"
        site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        pip = (
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
        )
        run(*pip, wheel, cwd=home)
        print(run(python, "-I", "-W", "error", "-c", IMPORT_ALL, *packages, cwd=home), end="")
        for command in commands:
            run(home / "bin" / command, "--help", cwd=home)
    print(f"wheel: {wheel.relative_to(ROOT)} is whole; {' and '.join(commands)} answer")


if __name__ == "__main__":
    main()
