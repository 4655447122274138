"""Where a measurement was made: the machine, the versions, the commit. Read once per measurement; no secrets."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

MEASURING_PACKAGES = ("plimsoll", "httptools", "msgspec", "numpy", "pyarrow")


def machine() -> dict[str, Any]:
    """Describe the machine as far as a latency depends on it. No host name: a sample set may be published."""
    return {
        "system": platform.system(),
        "release": platform.release(),
        "architecture": platform.machine(),
        "cpu": _cpu_model(),
        "cpu_count": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def versions(others: Sequence[str] = ()) -> dict[str, str]:
    """Name the versions of what makes and records the load, and of `others`; a package run from its source has none."""
    found = {"python": platform.python_version()}
    for package in (*MEASURING_PACKAGES, *others):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Name the commit of this checkout, with "-dirty" when tracked files differ; None outside a checkout."""
    ask = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(  # noqa: S603 - fixed words, no shell
            ask, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def _cpu_model() -> str:
    """Name the processor; `platform` knows it on few systems, Linux keeps it in a file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
