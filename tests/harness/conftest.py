"""What tests of the harness's commands stand on: a folder of their own, and a model of the service that answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.fake_service import ModelService, RunningModel


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder of the test's own, and no service named in the environment."""
    for name in ("PLIMSOLL_URL", "PLIMSOLL_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PLIMSOLL_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def running() -> Iterator[RunningModel[ModelService]]:
    """A model of the service whose runs end at their first poll."""
    served = RunningModel(ModelService(polls_to_end=1))
    served.start()
    yield served
    served.stop()
