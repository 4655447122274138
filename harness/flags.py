"""How numbers on a command line are read: each within its bounds, refused in one line that names them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

SECONDS_MAX = 86_400.0  # no interval of a load test is longer than a day


def whole(lowest: int, highest: int) -> Callable[[str], int]:
    """Return what reads a whole number within these bounds."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(f"{text!r} is not usable: give a whole number from {lowest} to {highest}")
        return value

    return read


def seconds(text: str) -> float:
    """Read an interval that may be zero."""
    value = _number(text)
    if not 0 <= value <= SECONDS_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not usable: give seconds from 0 to {SECONDS_MAX:g}")
    return value


def above_zero(unit: str, highest: float) -> Callable[[str], float]:
    """Return what reads a number above zero of some unit, up to a bound."""

    def read(text: str) -> float:
        value = _number(text)
        if not 0 < value <= highest:
            raise argparse.ArgumentTypeError(f"{text!r} is not usable: give {unit} above 0, at most {highest:g}")
        return value

    return read


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
