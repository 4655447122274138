"""Real processes under load while Redis hangs, dies and comes back: `make redis-away`, for seconds, not minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaigns.redis_away import run
from tests.campaigns.redis_away_report import page

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(180)]


def test_without_redis_runs_go_on_rates_hold_in_each_process_and_new_sockets_are_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o711)
    measured = run(tmp_path, 6.0, 6.0)
    assert measured.faults() == []
    assert "Faults:\n\n- none\n" in page(measured)
