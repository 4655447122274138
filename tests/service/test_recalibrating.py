"""The commands on recalibrations as they are typed, and the place of whoever measures, held by a process."""

from __future__ import annotations

import contextlib
import datetime as dt
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from service.quota.limits import Limit
from tests.measuredtables import measured as evidence
from tests.measuredtables import measured_file
from tests.service.conftest import Command


@pytest.fixture
def quotas(command: Command, database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `python -m service` in this process on the test's own servers; returns exit code, output and errors."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("REDIS_URL", redis_url)
    return command


@contextlib.contextmanager
def held(*flags: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """Hold the place of whoever measures, in a process as the harness starts it; yields its number."""
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", "service", "quotas", "measuring", "--json", *flags],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield (json.loads(line)["recalibration"] if line else 0), process
    finally:
        process.communicate(timeout=30)


def stand(quotas: Command) -> dict[str, Any]:
    """Return how the newest recalibration stands."""
    told: dict[str, Any] = json.loads(quotas("quotas", "recalibration", "--json")[1])
    return {name: told[name] for name in ("recalibration", "phase", "revision")}


def measured(tmp_path: Path, lower_per_s: float, **changed: Any) -> str:
    """Write a measurement of creates that was taken just now; a quarter of its lower bound is a fourth of this."""
    sound = evidence(lower_per_s / 0.99, 0.01, measured_at=dt.datetime.now(dt.UTC), **changed)
    path = tmp_path / "measured.json"
    path.write_bytes(msgspec.json.encode(measured_file({Limit.RUN_CREATION: sound})))
    return str(path)


def test_a_measurement_becomes_the_shadow_and_a_second_one_is_told_so(quotas: Command, tmp_path: Path) -> None:
    file = measured(tmp_path, 28.0)
    code, out, _ = quotas("quotas", "recalibrate", file, "--json")
    told = json.loads(out)
    assert (code, told.pop("run_creation")) == (0, "cut: -20.0% of -32.0% in one revision")
    held = "gap: was not measured: the last good value is held"
    assert told == {
        "recalibration": 1,
        "revision": 2,
        "phase": "shadow",
        "subrun_spawn": held,
        "snapshot_poll": held,
        "tick": held,
    }
    code, out, err = quotas("quotas", "recalibrate", file)
    assert (code, out) == (1, "")
    assert err.startswith("python -m service: recalibration 1 is under way: shadow since ")
    assert "measuring -> shadow: run_creation cut" in quotas("quotas", "history")[1]


def test_a_dry_run_says_what_would_be_decided_and_leaves_nothing_behind(quotas: Command, tmp_path: Path) -> None:
    code, out, _ = quotas("quotas", "recalibrate", measured(tmp_path, 28.0), "--dry-run")
    assert (code, out.splitlines()[:2]) == (0, ["phase: shadow", "run_creation: cut: -20.0% of -32.0% in one revision"])
    assert quotas("quotas", "history")[1].startswith("revision 1: active")


def test_a_measurement_that_is_not_believed_says_why(quotas: Command, tmp_path: Path) -> None:
    code, out, _ = quotas("quotas", "recalibrate", measured(tmp_path, 28.0, late_share=0.5))
    assert (code, out.splitlines()) == (
        0,
        [
            "recalibration: 1",
            "revision: 2",
            "phase: refused",
            "doubt about generator: run_creation was measured with 50.0% of requests sent late; at most 1%",
        ],
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--shadow-minutes", "-1"], "--shadow-minutes: '-1' is not usable: give minutes from 0 to 525600"),
        (["--watch-minutes", "soon"], "--watch-minutes: 'soon' is not usable: give minutes from 0 to 525600"),
        (["--canary-percent", "0"], "--canary-percent: '0' is not usable: give a whole number from 1 to 100"),
        (["--machine-worth", "nan"], "--machine-worth: 'nan' is not usable: give a factor from 0.001 to 1000"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_bad_usage(quotas: Command, flags: list[str], words: str) -> None:
    code, out, err = quotas("quotas", "recalibrate", "-", *flags)
    assert (code, out) == (64, "")
    assert words in err


def test_who_measures_has_the_only_place_and_hands_in_under_its_number(quotas: Command, tmp_path: Path) -> None:
    assert quotas("quotas", "recalibration") == (0, "none\n", "")
    file = measured(tmp_path, 28.0)
    with held("--unattended") as (number, _):
        assert stand(quotas) == {"recalibration": number, "phase": "measuring", "revision": None}
        code, out, err = quotas("quotas", "recalibrate", file)
        assert (code, out) == (1, "")
        assert f"recalibration {number} is under way: measuring since " in err
        code, out, _ = quotas("quotas", "recalibrate", file, "--recalibration", str(number), "--json")
        assert (code, json.loads(out)["phase"]) == (0, "shadow")
    assert stand(quotas) == {"recalibration": number, "phase": "shadow", "revision": 2}


def test_a_place_that_is_given_up_is_free_at_once_and_one_that_is_left_can_be_taken_up_again(quotas: Command) -> None:
    with held() as (first, _):
        pass
    assert stand(quotas) == {"recalibration": first, "phase": "measuring", "revision": None}
    with held() as (nobody, process):
        assert nobody == 0
        assert process.communicate()[1].startswith(f"python -m service: recalibration {first} is under way: measuring")
    with held("--recalibration", str(first)) as (again, process):
        assert again == first
        process.communicate("given up\n", timeout=30)
    assert stand(quotas) == {"recalibration": first, "phase": "abandoned", "revision": None}
    with held("--recalibration", str(first)) as (gone, process):
        assert gone == 0
        assert "is not measuring any more: its lease was over" in process.communicate()[1]
    with held() as (second, process):
        assert second > first
        process.communicate("given up\n", timeout=30)


def test_a_token_is_known_to_the_database_that_made_it(quotas: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    token = json.loads(quotas("token", "create", "--installation", "--role", "OWNER", "--json")[1])["token"]

    def known(said: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(said.encode())))
        return quotas("token", "known", "--json")

    assert known(f"{token}\n") == (0, '{"known": true}\n', "")
    quotas("token", "revoke", token)
    assert known(token) == (0, '{"known": true}\n', "")
    assert known(token[:-1] + "!") == (0, '{"known": false}\n', "")
    assert known("") == (64, "", "python -m service: standard input holds no token: give one line\n")
