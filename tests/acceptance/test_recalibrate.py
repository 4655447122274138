"""`python -m harness recalibrate` without any service: its own stack, worker and notebook, from measurement to kept.

Only the searches are of a made-up service, whose capacity is known: what they find on a busy machine is its own matter.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from harness.__main__ import main
from harness.measurement import Measured, Wanted
from harness.recalibration import session
from harness.sample import Endpoint, Mode
from harness.target import Target
from tests.harness import synthetic
from tests.harness.synthetic_capacity import write_capacity
from tests.harness.synthetic_search import write_search

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.timeout(400),
]  # the worker looks once a minute, and two reports are made


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A data folder of the test's own, and no service anywhere."""
    folder = Path(tempfile.mkdtemp(prefix="plimsoll-test-"))
    folder.chmod(0o711)  # PostgreSQL's user passes through it when the tests run as root
    for name in ("DATABASE_URL", "REDIS_URL", "PLIMSOLL_URL", "PLIMSOLL_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PLIMSOLL_DATA", str(folder))
    monkeypatch.setenv("PLIMSOLL_STACK_DIR", str(folder / "none"))
    yield folder
    shutil.rmtree(folder)


def test_two_measurements_that_agree_raise_a_quota_by_one_step_and_it_is_kept(
    data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    numbers = itertools.count(1)

    def measured(plan: Wanted, target: AbstractContextManager[Target], root: Path) -> Measured:
        with target as service:
            service.check()
        number = next(numbers)
        monkeypatch.setattr(synthetic, "WALL_NS", time.time_ns() - 60_000_000_000)
        if plan.mode is Mode.BURST_LIMITS:
            return Measured(write_search(root / f"{number}", most=32, measurement_id=f"0190-bursts-{number}"), True)
        carried = {Endpoint.CREATE: 640.0}
        return Measured(write_capacity(root / f"{number}", carried, measurement_id=f"0190-capacity-{number}"), True)

    monkeypatch.setattr(session, "measure", measured)
    found = []
    for _ in range(2):
        capfd.readouterr()
        code = main(["recalibrate", "--endpoint", "create", "--json"])
        out, err = capfd.readouterr()
        assert code == 0, err
        assert "the embedded stack is measured, and its own quotas are recalibrated" in err
        told = json.loads(out)
        found.append((told["phase"], told["run_creation"].split(":")[0], told["stands"]["phase"], told["revision"]))
    assert found == [("unchanged", "leaning", "unchanged", 2), ("shadow", "cut", "kept", 3)]
    assert (data / "stack" / "recalibration" / "harness-1").is_dir()
