"""What a bench found: figures, their ratios to their floors, and the aims. Pure: numbers in, a file and a table out.

Every figure keeps the raw values of its repeats. A ratio is taken within each repeat, where path and floor were
measured seconds apart, and only then summed up; so a machine that slows down half-way does not bend it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np


class Spread(msgspec.Struct, frozen=True):
    """Repeats of one number, summed up."""

    median: float
    min: float
    max: float


class Repeat(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement of one figure."""

    rate_per_s: float  # in the figure's unit
    count: int  # how many were done
    seconds: float  # in how long
    latency_ms_p50: float | None = None  # null where single ones are not timed
    latency_ms_p95: float | None = None
    latency_ms_p99: float | None = None


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """A path of the project, or a floor beside it."""

    name: str
    connections: int | None  # null where there are none
    unit: str  # what is counted per second
    floor: bool  # measured only to compare with
    rate_per_s: Spread
    latency_ms_p50: Spread | None
    latency_ms_p95: Spread | None
    latency_ms_p99: Spread | None
    repeats: list[Repeat]


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """A figure's rate over its floor's rate at the same number of connections."""

    name: str
    floor: str
    connections: int | None
    floor_connections: int | None
    ratio: Spread
    repeats: list[float]


class Aim(msgspec.Struct, frozen=True, kw_only=True):
    """What the project wants of a figure, and whether this run reached it. Reaching none of them is no failure."""

    aim: str
    found: float | None  # null when it was not measured this time
    reached: bool | None


class Bench(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `bench.json`."""

    bench_id: str
    started_at: str  # ISO 8601, UTC
    ended_at: str
    commit: str | None
    versions: dict[str, str]
    machine: dict[str, Any]
    load_average_before: tuple[float, float, float]  # processes, over 1, 5 and 15 minutes
    load_average_after: tuple[float, float, float]
    parameters: dict[str, Any]
    figures: list[Figure]
    ratios: list[Ratio]
    aims: list[Aim]


def repeat_of(latencies_ns: bytes, seconds: float) -> Repeat:
    """Sum one load up; quantiles are observed values: the smallest that such a share did not exceed."""
    latency_ms = np.frombuffer(latencies_ns, np.int64) / 1e6
    if not len(latency_ms):
        return Repeat(rate_per_s=0.0, count=0, seconds=seconds)
    p50, p95, p99 = np.quantile(latency_ms, [0.5, 0.95, 0.99], method="inverted_cdf").tolist()
    return Repeat(
        rate_per_s=len(latency_ms) / seconds,
        count=len(latency_ms),
        seconds=seconds,
        latency_ms_p50=p50,
        latency_ms_p95=p95,
        latency_ms_p99=p99,
    )


def spread(values: Sequence[float]) -> Spread:
    """Sum repeats up."""
    return Spread(statistics.median(values), min(values), max(values))


def figure(name: str, connections: int | None, unit: str, repeats: Sequence[Repeat], *, floor: bool) -> Figure:
    """Sum the repeats of one figure up."""

    def of(value: Callable[[Repeat], float | None]) -> Spread | None:
        known = [found for repeat in repeats if (found := value(repeat)) is not None]
        return spread(known) if known else None

    return Figure(
        name=name,
        connections=connections,
        unit=unit,
        floor=floor,
        rate_per_s=spread([repeat.rate_per_s for repeat in repeats]),
        latency_ms_p50=of(lambda repeat: repeat.latency_ms_p50),
        latency_ms_p95=of(lambda repeat: repeat.latency_ms_p95),
        latency_ms_p99=of(lambda repeat: repeat.latency_ms_p99),
        repeats=list(repeats),
    )


def ratio(path: Figure, floor: Figure) -> Ratio:
    """Compare a path with its floor, repeat by repeat."""
    each = [
        ours.rate_per_s / its.rate_per_s if its.rate_per_s else 0.0
        for ours, its in zip(path.repeats, floor.repeats, strict=True)
    ]
    return Ratio(
        name=path.name,
        floor=floor.name,
        connections=path.connections,
        floor_connections=floor.connections,
        ratio=spread(each),
        repeats=each,
    )


def aim_at_least(aim: str, found: float | None, least: float) -> Aim:
    """Judge a number that should be at least so much."""
    return Aim(aim=aim, found=found, reached=None if found is None else found >= least)


def aim_at_most(aim: str, found: float | None, most: float) -> Aim:
    """Judge a number that should be at most so much."""
    return Aim(aim=aim, found=found, reached=None if found is None else found <= most)


def page(bench: Bench) -> str:
    """Write the bench as Markdown that is also readable as it is."""
    before, after = bench.load_average_before[0], bench.load_average_after[0]
    parameters = ", ".join(f"{name} {_plain(value)}" for name, value in bench.parameters.items())
    made = (
        f"Commit {bench.commit or 'unknown'}; {bench.machine.get('cpu')}, {bench.machine.get('cpu_count')} cores;"
        f" load average {before:.2f} before and {after:.2f} after.\nParameters: {parameters}."
        " Each cell is the median of the repeats [their least to their greatest]."
    )
    parts = [
        f"# Bench {bench.bench_id}",
        made,
        _table(
            ["figure", "connections", "per second", "p50 ms", "p95 ms", "p99 ms"],
            [
                [
                    f"{found.name}{' (floor)' if found.floor else ''}",
                    _count(found.connections),
                    f"{_spread(found.rate_per_s)} {found.unit}",
                    *(_spread(value) for value in (found.latency_ms_p50, found.latency_ms_p95, found.latency_ms_p99)),
                ]
                for found in bench.figures
            ],
        ),
    ]
    if bench.ratios:
        rows = [
            [one.name, f"{one.floor}{_other(one)}", _count(one.connections), _spread(one.ratio)] for one in bench.ratios
        ]
        parts.append(_table(["path", "beside", "connections", "ratio"], rows))
    if bench.aims:
        words = {True: "reached", False: "not reached", None: "not measured"}
        rows = [[one.aim, "-" if one.found is None else _number(one.found), words[one.reached]] for one in bench.aims]
        parts.append(_table(["aim", "found", ""], rows))
    return "\n\n".join(parts) + "\n"


def _other(one: Ratio) -> str:
    """Name the floor's connections where they are not the path's."""
    same = one.floor_connections in (None, one.connections)
    return "" if same else f" at {one.floor_connections}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay a Markdown table out; all columns but the first are right-aligned."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *others]) + " |"

    rule = (
        "|"
        + "|".join("-" * (width + 2) if not column else "-" * (width + 1) + ":" for column, width in enumerate(widths))
        + "|"
    )
    return "\n".join([line(head), rule, *(line(row) for row in rows)])


def _count(connections: int | None) -> str:
    return "-" if connections is None else str(connections)


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _spread(value: Spread | None) -> str:
    if value is None:
        return "-"
    return f"{_number(value.median)} [{_number(value.min)} to {_number(value.max)}]"


def _number(value: float) -> str:
    """Show three digits that matter, and every digit of the whole part."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
