"""Bugs that engines of this kind have had: the simulator finds every one of them."""

from __future__ import annotations

import pytest

from tests.simulator.breach import Broken
from tests.simulator.mutants import MOST_STEPS, MUTANTS, Mutant, mutated
from tests.simulator.world import simulate


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug.replace(" ", "_"))
def test_the_simulator_finds(mutant: Mutant) -> None:
    with mutated(mutant), pytest.raises(Broken):
        simulate(0, MOST_STEPS)
