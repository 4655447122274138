"""Bugs that engines of this kind have had: the simulator finds every one of them."""

from __future__ import annotations

import pytest

from tests.simulator.audit import Broken
from tests.simulator.mutants import MUTANTS, Mutant, mutated
from tests.simulator.world import simulate

MOST_STEPS = 60_000
"""Steps within which a mutant must be found; most are within some hundred."""


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug.replace(" ", "_"))
def test_the_simulator_finds(mutant: Mutant) -> None:
    with mutated(mutant), pytest.raises(Broken):
        simulate(0, MOST_STEPS)
