"""Real processes and a neighbour at a hundred times its tick rate: `make noisy-neighbour`, for seconds, not minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaigns.noisy_neighbour import run
from tests.campaigns.noisy_neighbour_report import page

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(180)]


def test_a_neighbour_is_held_to_its_tick_rate_and_nothing_is_lost(tmp_path: Path) -> None:
    tmp_path.chmod(0o711)
    measured = run(tmp_path, repeats=1, window_s=3.0)
    assert measured.faults() == []
    assert "beside the neighbour" in page(measured)
