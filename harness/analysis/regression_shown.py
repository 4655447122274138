"""What the notebook of regressions shows: the gate's answer in words, the changes with their bounds, every measurement.

Computes nothing: the numbers are those of `gate`. Without a baseline each part says so in a sentence.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator
from pandas.io.formats.style import Styler

from harness.analysis.dataset import Dataset
from harness.analysis.drawing import GREY, INK, PALE, RED, Drawing, finish, milliseconds, name_panel, new_figure
from harness.analysis.gate import GATED, MARGIN, Comparison, compare, comparison_frame, judge_regression
from harness.analysis.layout import Passage, answer, cell, plainly, styled
from harness.analysis.slo import Status, number, percent, plural, signed_percent
from harness.analysis.validity import Finding

NONE = (
    "There is no baseline to compare with. `make baseline` measures this machine's into data/baselines/smoke; any other"
    " measurement is given with --baseline."
)

LOOKS = {Status.PASS: ("#0072B2", "o"), Status.FAIL: (RED, "X"), Status.INCONCLUSIVE: (GREY, "d")}

CHANGE_MAX = 0.5
"""Changes beyond this are drawn as an arrow at the edge, so that a margin of 5 % stays visible."""


def conclusion(data: Dataset, baseline: Dataset | None, findings: tuple[Finding, ...] = ()) -> Passage:
    """Say whether these measurements are slower than the baseline."""
    if findings:
        return answer("INVALID", "Nothing was compared, because the measurements cannot be trusted.")
    if baseline is None:
        return answer("NOT APPLICABLE", NONE)
    verdicts = judge_regression(data, baseline)
    slower = [one for one in verdicts if one.verdict is Status.FAIL]
    open_ = [one for one in verdicts if one.verdict is Status.INCONCLUSIVE]
    word = "FAIL" if slower else "INCONCLUSIVE" if open_ else "PASS"
    first = (
        f"{len(slower)} of {plural(len(verdicts), 'comparisons')} show a slowdown."
        if slower
        else f"{len(open_)} of {plural(len(verdicts), 'comparisons')} could not be decided; no slowdown is proven."
        if open_
        else f"None of {plural(len(verdicts), 'comparisons')} is slower by more than {percent(MARGIN)}."
    )
    return answer(word, first, [f"{one.title}: {one.reason}" for one in slower + open_])


def changes(data: Dataset, baseline: Dataset | None) -> Drawing | Passage:
    """Draw each change with its bounds: left of the margin is no regression, right of nothing is a slowdown."""
    compared = () if baseline is None else compare(data, baseline)
    shown = [one for one in compared if one.found.change is not None]
    if not shown:
        return plainly(NONE if baseline is None else "No change could be told.")
    widest = max(abs(value or 0.0) for one in shown for value in (one.found.lower, one.found.upper))
    edge = min(CHANGE_MAX, max(widest * 1.1, 3.0 * MARGIN))
    figure, (axis,) = new_figure(1, 1, height=0.36 * len(shown) + 1.1)
    axis.axvspan(MARGIN, edge, color=PALE, lw=0, zorder=0)
    axis.axvline(0.0, color=INK, lw=1.2)
    axis.axvline(MARGIN, color=INK, lw=1, ls="--")
    for row, one in enumerate(shown):
        _change_row(axis, row, one, edge)
    axis.set_xlim(-edge, edge)
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.set_yticks(range(len(shown)), [_named(one, shown) for one in shown])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: signed_percent(round(x, 6))))
    axis.tick_params(axis="y", length=0, pad=9)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel(
        f"change against the baseline; the bar is its 95 % bounds, dashed is the margin of {percent(MARGIN)}"
    )
    said = "; ".join(f"{_named(one, shown)} {_change_words(one)}" for one in shown)
    return finish(figure, "Change against the baseline", f"Change of each quantile against the baseline. {said}.")


def measurements(data: Dataset, baseline: Dataset | None) -> Drawing | Passage:
    """Draw each measurement's own quantiles, baseline left, candidate right; pairs are joined."""
    compared = () if baseline is None else compare(data, baseline)
    shown = [one for one in compared if one.statistic in GATED]
    if not shown:
        return plainly(NONE if baseline is None else "No measurement could be compared.")
    columns = min(len(shown), 4)
    rows = math.ceil(len(shown) / columns)
    figure, axes = new_figure(rows, columns, height=2.5 * rows + 0.3)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    for place, (axis, one) in enumerate(zip(axes, shown, strict=False)):
        _measured_panel(axis, one, _named(one, shown))
        if place % columns == 0:
            axis.set_ylabel("ms")
    said = "; ".join(f"{_named(one, shown)}: {_levels(one)}" for one in shown)
    return finish(figure, "Every measurement", f"Quantiles of each measurement, baseline and candidate. {said}.")


def comparisons(data: Dataset, baseline: Dataset | None) -> Styler | Passage:
    """Lay out the comparisons; the p99 is shown and not judged."""
    if baseline is None:
        return plainly(NONE)
    frame = comparison_frame(compare(data, baseline))
    if frame.empty:
        return plainly("No measurement could be compared.")
    marks = {"PASS": "✓", "FAIL": "✗", "INCONCLUSIVE": "?", "": "·"}
    shown = pd.DataFrame(
        {
            "Verdict": [f"{marks[word]}\u00a0{word or 'NOT APPLICABLE'}" for word in frame["verdict"]],
            "Load": frame["mode"],
            "Endpoint": frame["endpoint"],
            "Quantile": frame["statistic"],
            "Baseline, ms": frame["baseline_ms"].map(cell),
            "Candidate, ms": frame["candidate_ms"].map(cell),
            "Change": frame["change"].map(_signed),
            "95 % bounds": [
                "—" if pd.isna(low) else f"{_signed(low)} to {_signed(high)}"
                for low, high in zip(frame["lower"], frame["upper"], strict=True)
            ],
            "Noise": ["—" if pd.isna(value) else percent(float(value)) for value in frame["noise"]],
            "Measurements": [
                f"{ours} in pairs" if paired else f"{ours} against {theirs}"
                for ours, theirs, paired in zip(
                    frame["candidate_runs"], frame["baseline_runs"], frame["paired"], strict=True
                )
            ],
        }
    )
    return styled(shown, numeric=("Baseline, ms", "Candidate, ms", "Change", "95 % bounds", "Noise"))


def _change_row(axis: Axes, row: int, one: Comparison, edge: float) -> None:
    """Draw one change."""
    found = one.found
    low, middle, high = (
        float(np.clip(value or 0.0, -edge, edge)) for value in (found.lower, found.change, found.upper)
    )
    colour, mark = LOOKS[found.status] if one.statistic in GATED else (GREY, "|")
    axis.plot([low, high], [row, row], color=colour, lw=4, solid_capstyle="butt", alpha=0.45)
    axis.plot([middle], [row], color=colour, marker=mark, ms=7, clip_on=False)
    axis.text(1.02, row, _change_words(one), va="center", color=INK, size=8.5, transform=axis.get_yaxis_transform())


def _measured_panel(axis: Axes, one: Comparison, name: str) -> None:
    """Draw one quantile's measurements on both sides."""
    for place, values in ((0.0, one.baseline_ms), (1.0, one.candidate_ms)):
        finite = values[np.isfinite(values)]
        colour, mark = (GREY, "o") if place == 0.0 else ("#0072B2", "s")
        spread = np.linspace(-0.16, 0.16, len(finite)) if len(finite) > 1 and not one.found.is_paired else 0.0
        axis.plot(np.full(len(finite), place) + spread, finite, ls="", marker=mark, ms=4, color=colour, alpha=0.8)
    if one.found.is_paired:
        for before, after in zip(one.baseline_ms, one.candidate_ms, strict=True):
            axis.plot([0.0, 1.0], [before, after], color=GREY, lw=0.7, zorder=0)
    axis.set_xlim(-0.5, 1.5)
    axis.set_xticks([0.0, 1.0], ["baseline", "candidate"], size=7.5)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(y)))
    axis.grid(visible=False, axis="x")
    name_panel(axis, name)
    axis.title.set_fontsize(8.5)


def _named(one: Comparison, among: list[Comparison]) -> str:
    """Return what is compared, with its load where there are several."""
    several = len({other.mode for other in among}) > 1
    return f"{one.endpoint.value} {one.statistic.value}" + (f" ({one.mode.value})" if several else "")


def _change_words(one: Comparison) -> str:
    """Return a change with its bounds and its verdict."""
    found = one.found
    verdict = found.status.value if one.statistic in GATED else "shown"
    return f"{_signed(found.change)} ({_signed(found.lower)} to {_signed(found.upper)}), {verdict}"


def _levels(one: Comparison) -> str:
    """Return the range of either side."""
    sides = [("baseline", one.baseline_ms), ("candidate", one.candidate_ms)]
    return ", ".join(f"{name} {milliseconds(side.min())} to {milliseconds(side.max())}" for name, side in sides)


def _signed(value: float | None) -> str:
    """Return a change for a table."""
    return "—" if value is None or pd.isna(value) else signed_percent(round(float(value), 4))
