"""What the notebook of burst limits shows: the answer in words, every trial of every level, the levels as a table.

Computes nothing: the numbers are those of `brackets`. Samples without a search for burst limits are no fault; each part
then says so in a sentence.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator
from pandas.io.formats.style import Styler

from harness.analysis.brackets import Limit, limits_frame, limits_of
from harness.analysis.dataset import Dataset
from harness.analysis.drawing import GREY, INK, PALE, RED, Drawing, finish, name_panel, new_figure, scale_log
from harness.analysis.layout import Passage, answer, cell, plainly, styled
from harness.analysis.slo import Status, number, percent, plural
from harness.analysis.validity import ID_SHOWN, Finding

NONE = "These samples hold no search for burst limits: make one with `python -m harness burst-limits`."
"""Said where there is nothing to show."""

LOOKS = {Status.PASS: ("#0072B2", "o"), Status.FAIL: (RED, "X"), Status.INCONCLUSIVE: (GREY, "d")}
"""Colour and mark of a level by its verdict, as in every figure."""

SPREAD = 0.34
"""Half the width of a level's strip, of the distance between two levels."""


def conclusion(data: Dataset, findings: tuple[Finding, ...] = ()) -> Passage:
    """Say for each endpoint which burst meets the SLO and which misses it."""
    if findings:
        return answer("INVALID", "Nothing was judged, because the measurement cannot be trusted.")
    limits = limits_of(data)
    if not limits:
        return answer("NOT APPLICABLE", NONE)
    open_ = [one for one in limits if one.status is not Status.PASS]
    first = (
        f"The burst limits of {plural(len(limits), 'endpoints')} are held from both sides."
        if not open_
        else f"{len(open_)} of {plural(len(limits), 'burst limits')} could not be held from both sides."
    )
    return answer("INCONCLUSIVE" if open_ else "FOUND", first, [_named(one, limits) + one.words for one in limits])


def strips(data: Dataset) -> Drawing | Passage:
    """Draw every trial of every level at its own p95 beside the limit, and below it the share of slow requests.

    A level passes when the upper end of its bar is at most the share allowed, and fails when the lower end is above it.
    """
    limits = [one for one in limits_of(data) if len(one.levels)]
    if not limits:
        return plainly(NONE)
    columns = min(len(limits), 3)
    bands = math.ceil(len(limits) / columns)
    figure, axes = new_figure(2 * bands, columns, height=4.6 * bands + 0.3)
    for place, limit in enumerate(limits):
        band, column = divmod(place, columns)
        above, below = axes[2 * band * columns + column], axes[(2 * band + 1) * columns + column]
        _strip(above, limit, _named(limit, tuple(limits)))
        _shares(below, limit)
        if column == 0:
            above.set_ylabel("each trial's tail, ms")
            below.set_ylabel("slow requests")
    for place in range(len(limits), bands * columns):  # the last band may have room to spare
        band, column = divmod(place, columns)
        axes[2 * band * columns + column].set_axis_off()
        axes[(2 * band + 1) * columns + column].set_axis_off()
    said = "; ".join(_described(one) for one in limits)
    return finish(
        figure, "Trials per burst level", f"Each trial at each burst level, and the share that was slow. {said}."
    )


def levels(data: Dataset) -> Styler | Passage:
    """Lay out the levels: what was tried and what it proves."""
    limits = limits_of(data)
    if not limits:
        return plainly(NONE)
    frame = limits_frame(limits)
    shown = pd.DataFrame(
        {
            "Endpoint": frame["endpoint"],
            "Burst": frame["level"].map(cell),
            "Verdict": [f"{_mark(Status(word))}\u00a0{word}" for word in frame["verdict"]],
            "Trials": frame["trials"].map(cell),
            "Requests": frame["requests"].map(cell),
            "Failed": frame["failed"].map(cell),
            "Slow": frame["slow_share"].map(_share),
            "95 % bounds": [
                f"{_share(low)} to {_share(high)}"
                for low, high in zip(frame["slow_share_lower"], frame["slow_share_upper"], strict=True)
            ],
            "p50, ms": frame["latency_ms_p50"].map(cell),
            "p95, ms": frame["latency_ms_p95"].map(cell),
            "Queue left": frame["queue_depth_max"].map(cell),
            "More trials": frame["more_trials"].map(cell),
        }
    )
    if frame["measurement_id"].nunique() > 1:
        shown.insert(0, "Measurement", frame["measurement_id"].str.slice(0, ID_SHOWN))
    words = {"Measurement", "Endpoint", "Verdict"}
    return styled(shown, numeric=tuple(column for column in shown.columns if column not in words))


def _share(value: float) -> str:
    """Return a share to a hundredth of a percent: finer than so few trials tell."""
    return percent(round(value, 4))


def _mark(status: Status) -> str:
    """Return the mark by which a verdict is told without its colour."""
    return {Status.PASS: "✓", Status.FAIL: "✗"}.get(status, "?")


def _named(limit: Limit, among: tuple[Limit, ...]) -> str:
    """Return the measurement's short name where there are several, for a sentence or a heading."""
    several = len({one.measurement_id for one in among}) > 1
    return f"{limit.measurement_id[:ID_SHOWN]}, " if several else ""


def _strip(axis: Axes, limit: Limit, name: str) -> None:
    """Draw one endpoint's trials: a mark for each at its own tail, on a place of its own within its level."""
    trials, required = limit.trials, limit.requirement
    finite = trials["tail_ms"][np.isfinite(trials["tail_ms"])]
    top = max([required.limit_ms, *finite]) * 1.6
    low = min([required.limit_ms, *finite]) / 1.6
    axis.set_yscale("log")
    axis.set_ylim(low, top)
    axis.axhspan(required.limit_ms, top, color=PALE, lw=0, zorder=0)
    axis.axhline(required.limit_ms, color=INK, lw=1, ls="--")
    axis.text(0.01, required.limit_ms, required.words, va="bottom", color=INK, size=8,
              transform=axis.get_yaxis_transform())  # fmt: skip
    for place, (_, level) in enumerate(limit.levels.iterrows()):
        own = trials[trials["level"] == level["level"]]
        tails = own["tail_ms"].to_numpy(dtype=np.float64)
        colour, mark = LOOKS[Status(level["verdict"])]
        at = place + np.linspace(-SPREAD, SPREAD, len(own)) if len(own) > 1 else np.array([float(place)])
        seen = np.isfinite(tails)
        axis.plot(at[seen], tails[seen], ls="", marker=mark, ms=3.4, mew=0, color=colour, alpha=0.75)
        if not seen.all():  # a tail among the failures has no height: it stands at the upper edge
            axis.plot(at[~seen], np.full((~seen).sum(), top), ls="", marker="x", ms=4, color=RED, clip_on=False)
    scale_log(axis.yaxis)
    _level_axis(axis, limit, named=False)
    name_panel(axis, f"{name}{required.endpoint.value}")


def _shares(axis: Axes, limit: Limit) -> None:
    """Draw the share of slow requests at each level with its bounds, beside the share allowed."""
    allowed = limit.requirement.slow_share
    for place, (_, level) in enumerate(limit.levels.iterrows()):
        colour, mark = LOOKS[Status(level["verdict"])]
        low, high = float(level["slow_share_lower"]), float(level["slow_share_upper"])
        axis.plot([place, place], [low, high], color=colour, lw=4, solid_capstyle="butt", alpha=0.45)
        axis.plot([place], [float(level["slow_share"])], color=colour, marker=mark, ms=6, clip_on=False)
    axis.axhline(allowed, color=INK, lw=1, ls="--")
    axis.set_ylim(0.0, min(1.0, max(4 * allowed, float(limit.levels["slow_share_upper"].max()) * 1.05)))
    axis.text(0.01, allowed, f"{percent(allowed)} allowed", va="bottom", color=INK, size=8,
              transform=axis.get_yaxis_transform())  # fmt: skip
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: percent(y)))
    _level_axis(axis, limit, named=True)
    axis.set_xlabel("requests at once")


def _level_axis(axis: Axes, limit: Limit, *, named: bool) -> None:
    """Name the levels below a panel: one place each, in rising order."""
    places = range(len(limit.levels))
    labels = [f"{level:,}" for level in limit.levels["level"]] if named else [""] * len(limit.levels)
    axis.set_xlim(-0.7, len(limit.levels) - 0.3)
    crowded = len(limit.levels) > 6
    axis.set_xticks(list(places), labels, rotation=90 if crowded else 0)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(visible=False, axis="x")


def _described(limit: Limit) -> str:
    """Return one endpoint's levels in words."""
    told = ", ".join(
        f"{level['level']:,} {level['verdict']} ({percent(float(level['slow_share']))} slow in "
        f"{plural(int(level['trials']), 'trials')}, p95 {_tail(level['latency_ms_p95'])})"
        for _, level in limit.levels.iterrows()
    )
    return f"{limit.requirement.endpoint.value}, {limit.requirement.words}: {told}"


def _tail(value: float | None) -> str:
    """Return a quantile in words; none is among the failures."""
    return "failed" if pd.isna(value) else f"{number(float(value or 0.0))} ms"
