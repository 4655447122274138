"""Where the harness keeps its files: `data/` under the current folder, or the folder that PLIMSOLL_DATA names."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "PLIMSOLL_DATA"

NOTEBOOKS = Path("notebooks")
"""The folder of notebooks, by which a checkout is told."""


def data_folder() -> Path:
    """Return the folder of samples, reports and stacks."""
    return Path(os.environ.get(VARIABLE) or "data")


def is_chosen() -> bool:
    """Tell whether somebody chose the folder, so that it is not looked for in the checkout."""
    return bool(os.environ.get(VARIABLE))


def data_folder_of_checkout() -> Path:
    """Return the folder of samples, reports and stacks, absolute; that of the checkout also from a folder within it."""
    chosen = data_folder() if is_chosen() else find_in_checkout(NOTEBOOKS).resolve().parent / data_folder()
    return chosen.resolve()


def find_in_checkout(path: Path) -> Path:
    """Return a path as it is if it exists or is absolute, else below the nearest folder above that has it.

    So a notebook finds `data/slo.yaml` from within `notebooks/`. A path found nowhere is returned as it is.
    """
    if path.exists() or path.is_absolute():
        return path
    return next((above / path for above in Path.cwd().parents if (above / path).exists()), path)


def keep_caches_here() -> None:
    """Point the libraries that draw to a cache in the data folder, so that nothing is written to anybody's home.

    To be called before matplotlib is imported, which makes a list of fonts once and keeps it. A place that somebody
    chose is left to them; XDG_CACHE_HOME is where the system's own font list goes.
    """
    cache = data_folder_of_checkout() / "cache"
    os.environ.setdefault("MPLCONFIGDIR", str(cache / "matplotlib"))
    os.environ.setdefault("XDG_CACHE_HOME", str(cache))
