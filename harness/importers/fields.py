"""Numbers and instants out of text, each checked: finite, not negative, in a unit that can be right.

Instants are nanoseconds since 1970, durations nanoseconds. Decimal text is read exactly, not through binary fractions.
Everything here raises Unusable with the column's name. Next: `rows`.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import re

from harness.importers.source import Unusable

EARLIEST_NS = 946_684_800 * 10**9  # the year 2000
LATEST_NS = 4_102_444_800 * 10**9  # the year 2100
"""An instant outside of these was read in a wrong unit."""

DURATION_NS_MAX = 86_400 * 10**9
"""No request takes longer than a day; what seems to was read in a wrong unit."""

SHOWN_CHARS = 40  # of a text that is no number

_RFC3339 = re.compile(r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:[.,](\d{1,9}))?(Z|z|[+-]\d\d:\d\d)")


class StampUnit(enum.IntEnum):
    """The unit of a Unix time, in nanoseconds."""

    S = 1_000_000_000
    MS = 1_000_000
    US = 1_000
    NS = 1


def shown(text: str) -> str:
    """Return a text as a sentence quotes it: on one line and not too long."""
    return repr(text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…")


def number(text: str, column: str) -> decimal.Decimal:
    """Return a finite number."""
    try:
        value = decimal.Decimal(text)
    except decimal.InvalidOperation:
        raise Unusable(f"{shown(text)} is no number", column) from None
    if not value.is_finite():
        raise Unusable(f"{shown(text)} is no finite number", column)
    return value


def whole(text: str, column: str, most: int) -> int:
    """Return a whole number from 0 to `most`."""
    value = number(text, column)
    if value < 0:
        raise Unusable(f"{shown(text)} is negative", column)
    if value > most:
        raise Unusable(f"{shown(text)} is more than {most:,}", column)
    if value != int(value):
        raise Unusable(f"{shown(text)} is no whole number", column)
    return int(value)


def duration_ns(text: str, column: str, unit_ns: int) -> int:
    """Return a duration that is given in a unit of so many nanoseconds."""
    value = number(text, column)
    if value < 0:
        raise Unusable(f"{shown(text)} is a negative duration", column)
    if value * unit_ns > DURATION_NS_MAX:
        raise Unusable(f"{shown(text)} is longer than a day: its unit is not the one that this format has", column)
    return int((value * unit_ns).to_integral_value())


def instant_ns(text: str, column: str, unit: StampUnit) -> int:
    """Return a Unix time that is given in `unit`."""
    value = number(text, column)
    if not EARLIEST_NS <= value * unit <= LATEST_NS:
        named = {"S": "seconds", "MS": "milliseconds", "US": "microseconds", "NS": "nanoseconds"}[unit.name]
        raise Unusable(f"{shown(text)} is no Unix time in {named} of this century", column)
    return int((value * unit).to_integral_value())


def unit_of(text: str) -> StampUnit | None:
    """Return the unit in which a Unix time is of this century; null for a text that is no such number."""
    try:
        value = decimal.Decimal(text)
    except decimal.InvalidOperation:
        return None
    if not value.is_finite():
        return None
    return next((unit for unit in StampUnit if EARLIEST_NS <= value * unit <= LATEST_NS), None)


def rfc3339_ns(text: str, column: str) -> tuple[int, bool]:
    """Return an instant written as RFC 3339, and whether it was given more exactly than to the second."""
    found = _RFC3339.fullmatch(text)
    try:
        if found is None:
            raise ValueError
        day, time, fraction, zone = found.groups()
        second = datetime.datetime.fromisoformat(f"{day}T{time}{zone.upper()}")
    except ValueError:
        raise Unusable(f"{shown(text)} is no instant such as 2026-01-31T12:00:00.5Z", column) from None
    at_ns = int(second.timestamp()) * 10**9 + int((fraction or "0").ljust(9, "0"))
    if not EARLIEST_NS <= at_ns <= LATEST_NS:
        raise Unusable(f"{shown(text)} is not in this century", column)
    return at_ns, fraction is not None
