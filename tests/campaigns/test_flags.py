"""No campaign starts anything for a flag that it does not know, nor for one who asks what it would do."""

from __future__ import annotations

import importlib
import sys

import pytest

CAMPAIGNS = (
    "cap_races", "chaos", "generator_lies", "generator_schedule", "generator_speed", "generator_stall",
    "noisy_neighbour", "quota_rates", "redis_away", "scale", "silent_failures", "streams",
)  # fmt: skip


def left_by(name: str, flag: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Call a campaign with a flag and return the exit code with which it ends at once."""
    campaign = importlib.import_module(f"tests.campaigns.{name}")
    monkeypatch.setattr(sys, "argv", [name, flag])
    with pytest.raises(SystemExit) as left:
        campaign.main()
    return int(left.value.code or 0)


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_an_unknown_flag_is_refused_in_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert left_by(name, "--no-such-flag", monkeypatch) == 64
    line = f"python -m tests.campaigns.{name}: unrecognized arguments: --no-such-flag (see --help)\n"
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_who_asks_for_help_is_told_and_nothing_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert left_by(name, "--help", monkeypatch) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: python -m tests.campaigns.{name} [-h]")
    assert err == ""
