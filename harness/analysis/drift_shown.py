"""What the notebook of soaks shows: whether latency drifts, minute by minute, and what that rests on.

Computes nothing: the numbers are those of `drift`. Samples without a soak are no fault; each part then says so.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from harness.analysis.dataset import Dataset
from harness.analysis.dependence import Floats
from harness.analysis.drawing import (
    INK,
    MARKERS,
    PALE,
    RED,
    Drawing,
    colour_of,
    finish,
    milliseconds,
    name_panel,
    new_figure,
)
from harness.analysis.drift import DriftVerdict, judge_drift, minute_medians
from harness.analysis.layout import Passage, answer, cell, plainly, styled
from harness.analysis.slo import Status, percent, plural, signed_percent
from harness.analysis.validity import ID_SHOWN, Finding
from harness.sample import Endpoint, Mode

NONE = "These samples hold no soak: make one with `python -m harness run --mode soak`."


@dataclasses.dataclass(frozen=True)
class Soak:
    """One endpoint of one soak."""

    measurement_id: str
    endpoint: Endpoint
    medians_ms: Floats  # of each whole minute, shape (n_minutes,)
    found: DriftVerdict


def soaks_of(data: Dataset, margin: float) -> list[Soak]:
    """Return every endpoint of every soak, judged by one margin."""
    found = []
    for manifest in data.manifests:
        if manifest.mode != Mode.SOAK:
            continue
        rows = data.samples[data.samples["measurement_id"] == manifest.measurement_id]
        for endpoint in (Endpoint.CREATE, Endpoint.SPAWN, Endpoint.SNAPSHOT):
            own = rows[rows["endpoint"] == endpoint.value]
            if not own.empty:
                medians = minute_medians(own)
                found.append(Soak(manifest.measurement_id, endpoint, medians, judge_drift(medians, margin)))
    return found


def conclusion(data: Dataset, margin: float, findings: tuple[Finding, ...] = ()) -> Passage:
    """Say whether latency drifts; creation is what the SLO is about, the others stand beside it."""
    if findings:
        return answer("INVALID", "Nothing was judged, because the measurement cannot be trusted.")
    soaks = soaks_of(data, margin)
    if not soaks:
        return answer("NOT APPLICABLE", NONE)
    judged = [one for one in soaks if one.endpoint is Endpoint.CREATE] or soaks
    statuses = {one.found.status for one in judged}
    word = next(status for status in (Status.FAIL, Status.INCONCLUSIVE, Status.PASS) if status in statuses)
    first = {
        Status.PASS: f"Creation does not drift by {percent(margin)} or more.",
        Status.FAIL: "Creation drifts.",
        Status.INCONCLUSIVE: "Whether creation drifts could not be decided.",
    }[word]
    return answer(word.value, first, [f"{_named(one, soaks)}: {_reason(one.found)}" for one in soaks])


def minutes(data: Dataset, margin: float) -> Drawing | Passage:
    """Draw each minute's median, the line laid through the logarithms, and how far the level may move."""
    soaks = [one for one in soaks_of(data, margin) if np.isfinite(one.medians_ms).any()]
    if not soaks:
        return plainly(NONE)
    figure, axes = new_figure(len(soaks), 1, height=1.75 * len(soaks) + 0.6, sharex=True)
    said = []
    for axis, one in zip(axes, soaks, strict=True):
        medians, colour = one.medians_ms, colour_of(one.endpoint)
        at = np.arange(len(medians)) + 0.5
        seen = np.isfinite(medians)
        middle = float(np.exp(np.log(medians[seen]).mean()))
        axis.axhspan(middle * (1.0 - margin / 2.0), middle * (1.0 + margin / 2.0), color=PALE, lw=0, zorder=0)
        axis.plot(at[seen], medians[seen], ls="", marker=MARKERS[one.endpoint], ms=3.2, mew=0, color=colour, alpha=0.8)
        if np.isinf(medians).any():
            lost = np.isinf(medians)
            axis.plot(at[lost], np.full(lost.sum(), 0.96), ls="", marker="x", color=RED, ms=5,
                      transform=axis.get_xaxis_transform())  # fmt: skip
        if one.found.change is not None:
            half = np.log1p(one.found.change) / 2.0
            axis.plot([0.0, len(medians)], middle * np.exp([-half, half]), color=INK, lw=1.4)
            axis.text(1.0, 1.03, _change(one.found), ha="right", color=INK, size=8.5, transform=axis.transAxes)
        name_panel(axis, f"{_named(one, soaks)}, ms", colour)
        axis.set_ylim(*_limits(medians[seen], middle, margin))
        change = "no line" if one.found.change is None else _change(one.found)
        said.append(
            f"{_named(one, soaks)}: {plural(len(medians), 'minutes')} around {milliseconds(middle)}, {change}, "
            f"{one.found.status.value}"
        )
    axes[-1].set_xlabel("minutes since the first request; the grey band is as high as the margin")
    return finish(figure, "Median latency per minute", f"Median latency of each minute of the soak. {'; '.join(said)}.")


def verdicts(data: Dataset, margin: float) -> Styler | Passage:
    """Lay out what each soak proves."""
    soaks = soaks_of(data, margin)
    if not soaks:
        return plainly(NONE)
    marks = {Status.PASS: "✓", Status.FAIL: "✗"}
    shown = pd.DataFrame(
        {
            "Verdict": [f"{marks.get(one.found.status, '?')}\u00a0{one.found.status.value}" for one in soaks],
            "Endpoint": [_named(one, soaks) for one in soaks],
            "Minutes": [cell(one.found.minutes) for one in soaks],
            "Change": [_signed(one.found.change) for one in soaks],
            "95 % bounds": [
                "—" if one.found.lower is None else f"{_signed(one.found.lower)} to {_signed(one.found.upper)}"
                for one in soaks
            ],
            "Robust change": [_signed(one.found.change_robust) for one in soaks],
            "Noise of a minute": ["—" if one.found.noise is None else percent(one.found.noise) for one in soaks],
            "Neighbours' correlation": [cell(one.found.correlation) for one in soaks],
            "Reason": [_reason(one.found) for one in soaks],
        }
    )
    numeric = ("Minutes", "Change", "95 % bounds", "Robust change", "Noise of a minute", "Neighbours' correlation")
    return styled(shown, numeric=numeric)


def _limits(medians: Floats, middle: float, margin: float) -> tuple[float, float]:
    """Return the ends of a panel: all minutes, and the margin at least twice over."""
    low, high = float(medians.min()), float(medians.max())
    return min(low / 1.03, middle * (1.0 - margin)), max(high * 1.06, middle * (1.0 + margin))


def _named(one: Soak, among: list[Soak]) -> str:
    """Return the endpoint, with its measurement where there are several."""
    several = len({other.measurement_id for other in among}) > 1
    return one.endpoint.value + (f" ({one.measurement_id[:ID_SHOWN]})" if several else "")


def _change(found: DriftVerdict) -> str:
    """Return a change with its bounds."""
    return f"{_signed(found.change)} ({_signed(found.lower)} to {_signed(found.upper)})"


def _reason(found: DriftVerdict) -> str:
    """Return the reason, and how many more minutes would settle it."""
    if found.status is not Status.INCONCLUSIVE or found.more_minutes is None:
        return found.reason
    return f"{found.reason} {plural(found.more_minutes, 'more minutes')} would settle it."


def _signed(value: float | None) -> str:
    """Return a change for a reader."""
    return "—" if value is None else signed_percent(round(value, 4))
