"""The frame of a page of evidence: what made it, where and when, and how to repeat it."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Sequence
from pathlib import Path

from harness.machine import commit, machine


def write_page(
    page: Path,
    title: str,
    module: str,
    lines: Sequence[str],
    words: str = "",
    of: str = "`make bench-harness` runs all of them",
) -> None:
    """Write `lines` under a heading that says where they come from; print them too. `of` names the target."""
    about = machine()
    told = f"{about.get('cpu', 'unknown processor')}, {about.get('cpu_count')} cores"
    head = [
        f"# {title}",
        "",
        (
            f"Written by `python -m tests.campaigns.{module}{words}` ({of}) on"
            f" {dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC, commit {commit()}, {told}, load average"
            f" {os.getloadavg()[0]:.1f} at the end (other work ran on this machine at times)."
        ),
        "",
    ]
    page.write_text("\n".join([*head, *lines, ""]), encoding="utf-8")
    print("\n".join(lines), flush=True)  # noqa: T201 - a campaign prints
