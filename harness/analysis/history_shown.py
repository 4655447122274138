"""What the page of the history shows: when a figure changed for good, in words, as pictures and as a table.

Computes nothing: series are those of `histories`, changes those of `history`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from pandas.io.formats.style import Styler

from harness.analysis.drawing import INK, MARKERS, PALE, RED, Drawing, colour_of, finish, name_panel, new_figure
from harness.analysis.histories import Series, change_frame
from harness.analysis.layout import Passage, answer, cell, plainly, styled
from harness.analysis.slo import number, plural, signed_percent
from harness.analysis.validity import short_commit
from harness.sample import Endpoint

DATE = "%Y-%m-%d %H:%M"
COLUMNS = 2
"""The p50 and the p95 of an endpoint stand side by side."""


def conclusion(found: Sequence[Series]) -> Passage:
    """Say which figures changed for good, when, and which could not be looked at."""
    changed = [one for one in found if one.history.changes]
    refused = [one for one in found if one.history.refusal]
    told = [f"{_named(one, found)}: {_changes(one)}." for one in changed]
    reasons: dict[str, list[str]] = {}
    for one in refused:
        reasons.setdefault(one.history.refusal or "", []).append(_named(one, found))
    told += [f"Not looked at: {', '.join(names)}, because {reason}." for reason, names in reasons.items()]
    if len(refused) == len(found):
        return answer("INCONCLUSIVE", "No figure has been reported often enough to tell a change from noise.", told)
    looked = len(found) - len(refused)
    if not changed:
        first = f"None of {plural(looked, 'figures')} has changed for good over these reports."
        return answer("STEADY", first, told)
    return answer("CHANGED", f"{len(changed)} of {plural(looked, 'figures')} changed for good.", told)


def _changes(one: Series) -> str:
    """Return the changes of a series in words."""
    return "; ".join(
        f"{signed_percent(change.change)} from {_point(one, change.index)} on"
        f" ({number(change.before)} to {number(change.after)} ms)"
        for change in one.history.changes
    )


def _point(one: Series, index: int) -> str:
    """Return a report by its instant and commit."""
    row = one.points.iloc[index]
    commit = f", commit {short_commit(row['commit'])}" if row["commit"] else ""
    return f"{row['started_at'].strftime(DATE)}{commit}"


def _named(one: Series, among: Sequence[Series]) -> str:
    """Return a series' name, with its load where there are several."""
    return one.name + (f" ({one.mode})" if len({each.mode for each in among}) > 1 else "")


def lines(found: Sequence[Series]) -> Drawing | Passage:
    """Draw each figure over the reports, its levels, and where one ended."""
    if not found:
        return plainly("No report holds a figure.")
    rows = math.ceil(len(found) / COLUMNS)
    figure, axes = new_figure(rows, COLUMNS, height=2.2 * rows + 0.3)
    for axis in axes[len(found) :]:
        axis.set_axis_off()
    for place, (axis, one) in enumerate(zip(axes, found, strict=False)):
        _panel(axis, one, _named(one, found))
        if place % COLUMNS == 0:
            axis.set_ylabel("ms")
        if place >= len(found) - COLUMNS:
            axis.set_xlabel("report, oldest first")
    said = "; ".join(f"{_named(one, found)}: {_described(one)}" for one in found)
    return finish(figure, "History", f"Each figure over the reports, oldest first. {said}.")


def _panel(axis: Axes, one: Series, name: str) -> None:
    """Draw one figure: a mark for each report, a line for each level."""
    values = one.points["latency_ms"].to_numpy(dtype=np.float64)
    endpoint = Endpoint(one.endpoint)
    seen = np.isfinite(values)
    places = np.arange(len(values))
    top = float(values[seen].max()) * 1.25 if seen.any() else 1.0
    axis.plot(places[seen], values[seen], ls="", marker=MARKERS[endpoint], ms=4, mew=0, color=colour_of(endpoint))
    if not seen.all():  # a quantile among the failures has no height: it stands at the upper edge
        axis.plot(places[~seen], np.full((~seen).sum(), top), ls="", marker="x", ms=5, color=RED, clip_on=False)
    edges = [0, *(change.index for change in one.history.changes), len(values)]
    if one.history.refusal is None:
        levels = [one.history.changes[0].before if one.history.changes else float(np.exp(np.log(values).mean()))]
        levels += [change.after for change in one.history.changes]
        for (begin, end), level in zip(itertools.pairwise(edges), levels, strict=True):
            axis.plot([begin - 0.5, end - 0.5], [level, level], color=INK, lw=1.4)
    for change in one.history.changes:
        axis.axvline(change.index - 0.5, color=INK, lw=1, ls="--")
        commit = one.points.iloc[change.index]["commit"]
        words = signed_percent(change.change) + (f"\n{short_commit(commit)}" if commit else "")
        late = change.index > 0.7 * len(values)
        axis.annotate(words, (change.index - 0.5, top), xytext=(-4 if late else 4, -2), textcoords="offset points",
                      ha="right" if late else "left", va="top", color=INK, size=8)  # fmt: skip
    axis.axvspan(len(values) - 1.5, len(values) - 0.5, color=PALE, lw=0, zorder=0)  # this report
    axis.set_xlim(-0.5, max(len(values), 2) - 0.5)
    axis.set_ylim(0.0, top)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    name_panel(axis, name)


def _described(one: Series) -> str:
    """Return one series in words."""
    values = one.points["latency_ms"].to_numpy(dtype=np.float64)
    known = values[np.isfinite(values)]
    spread = f"{number(float(known.min()))} to {number(float(known.max()))} ms" if len(known) else "all failed"
    told = one.history.refusal or (_changes(one) if one.history.changes else "no change")
    return f"{plural(len(values), 'reports')}, {spread}, {told}"


def changes(found: Sequence[Series]) -> Styler | Passage:
    """Lay out the change points."""
    frame = change_frame(found)
    if frame.empty:
        return plainly("No change was found.")
    shown = pd.DataFrame(
        {
            "Load": frame["mode"],
            "Endpoint": frame["endpoint"],
            "Quantile": [f"p{q * 100:g}" for q in frame["q"]],
            "From, UTC": [at.strftime(DATE) for at in frame["started_at"]],
            "Commit": ["unknown" if pd.isna(commit) else short_commit(commit) for commit in frame["commit"]],
            "Report": frame["report"],
            "Before, ms": frame["before_ms"].map(cell),
            "After, ms": frame["after_ms"].map(cell),
            "Change": [signed_percent(change) for change in frame["change"]],
        }
    )
    return styled(shown, numeric=("Before, ms", "After, ms", "Change"))
