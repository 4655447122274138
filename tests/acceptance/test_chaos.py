"""The chaos campaign, small: it keeps every promise, and it ends all that it started, also when it is stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(300)]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a campaign whose files are all in `folder`."""
    command = [sys.executable, "-m", "tests.campaigns.chaos", "--page", str(folder / "page.md")]
    command += ["--log", str(folder / "log")]
    folder.chmod(0o711)  # PostgreSQL's user passes through it when the tests run as root
    return subprocess.Popen(  # noqa: S603 - our own
        [*command, *arguments],
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def left_by(folder: Path) -> list[str]:
    """Return what a campaign left behind: processes that work in its folder or name it, and folders of its own."""
    found = [path.name for path in folder.glob("plimsoll-chaos-*")]
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        if f"{folder}/plimsoll-chaos-" in words:
            found.append(words)
    return found


def test_a_small_campaign_keeps_every_promise(tmp_path: Path) -> None:
    campaign = start(tmp_path, "--runs", "60", "--kills", "6", "--seed", "2")
    said, _ = campaign.communicate()

    assert campaign.returncode == 0, said
    page = (tmp_path / "page.md").read_text()
    assert "**0 broken promises**" in page
    assert re.search(r"\| \*\*all SIGKILLs\*\* \| 6 \|", page)
    assert left_by(tmp_path) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_campaign_that_is_stopped_ends_all_that_it_started(tmp_path: Path, signum: signal.Signals) -> None:
    campaign = start(tmp_path, "--runs", "1000", "--kills", "50")
    assert campaign.stdout is not None
    for line in campaign.stdout:
        if "chaos: 1: " in line:
            break
    campaign.send_signal(signum)
    said, _ = campaign.communicate()

    assert campaign.returncode == 130, said
    assert not (tmp_path / "page.md").exists()
    assert left_by(tmp_path) == []
