"""A revision as a file: the values of both quota classes, and where they come from.

This is the format of `quota_revision.json` in a report, of what `quotas show --json` prints and `quotas propose` reads;
docs/quotas.md describes it. A table is always whole: a limit that is left out is a mistake, never a default. This page
says what can be written at all; whether it would be wise to put it in force is for `guardrails`.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal

import msgspec

from service.errors import Invalid
from service.quota.limits import CAPS, DEFAULT, LIFTED, RATES, Limit, Quota, Rate

FORMAT: Literal["plimsoll.quota_revision/1"] = "plimsoll.quota_revision/1"
"""Names the format and its version, at the head of each file."""

LARGEST_BYTES = 1 << 20
"""Largest file that is read: 1 MiB, a thousand times what a table needs."""

PerSecond = Annotated[float, msgspec.Meta(gt=0, le=1_000_000)]
Burst = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]  # up to there gcra.lua counts in whole numbers
CapValue = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Line = Annotated[str, msgspec.Meta(max_length=2000)]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class RateValue(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rate, as it is written."""

    per_s: PerSecond  # requests a second, a multiple of 0.001
    burst: Burst  # requests at once after a rest


class ClassTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The value of every limit for one quota class; null lifts a limit. `limits.Limit` explains each."""

    run_creation: RateValue | None
    subrun_spawn: RateValue | None
    snapshot_poll: RateValue | None
    tick: RateValue | None
    live_parent_runs: CapValue | None
    live_runs: CapValue | None
    pending_subruns: CapValue | None
    websockets: CapValue | None
    websockets_per_user: CapValue | None
    pending_tool_calls: CapValue | None
    pending_tool_calls_per_run: CapValue | None

    def value(self, limit: Limit) -> RateValue | int | None:
        """Return a limit's value by its name."""
        found: RateValue | int | None = getattr(self, limit)
        return found


class Tables(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tables of all quota classes."""

    default: ClassTable
    calibration: ClassTable


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the whole service was measured to carry of one rate: the evidence under a value. Per second throughout.

    Numbers are taken as they come: whether they are believed is for `recalibration_evidence`.
    """

    per_s: float  # highest rate that met the SLO, as measured
    lower_per_s: float  # one-sided 95 % lower bound of it: a quota is a quarter of this
    upper_per_s: float  # one-sided 95 % upper bound
    verdict: Literal["PASS", "FAIL", "INCONCLUSIVE"]  # whether the rate was found at all
    requests_planned: int  # at that rate, all trials together; each that its set has no row of counts as one of them
    requests_recorded: int  # rows of them, failures included
    seconds: float  # for how long requests were planned at that rate, all trials together
    late_share: float  # share of them that the generator sent late, 0 to 1
    samples: dict[Line, Digest]  # measurement_id -> SHA-256 of that sample set's manifest
    measured_at: Annotated[dt.datetime, msgspec.Meta(tz=True)]  # when the newest of these samples was taken
    machine: dict[str, str | int | float | bool | None]  # what it was measured on, as in a manifest
    worth: float = 1.0  # what a recalibration multiplied these rates by, as the service runs on another machine


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where a table comes from. Everything is optional: a person may simply want it."""

    author: Line | None = None  # a person or a program
    note: Line | None = None  # why, in a sentence
    measured_at: Annotated[dt.datetime, msgspec.Meta(tz=True)] | None = None  # when the newest sample was taken
    samples: dict[Line, Digest] = {}  # measurement_id -> SHA-256 of that sample set's manifest
    commit: Line | None = None  # of the service that was measured
    machine: dict[str, str | int | float | bool | None] = {}  # what it was measured on
    notebook: Line | None = None  # the executed notebook, as a path below the report's folder
    notebook_sha256: Digest | None = None  # its bytes
    measured: dict[Limit, Measured] = {}  # the evidence under each rate of the class `default` that was measured
    towards: dict[Limit, float] = {}  # where a rate was going whose step was cut, per second


class RevisionFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The file."""

    format: Literal["plimsoll.quota_revision/1"]
    limits: Tables
    provenance: Provenance = Provenance()


def parse(content: bytes) -> RevisionFile:
    """Read a file's bytes; raises Invalid naming the field."""
    if len(content) > LARGEST_BYTES:
        raise Invalid("file", f"has {len(content)} bytes; at most {LARGEST_BYTES} are read")
    try:
        read = msgspec.json.decode(content, type=RevisionFile)
    except msgspec.ValidationError as wrong:
        raise _explain(str(wrong)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as wrong:
        raise Invalid("file", f"is not valid JSON: {wrong}") from None
    json.loads(content, object_pairs_hook=_each_once)
    if "\\u0000" in msgspec.json.encode(read.provenance).decode():
        raise Invalid("provenance", "must not contain the character U+0000")
    for name, table in tables_by_class(read.limits).items():
        quota_of(table, f"limits.{name}")
    return read


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object's fields; raises Invalid for one that is there twice, since nobody knows which is meant."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise Invalid(twice, "is there twice in one object")
    return fields


def write(limits: Tables) -> bytes:
    """Return the file that holds these values and nothing else: the same values give the same bytes.

    Without a provenance: a table that was read off a service and edited is not the one that was measured.
    """
    return msgspec.json.format(msgspec.json.encode(RevisionFile(FORMAT, limits)), indent=2) + b"\n"


def tables_by_class(limits: Tables) -> dict[str, ClassTable]:
    """Return each quota class's table by the class's name."""
    return {name: getattr(limits, name) for name in Tables.__struct_fields__}


def quota_of(table: ClassTable, where: str = "limits") -> Quota:
    """Return the quota that a table means; raises Invalid for a rate that the limiter cannot hold exactly."""
    rates: dict[Limit, Rate] = {}
    for limit in RATES:
        value = table.value(limit)
        if isinstance(value, RateValue):
            rates[limit] = rate_of(value, f"{where}.{limit}")
    return Quota(rates=rates, **{limit.value: getattr(table, limit) for limit in CAPS})


def rate_of(value: RateValue, where: str) -> Rate:
    """Return the rate that is meant; raises Invalid unless it is a multiple of 1/1000."""
    per_s = Fraction(repr(value.per_s))  # what was written: 10.29, not the binary number next to it
    if (per_s * 1000).denominator != 1:
        raise Invalid(f"{where}.per_s", f"give a multiple of 0.001, not {value.per_s!r}")
    return Rate(per_s, value.burst)


def table_of(quota: Quota) -> ClassTable:
    """Return the table that means this quota."""
    values: dict[str, Any] = {limit.value: quota.cap(limit) for limit in CAPS}
    for limit in RATES:
        rate = quota.rates.get(limit)
        values[limit.value] = None if rate is None else RateValue(float(rate.per_s), rate.burst)
    return ClassTable(**values)


FIRST = Tables(default=table_of(DEFAULT), calibration=table_of(LIFTED))
"""The values of revision 1."""


def apply(table: ClassTable, overrides: Mapping[str, RateValue | int | None]) -> ClassTable:
    """Return a table with a workspace's own values in place of the class's."""
    return msgspec.structs.replace(table, **overrides) if overrides else table


_PATH = re.compile(r" - at `(?:key in )?\$\.?(.*)`$")
_NAMED = re.compile(r"field `([^`]+)`")


def _explain(message: str) -> Invalid:
    """Turn msgspec's sentence into an error that names the field."""
    path = _PATH.search(message)
    reason = message[: path.start()] if path else message
    named = _NAMED.search(reason)
    where = [part for part in ((path.group(1) if path else ""), (named.group(1) if named else "")) if part]
    return Invalid(".".join(where) or "file", reason[0].lower() + reason[1:])
