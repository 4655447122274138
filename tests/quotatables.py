"""Quota tables for tests: the first one with some values changed."""

from __future__ import annotations

from typing import Any

import msgspec

from service.quota.tables import FIRST, FORMAT, Provenance, RateValue, RevisionFile, Tables

BY = "a test"


def tables(**default: Any) -> Tables:
    """Return the tables of revision 1 with values of the class `default` changed."""
    return msgspec.structs.replace(FIRST, default=msgspec.structs.replace(FIRST.default, **default))


def file_of(limits: Tables | None = None, **provenance: Any) -> RevisionFile:
    """Return what would be proposed."""
    return RevisionFile(FORMAT, limits or FIRST, Provenance(**provenance))


def rate(per_s: float, burst: int) -> RateValue:
    """Return a rate as it is written."""
    return RateValue(per_s, burst)
