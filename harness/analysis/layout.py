"""How words and tables look, whatever they say: a passage, the box of a conclusion, a table.

Everything here is an object that Jupyter shows by itself, loads nothing, and is the same bytes for the same content.
Next: `display` and the pages of each notebook (`bursts_shown`), which fill them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import html
import re
from collections.abc import Sequence

import pandas as pd
from pandas.io.formats.style import Styler
from pandas.io.formats.style_render import CSSDict

from harness.analysis.slo import number


@dataclasses.dataclass(frozen=True, slots=True)
class Passage:
    """A piece of HTML with the words it says, so that it reads in a terminal as well."""

    markup: str
    text: str

    def _repr_html_(self) -> str:
        return self.markup

    def __str__(self) -> str:
        """Return the words alone."""
        return self.text


def answer(word: str, first: str, rest: Sequence[str] = ()) -> Passage:
    """Return the box that leads a page: a verdict in one word, a sentence, and the sentences that support it."""
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in rest)
    markup = (
        f'<div class="conclusion {word.lower().replace(" ", "-")}"><p>'
        f'<strong class="chip {word.lower().replace(" ", "-")}">{word}</strong> '
        f"{html.escape(first)}</p>{f'<ul>{items}</ul>' if items else ''}</div>"
    )
    return Passage(unbroken(markup), "\n".join([f"{word}. {first}", *rest]))


def plainly(sentence: str) -> Passage:
    """Return one plain sentence as a paragraph."""
    return Passage(unbroken(f"<p>{html.escape(sentence)}</p>"), sentence)


def unbroken(text: str) -> str:
    """Return the text with no line break possible between a number and its unit, or a heading's last word and its."""
    return re.sub(r"(?:(?<=\d)|(?<=\w,)) (?=(?:ms|s|%)(?!\w))", "\u00a0", text)


def cell(value: float | None) -> str:
    """Return a number for a table, or a dash for what is not known."""
    return "—" if pd.isna(value) else number(float(value))


def styled(frame: pd.DataFrame, numeric: Sequence[str]) -> Styler:
    """Return a table without row numbers, with numbers to the right; its markup is the same every time."""
    classes = pd.DataFrame("", index=frame.index, columns=frame.columns)
    for column in numeric:
        if column in classes:
            classes[column] = "number"
    if "Verdict" in frame:
        words = frame["Verdict"].str.split("\u00a0", n=1).str[1]
        classes["Verdict"] = "verdict " + words.str.lower().str.replace(" ", "-")
    if "Reason" in frame:
        classes["Reason"] = "wide"
    if "Samples" in frame:
        classes["Samples"] = "name"
    rules: list[CSSDict] = [
        {"selector": "td, th", "props": "text-align: left; vertical-align: top;"},
        {"selector": "td.number", "props": "text-align: right; font-variant-numeric: tabular-nums;"},
    ]
    rules += [
        {"selector": f"th.col{place}", "props": "text-align: right;"}
        for place, column in enumerate(frame.columns)
        if column in numeric
    ]
    # On a narrow screen each row becomes a block of its own, whose cells say what they are.
    rules += [
        {"selector": f"td.col{place}", "props": f'--label: "{column}";'} for place, column in enumerate(frame.columns)
    ]
    frame = frame.map(lambda cell: unbroken(cell) if isinstance(cell, str) else cell)
    frame.columns = pd.Index([unbroken(column) for column in frame.columns])
    classes.columns = frame.columns
    styler = Styler(frame, cell_ids=False, uuid=_fingerprint(frame)).hide(axis="index")
    styler = styler.set_table_attributes('class="table"').format(escape="html").set_td_classes(classes)
    return styler.set_table_styles(rules)


def _fingerprint(frame: pd.DataFrame) -> str:
    """Return a name for a table's style that is the same for the same table and no other on its page."""
    return hashlib.sha256(frame.to_csv(index=False).encode()).hexdigest()[:8]
