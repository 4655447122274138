"""The figures of a report: what was waited, when, and where the time went.

Each is drawn for light paper in the Okabe-Ito colours, which colour-blind readers can tell apart, and each series is
also named in place and marked by shape, so that nothing is lost in greyscale. Every figure says in words what it
shows (`alt`), with the same numbers as the tables.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from harness.analysis import tables
from harness.analysis.dataset import Dataset, moment_ns, waited_ms
from harness.analysis.dependence import Floats, Ints
from harness.analysis.drawing import (
    GREY,
    INK,
    MARKERS,
    ORANGE,
    PALE,
    RED,
    SKY,
    Drawing,
    colour_of,
    finish,
    milliseconds,
    name_panel,
    new_figure,
    scale_log,
)
from harness.analysis.quantiles import quantile
from harness.analysis.slo import CHANGE, Measure, Slo, Statistic, Status, Verdict, number, percent, plural, with_unit
from harness.sample import Endpoint, Mode

PARTS = {
    "server_db_ms": ("database", "#0072B2", ""),
    "server_quota_ms": ("quota", "#E69F00", "///"),
    "server_publish_ms": ("publish", "#009E73", "..."),
    "server_app_ms": ("app", "#56B4E9", "\\\\\\"),
    "rest": ("network, HTTP and client", "#D9D9D9", ""),
}
"""Server-Timing's parts, which add up to the service's share; the rest is what the client waited beyond them."""

EDGE = 1.6
"""How far beyond an SLO's limit is drawn; what lies further is an arrow at the edge."""

OFF_SCALE_MS = 1e9
"""Above every latency: as far as the corner that an SLO forbids is drawn."""

DOTS_MAX = 1_500
"""Requests of one panel that are drawn one by one; more become a heat map."""

HEAT_CELLS = (160, 28)
"""Cells of a heat map in time and in latency: some six pixels each."""

POINTS_MAX = 400
"""Points of one line of resources; of a longer measurement the highest of each stretch is drawn."""

FEW = 120
"""Points of one line that are marked one by one."""

CURVE_POINTS_MAX = 2_000
"""Steps of a percentile curve; of more requests those are kept that a reader can tell apart."""

TAIL_TICKS = (0.5, 0.95, 0.99, 0.999, 0.9999, 0.99999)


@dataclasses.dataclass(frozen=True)
class View:
    """The samples of one endpoint under one load: never mixed with another's in one curve."""

    name: str  # "create", or "create (burst)" beside another load
    mode: Mode
    endpoint: Endpoint
    samples: pd.DataFrame  # in the order in which they were due


def views_of(data: Dataset) -> list[View]:
    """Return what there is to draw, load by load in the order of the scenario."""
    modes = [mode for mode in Mode if any(manifest.mode == mode for manifest in data.manifests)]
    views = []
    for mode in modes:
        part = data.of_modes([mode])
        asked = set(part.samples["endpoint"])
        aside = f" ({mode.value})" if len(modes) > 1 else ""
        views += [
            View(endpoint.value + aside, mode, endpoint, part.of_endpoint(endpoint))
            for endpoint in Endpoint
            if endpoint.value in asked
        ]
    return views


def percentiles(data: Dataset, slos: Iterable[Slo]) -> Drawing:
    """Draw each endpoint's latency at every percentile, the tail stretched (HdrHistogram's plot), beside its SLO.

    The grey corner is what an SLO of a percentile forbids: it is met as long as the curve stays out of it.
    """
    views = views_of(data)
    columns = max(1, min(len(views), 3))
    rows = max(1, math.ceil(len(views) / columns))
    figure, axes = new_figure(rows, columns, height=2.9 * rows + 0.4, sharey=True)
    said, low, high = [], [], []
    for axis, view in zip(axes, views, strict=False):
        waited = np.sort(waited_ms(view.samples))
        own = [one for one in slos if one.endpoint is view.endpoint and one.measure is Measure.LATENCY]
        own = [one for one in own if view.mode in one.modes]
        answered = waited[np.isfinite(waited)]
        low.append(float(answered[0]) if len(answered) else 1.0)
        high.append(max([float(answered[-1]) if len(answered) else 1.0, *(one.limit for one in own)]))
        _percentile_panel(axis, view, waited, own)
        text = ", ".join(f"p{q * 100:g} {_or_failed(quantile(waited, q))}" for q in (0.5, 0.95, 0.99))
        said.append(f"{view.name} ({plural(len(waited), 'requests')}): {text}")
    for axis in axes[len(views) :]:
        axis.set_axis_off()
    if views:
        axes[0].set_ylim(min(low) / 2.0, max(high) * 2.2)  # shared by all panels
        for axis in axes[::columns]:
            axis.set_ylabel("waited, ms (log scale)")
    else:
        axes[0].text(0.5, 0.5, "no request was recorded", ha="center", transform=axes[0].transAxes)
    return finish(figure, "Latency by percentile", f"Latency at each percentile. {'; '.join(said) or 'No request'}.")


def _percentile_panel(axis: Axes, view: View, waited: Floats, slos: Collection[Slo]) -> None:
    """Draw one endpoint's curve with its SLOs."""
    n, colour = len(waited), colour_of(view.endpoint)
    answered = waited[np.isfinite(waited)]
    most = max(2.0 * n, 20.0)
    axis.set_xscale("log")
    axis.set_yscale("log")
    # The i-th of n sorted values is the quantile of every q in ((i-1)/n, i/n]: a step, drawn against 1 / (1 - q).
    if len(answered):
        kept = _steps(n, len(answered))
        starts = 1.0 / (1.0 - kept / n)
        end = most if len(answered) == n else 1.0 / (1.0 - len(answered) / n)
        axis.plot([*starts, end], [*answered[kept], answered[-1]], color=colour, lw=2, drawstyle="steps-post")
    for slo in slos:
        if slo.statistic.q is not None:
            axis.fill_between([1.0, 1.0 / (1.0 - slo.statistic.q)], slo.limit, OFF_SCALE_MS, color=PALE, lw=0, zorder=0)
            edge = 1.0 / (1.0 - slo.statistic.q)
            axis.plot([1.0, edge, edge], [slo.limit, slo.limit, OFF_SCALE_MS], color=INK, lw=1, ls="--")
        elif slo.statistic is Statistic.MEAN:
            axis.axhline(slo.limit, color=INK, lw=1, ls=":")
            if len(answered):
                axis.axhline(float(answered.mean()), color=colour, lw=1, ls=":")
                axis.text(most * 0.92, float(answered.mean()) / 1.12, f"mean {milliseconds(float(answered.mean()))}",
                          va="top", ha="right", color=colour, size=8)  # fmt: skip
        axis.text(1.15, slo.limit * 1.1, slo.requirement, va="bottom", color=INK, size=8)
    if len(answered) < n:
        axis.text(0.98, 0.03, f"{plural(n - len(answered), 'requests')} failed", ha="right", color=RED, size=8,
                  transform=axis.transAxes)  # fmt: skip
    axis.set_xlim(1.0, most)
    ticks = [q for q in TAIL_TICKS if 1.0 / (1.0 - q) <= most]
    axis.xaxis.set_major_locator(FixedLocator([1.0 / (1.0 - q) for q in ticks]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"p{(1.0 - 1.0 / x) * 100:.5g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(y)))
    name_panel(axis, f"{view.name}, {plural(n, 'requests')}", colour)


def _steps(n: int, answered: int) -> Ints:
    """Return the ranks from 0 at which the curve of n requests is drawn: all, or as dense as the axis is stretched."""
    if answered <= CURVE_POINTS_MAX:
        return np.arange(answered)
    tail = n - n * np.geomspace(1.0, 1.0 / n, CURVE_POINTS_MAX)
    ranks: Ints = np.unique(np.minimum(np.round(tail), answered - 1).astype(np.int64))
    return ranks


def latency_over_time(data: Dataset) -> Drawing:
    """Draw each request at the moment it was due, one band per endpoint, many as a heat map; crosses are failures."""
    views = views_of(data)
    figure, axes = new_figure(max(len(views), 1), 1, height=1.25 * max(len(views), 1) + 0.8, sharex=True)
    said = []
    for axis, view in zip(axes, views, strict=False):
        rows, endpoint = view.samples, view.endpoint
        waited, at_s = waited_ms(rows), seconds_since_start(data, rows, moment_ns(rows))
        good = np.isfinite(waited)
        axis.set_yscale("log")
        if int(good.sum()) <= DOTS_MAX:
            axis.scatter(at_s[good], waited[good], s=11, color=colour_of(endpoint), marker=MARKERS[endpoint], lw=0,
                         alpha=0.75)  # fmt: skip
        else:
            _heat(axis, at_s[good], waited[good], _time_limits(data))
        if not good.all():
            axis.scatter(at_s[~good], np.full((~good).sum(), 0.93), s=26, color=RED, marker="x", lw=1.4, clip_on=False,
                         transform=axis.get_xaxis_transform())  # fmt: skip
            axis.text(1.0, 1.02, f"x {plural(int((~good).sum()), 'failures')}", color=RED, ha="right", size=8,
                      transform=axis.transAxes)  # fmt: skip
        low, high = (float(waited[good].min()), float(waited[good].max())) if good.any() else (1.0, 10.0)
        axis.set_ylim(low / 1.8, max(high, low * 4.0) * 2.2)
        scale_log(axis.yaxis)
        name_panel(axis, f"{view.name}, ms", colour_of(endpoint))
        said.append(
            f"{view.name}: {plural(int(good.sum()), 'requests')} between {milliseconds(low)} and "
            f"{milliseconds(high)}, {plural(int((~good).sum()), 'failures')}"
        )
    axes[-1].set_xlabel("seconds since the first request")
    axes[-1].set_xlim(*_time_limits(data))
    return finish(figure, "Latency over time", f"Latency of each request over time. {'; '.join(said) or 'No request'}.")


def _heat(axis: Axes, at_s: Floats, waited: Floats, ends: tuple[float, float]) -> None:
    """Draw how many requests fell into each cell of time and latency (Gregg's heat map): the darker, the more.

    Counts are drawn by their logarithm, so that a single slow request among thousands is still seen.
    """
    low, high = float(waited.min()), float(waited.max())
    heights = np.geomspace(low / 1.001, max(high, low * 1.01) * 1.001, HEAT_CELLS[1] + 1)
    widths = np.linspace(0.0, max(ends[1], 1e-9), HEAT_CELLS[0] + 1)
    counts, _, _ = np.histogram2d(at_s, waited, bins=[widths, heights])
    shades = np.ma.masked_equal(counts.T, 0.0)
    norm = LogNorm(vmin=0.5, vmax=max(float(counts.max()), 2.0))
    axis.pcolormesh(widths, heights, shades, cmap="cividis_r", norm=norm, rasterized=True)
    axis.text(1.0, 1.02, f"darker is more, at most {plural(int(counts.max()), 'requests')} in one cell", ha="right",
              color=GREY, size=8, transform=axis.transAxes)  # fmt: skip


def _thinned(at_s: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Return the seconds as they are, or, of a long measurement, the most of each of POINTS_MAX equal stretches."""
    if len(at_s) <= POINTS_MAX or float(np.ptp(at_s)) == 0.0:
        return at_s, values
    place = np.minimum((at_s - at_s.min()) / np.ptp(at_s) * POINTS_MAX, POINTS_MAX - 1).astype(np.int64)
    kept = [np.flatnonzero(place == number) for number in range(POINTS_MAX)]
    tops = [rows[int(np.argmax(values[rows]))] for rows in kept if len(rows)]
    return at_s[tops], values[tops]


def server_timing(data: Dataset) -> Drawing:
    """Draw where a mean request's time went: the service's own parts (Server-Timing), then everything outside of it."""
    timed = [(view, parts) for view in views_of(data) if not (parts := _parts_of(view.samples)).empty]
    figure, (axis,) = new_figure(1, 1, height=0.55 * max(len(timed), 1) + 1.25)
    said = []
    for row, (view, parts) in enumerate(timed):
        left = 0.0
        for name, (_, colour, hatch) in PARTS.items():
            axis.barh(row, parts[name], left=left, color=colour, hatch=hatch, edgecolor="white", lw=0.8, height=0.62)
            left += float(parts[name])
        axis.text(left, row, f"  {milliseconds(left)}", va="center", color=INK, size=9)
        words = ", ".join(f"{PARTS[name][0]} {milliseconds(float(parts[name]))}" for name in PARTS)
        said.append(f"{view.name} {milliseconds(left)}: {words}")
    if timed:
        axis.set_xlim(0, max(float(parts.sum()) for _, parts in timed) * 1.12)
        axis.set_yticks(range(len(timed)), [view.name for view, _ in timed])
        axis.invert_yaxis()
        handles = [axis.barh(0, 0, color=c, hatch=h, edgecolor="white", label=label) for label, c, h in PARTS.values()]
        axis.legend(handles=handles, ncols=len(PARTS), loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False,
                    borderaxespad=0.2, handlelength=1.4, columnspacing=1.4)  # fmt: skip
    else:
        axis.text(0.5, 0.5, "no response carried Server-Timing", ha="center", transform=axis.transAxes)
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("mean over answered requests, ms from sending to the last byte")
    text = "; ".join(said) or "No response carried Server-Timing"
    return finish(figure, "Where the time went", f"Mean time per request by part. {text}.")


def _parts_of(samples: pd.DataFrame) -> pd.Series:
    """Return the mean of each part in ms over the requests that carry all of them; empty when none does."""
    names = [name for name in PARTS if name != "rest"]
    known = samples[[*names, "service_ms"]].dropna().astype(np.float64)
    if known.empty:
        return pd.Series(dtype=np.float64)
    means = known.mean()
    rest = float(means["service_ms"]) - float(means[names].sum())
    return pd.Series({**{name: float(means[name]) for name in names}, "rest": max(rest, 0.0)}, dtype=np.float64)


def resources(data: Dataset) -> Drawing:
    """Draw what the machine did meanwhile, once a second, on the time axis of the latencies."""
    bands: tuple[tuple[str, tuple[tuple[str, str, str, str], ...]], ...] = (
        ("CPU, %", (("cpu_percent", "whole machine", INK, "-"), ("harness_cpu_percent", "harness", SKY, ":"),
                    ("service_cpu_percent", "service, 100 = one core", ORANGE, "--"))),
        ("due ticks waiting", (("queue_depth", "", "#0072B2", "-"),)),
        ("ticks per second", (("ticks_per_s", "", "#009E73", "-"),)),
        ("generator lag, ms", (("generator_lag_ms", "", "#CC79A7", "-"),)),
    )  # fmt: skip
    told = [(title, [line for line in lines if data.resources[line[0]].notna().any()]) for title, lines in bands]
    told = [(title, lines) for title, lines in told if lines]
    figure, axes = new_figure(max(len(told), 1), 1, height=1.05 * max(len(told), 1) + 0.8, sharex=True)
    said = []
    for axis, (title, lines) in zip(axes, told, strict=False):
        right = 1.0
        for column, label, colour, style in reversed(lines):
            rows = data.resources.dropna(subset=column).sort_values(["measurement_id", "at_ns"])
            at_s, values = seconds_since_start(data, rows, rows["at_ns"]), rows[column].to_numpy(dtype=np.float64)
            at_s, drawn = _thinned(at_s, values)
            axis.plot(at_s, drawn, color=colour, ls=style, lw=1.6, marker="o" if len(at_s) <= FEW else "", ms=2.6)
            if label:
                axis.text(right, 1.06, label, color=colour, ha="right", size=8.5, transform=axis.transAxes)
                right -= 0.0078 * len(label) + 0.02  # a letter is about so wide
            said.append(f"{label or title}: mean {number(float(values.mean()))}, most {number(float(values.max()))}")
        name_panel(axis, title)
        axis.set_ylim(0.0, max(1.0, axis.get_ylim()[1]) * 1.1)
    if not told:
        axes[0].text(0.5, 0.5, "no resources were recorded", ha="center", transform=axes[0].transAxes)
    axes[-1].set_xlabel("seconds since the first request")
    axes[-1].set_xlim(*_time_limits(data))
    return finish(figure, "The machine meanwhile", f"Resources once a second. {'; '.join(said) or 'None recorded'}.")


def limits_used(verdicts: Collection[Verdict]) -> Drawing:
    """Draw how much of each SLO's limit is used up, with its bounds: left of the line is met, right is missed."""
    shown = [one for one in verdicts if one.interval is not None and one.interval.limit > 0.0]
    shown = [one for one in shown if one.unit != CHANGE]  # which may lie on both sides of nothing
    figure, (axis,) = new_figure(1, 1, height=0.48 * max(len(shown), 1) + 1.1)
    said = []
    for row, verdict in enumerate(shown):
        low, middle, high = _used(verdict)
        colour = {Status.PASS: "#0072B2", Status.FAIL: RED}.get(verdict.verdict, GREY)
        marker = {Status.PASS: "o", Status.FAIL: "X"}.get(verdict.verdict, "d")
        axis.plot([min(low, EDGE), min(high, EDGE)], [row, row], color=colour, lw=4, solid_capstyle="butt", alpha=0.45)
        axis.plot(
            [min(middle, EDGE)], [row], color=colour, marker=marker if middle < EDGE else ">", ms=7, clip_on=False
        )
        if high > EDGE > middle:
            axis.plot([EDGE], [row], color=colour, marker=">", ms=7, clip_on=False)
        axis.text(1.03, row, _of_limit(verdict), va="center", color=INK, size=8.5,
                  transform=axis.get_yaxis_transform())  # fmt: skip
        said.append(f"{_title(verdict, shown)}: {_of_limit(verdict)}, {verdict.verdict.value}")
    axis.axvline(1.0, color=INK, lw=1.2)
    axis.set_xlim(0.0, EDGE)
    axis.set_ylim(max(len(shown), 1) - 0.4, -0.6)
    axis.set_yticks(range(len(shown)), [f"{_title(one, shown)}\n{one.requirement}" for one in shown])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x * 100:.0f} %"))
    axis.tick_params(axis="y", length=0, pad=9)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("of the limit used: the point is the estimate, the bar its 95 % bounds")
    return finish(figure, "How near each SLO is", f"Share of each limit used. {'; '.join(said) or 'None judged'}.")


def _of_limit(verdict: Verdict) -> str:
    """Return the estimate beside its limit, such as "135 of 300 ms" or "0 % slow, 5 % allowed"."""
    interval = verdict.interval
    assert interval is not None  # noqa: S101 - the caller keeps those that have one
    if interval.unit == "share":
        what = "failed" if verdict.statistic is Statistic.ERROR_SHARE else "slow"
        return f"{percent(interval.estimate)} {what}, {percent(interval.limit)} allowed"
    if verdict.statistic is Statistic.PER_BUSY_SECOND:
        return f"{with_unit(interval.estimate, interval.unit)}, at least {with_unit(interval.limit, interval.unit)}"
    return f"{number(interval.estimate)} of {with_unit(interval.limit, interval.unit)}"


def _title(verdict: Verdict, among: Collection[Verdict]) -> str:
    """Return an SLO's title, with its load where that is judged beside another."""
    several = len({one.mode for one in among}) > 1
    return f"{verdict.title} ({verdict.mode.value})" if several and verdict.mode else verdict.title


def _used(verdict: Verdict) -> tuple[float, float, float]:
    """Return the low end, the estimate and the high end as shares of the limit; for a minimum the other way round."""
    interval = verdict.interval
    assert interval is not None  # noqa: S101 - the caller keeps those that have one
    values = [interval.lower or 0.0, interval.estimate, np.inf if interval.upper is None else interval.upper]
    if verdict.statistic is Statistic.PER_BUSY_SECOND:
        values = [interval.limit / value if value > 0.0 else np.inf for value in reversed(values)]
        return values[0], values[1], values[2]
    low, middle, high = (value / interval.limit for value in values)
    return low, middle, high


def seconds_since_start(data: Dataset, rows: pd.DataFrame, at_ns: pd.Series) -> Floats:
    """Return the instants of these rows in seconds since the first request of their measurement, shape (n_rows,)."""
    starts = tables.first_request_ns(data)
    since = (at_ns - rows["measurement_id"].map(starts).astype("Int64")) / 1e9
    return since.to_numpy(dtype=np.float64, na_value=np.nan)


def _time_limits(data: Dataset) -> tuple[float, float]:
    """Return the ends of the time axis in seconds: the longest measurement, with a little room."""
    starts = tables.first_request_ns(data)
    longest = max((one.clock.end.monotonic_ns - starts[one.measurement_id]) / 1e9 for one in data.manifests)
    return -0.02 * longest, 1.02 * longest


def _or_failed(value: float) -> str:
    """Return a latency in words; infinity is a failure."""
    return milliseconds(value) if np.isfinite(value) else "failed"
