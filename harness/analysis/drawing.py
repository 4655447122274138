"""How figures look, and what a figure is: a picture that carries its own description.

One style for all: light paper, thin grid, no box, names beside their series. Drawn as SVG with a fixed salt and no
date, so that the same samples give the same bytes.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
from typing import Any

import matplotlib as mpl
import matplotlib.backends.backend_svg
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from harness.analysis.slo import number
from harness.sample import Endpoint

INK, GREY, PALE, RED, ORANGE, SKY = "#222222", "#6B6B6B", "#EDEDED", "#B22222", "#D55E00", "#56B4E9"

COLOURS = {
    Endpoint.CREATE: "#0072B2",
    Endpoint.SPAWN: "#D55E00",
    Endpoint.SNAPSHOT: "#009E73",
    Endpoint.CANCEL: "#CC79A7",
    Endpoint.OTHER: "#56B4E9",
}
MARKERS = {
    Endpoint.CREATE: "o",
    Endpoint.SPAWN: "s",
    Endpoint.SNAPSHOT: "^",
    Endpoint.CANCEL: "D",
    Endpoint.OTHER: "v",
}

STYLE: Any = {  # the stubs want each key of the library spelled as a literal type
    "font.family": "DejaVu Sans",  # ships with the library, so that every machine draws the same
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9A9A9A",
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.fontsize": 8.5,
    "hatch.linewidth": 0.5,
    "svg.hashsalt": "plimsoll",
    "svg.fonttype": "path",
}

WIDTH_IN = 8.6


@dataclasses.dataclass(frozen=True, slots=True)
class Drawing:
    """A figure ready to be shown, in Jupyter as on a page."""

    title: str  # what it is called
    alt: str  # what it shows, in words and numbers
    svg: bytes

    @property
    def markup(self) -> str:
        """Return it as HTML that loads nothing."""
        encoded = base64.b64encode(self.svg).decode()
        return (
            f'<figure class="plot"><img alt="{html.escape(self.alt, quote=True)}" '
            f'src="data:image/svg+xml;base64,{encoded}" style="max-width: 100%; height: auto;"/></figure>'
        )

    def _repr_html_(self) -> str:
        return self.markup

    def __str__(self) -> str:
        """Return the description alone."""
        return self.alt


def new_figure(
    rows: int, columns: int, *, height: float, sharex: bool = False, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """Return an empty figure of the report's width, `height` inches high, and its panels in reading order."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False)
    return figure, list(axes.ravel())


def finish(figure: Figure, title: str, alt: str) -> Drawing:
    """Return the figure as a drawing."""
    out = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white", dpi=150)
    return Drawing(title, alt, out.getvalue())


def name_panel(axis: Axes, text: str, colour: str = INK) -> None:
    """Write what a panel shows above its left edge."""
    axis.set_title(text, color=colour, loc="left", fontsize=10, fontweight="bold", pad=6)


def scale_log(axis: Axis) -> None:
    """Put plain numbers at 1, 2 and 5 of each decade of a logarithmic axis."""
    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def colour_of(endpoint: Endpoint) -> str:
    """Return the colour that an endpoint has in every figure."""
    return COLOURS[endpoint]


def milliseconds(value: float) -> str:
    """Return a duration for a label."""
    return f"{number(value)} ms"
