"""Where the harness keeps its files: `data/` under the current folder, or the folder that PLIMSOLL_DATA names."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "PLIMSOLL_DATA"


def data_folder() -> Path:
    """Return the folder of samples, reports and stacks."""
    return Path(os.environ.get(VARIABLE) or "data")


def is_chosen() -> bool:
    """Tell whether somebody chose the folder, so that it is not looked for in the checkout."""
    return bool(os.environ.get(VARIABLE))
