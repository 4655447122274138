"""How much a calibration does, what must hold, and the pool in which its cells are carried out.

A *cell* is one world and one question, judged so many times. Each cell is seeded by its own name, so that its counts do
not depend on which other cells there are, in which order they are carried out, or on how many processes.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import numpy as np

from harness.machine import commit, versions

SEED = 2026

PROCESSES = 2

Cell = TypeVar("Cell")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Effort:
    """How many times each cell is judged."""

    name: str
    trials: int


DEFAULT = Effort("default", 2_000)
NIGHTLY = Effort("nightly", 10_000)


@dataclasses.dataclass(frozen=True)
class Bar:
    """One thing that must hold."""

    sentence: str
    met: bool


def random_of(cell: object) -> np.random.Generator:
    """Return the random numbers of a cell, the same wherever it is carried out."""
    return np.random.default_rng([SEED, zlib.crc32(repr(cell).encode())])


def carry_out(study: Callable[[Cell], Result], cells: Sequence[Cell]) -> list[Result]:
    """Return what a study of each cell came to, in their order; two processes of their own."""
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(study, cells))


def bar_list(bars: Sequence[Bar]) -> str:
    """Return the bars as a list, with those that were missed marked."""
    return "\n".join(f"- {bar.sentence}{'' if bar.met else ' **MISSED**'}" for bar in bars)


def written_by(effort: Effort, libraries: Sequence[str]) -> str:
    """Return the sentence that says how a page can be written again."""
    told = versions(list(libraries))
    names = ", ".join(f"{name} {told[name]}" for name in libraries)
    return (
        f"Written by `make calibrate` (`tests/calibration/`), {effort.name} size: {effort.trials:,} trials in each "
        f"cell, seed {SEED}, at commit\n{commit() or 'unknown'}; the counts are the same everywhere with the same "
        f"libraries ({names}).\n`make calibrate EFFORT=nightly` has {NIGHTLY.trials:,} trials. A fast share is in "
        "`make test`."
    )
