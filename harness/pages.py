"""The pages and files of a report that need no notebook: index.html, summary.md, junit.xml, and the tables.

All say the same as `verdict.json`, each in the words of its reader: a person, a CI job's page, a test runner, a
spreadsheet. Nothing here is computed anew.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import jinja2
import msgspec
import pandas as pd
from pandas.io.formats.style import Styler

from harness.analysis import display, figures, history_shown, layout, tables
from harness.analysis.drawing import Drawing
from harness.analysis.gate import compare, comparison_frame
from harness.analysis.histories import Series
from harness.analysis.quotasets import QuotaTable, quota_frame
from harness.analysis.slo import Status
from harness.evaluation import Evaluation
from harness.traces import numbers_of

TEMPLATES = Path(__file__).parent / "templates"
TITLE = "Plimsoll load report"


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
    """One notebook's page, as the index names it."""

    file: str  # the HTML
    notebook: str  # the executed notebook beside it; empty for a page that none made
    title: str
    about: str


def style() -> str:
    """Return the style that all pages share; it is put into each, for they load nothing."""
    return (TEMPLATES / "report.css").read_text(encoding="utf-8")


def footer(evaluation: Evaluation) -> str:
    """Return the line below each page: what was judged, by which version."""
    try:
        version = importlib.metadata.version("plimsoll")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        version = "from a checkout"
    return f"Plimsoll {version}. Judged: {', '.join(evaluation.measurement_ids)}."


def write_index(
    path: Path,
    evaluation: Evaluation,
    pages: Sequence[Page],
    table_files: Sequence[str],
    revision: str | None = None,
) -> None:
    """Write the page that a person opens first: the verdicts, then where to read on."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    markup = environment.get_template("index.html.j2").render(
        css=style(),
        title=TITLE,
        word=display.heading(evaluation.verdicts, evaluation.findings),
        conclusion=display.conclusion(evaluation.verdicts, evaluation.findings, evaluation.folders).markup,
        verdicts=display.verdicts(evaluation.verdicts).to_html() if evaluation.verdicts else "",
        limits_used=figures.limits_used(evaluation.verdicts).markup if evaluation.verdicts else "",
        measurements=display.measurements(evaluation.data).to_html(),
        limitations=display.limitations(evaluation.data).markup,
        pages=pages,
        tables=table_files,
        revision=revision,
        footer=footer(evaluation),
    )
    path.write_text(markup, encoding="utf-8")


HISTORY = Page(
    "history.html", "", "Have figures changed over reports?", "each figure over earlier reports, where it changed"
)


def write_history(path: Path, found: Sequence[Series], pages: Sequence[Page], evaluation: Evaluation) -> None:
    """Write the page that shows each figure over earlier reports."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    markup = environment.get_template("history.html.j2").render(
        css=style(),
        title=HISTORY.title,
        here=HISTORY.file,
        conclusion=history_shown.conclusion(found).markup,
        lines=_markup(history_shown.lines(found)),
        changes=_markup(history_shown.changes(found)),
        pages=pages,
        footer=footer(evaluation),
    )
    path.write_text(layout.unbroken(markup), encoding="utf-8")


def _markup(shown: Drawing | layout.Passage | Styler) -> str:
    """Return something shown as HTML."""
    return str(shown.to_html()) if isinstance(shown, Styler) else shown.markup


def write_tables(folder: Path, evaluation: Evaluation, quotas: QuotaTable | None = None) -> list[str]:
    """Write every table as CSV and Parquet; return the names of the CSV files. Invalid measurements have no numbers."""
    folder.mkdir(exist_ok=True)
    data = evaluation.data
    frames: dict[str, pd.DataFrame] = {"measurements": tables.measurement_frame(data)}
    if not evaluation.findings:
        frames |= {
            "verdicts": tables.verdict_frame(evaluation.verdicts),
            "latencies": tables.latency_frame(data),
            "runs": tables.run_frame(data),
            "failures": tables.failure_frame(data),
        }
        if evaluation.baseline is not None:
            frames["comparisons"] = comparison_frame(compare(data, evaluation.baseline))
        if quotas is not None:
            frames["quotas"] = quota_frame(quotas.rows, data)
    for name, frame in frames.items():
        frame.to_csv(folder / f"{name}.csv", index=False, lineterminator="\n")
        frame.to_parquet(folder / f"{name}.parquet", index=False)
    numbers = msgspec.json.format(msgspec.json.encode(numbers_of(evaluation, frames)), indent=1)
    (folder / "numbers.json").write_bytes(numbers + b"\n")
    return [f"{name}.csv" for name in frames]


def summary(evaluation: Evaluation) -> str:
    """Return the verdicts as Markdown, for a CI job's page."""
    first, *rest = _sentences(evaluation)
    lines = [f"## {display.heading(evaluation.verdicts, evaluation.findings)}: {TITLE}", "", first, ""]
    lines += [*(f"- {sentence}" for sentence in rest), ""] if rest else []
    if evaluation.verdicts:
        lines += [_markdown_row(display.VERDICT_COLUMNS), "|---" * len(display.VERDICT_COLUMNS) + "|"]
        for one in evaluation.verdicts:
            row = display.verdict_row(one)
            lines.append(_markdown_row(row._replace(verdict=f"{display.MARKS[one.verdict]} {row.verdict}")))
        lines.append("")
    if evaluation.data.notes:
        lines += ["What these samples cannot tell, because another tool recorded them:", ""]
        lines += [*(f"- {note}" for note in evaluation.data.notes), ""]
    lines += [f"Judged: {', '.join(f'`{name}`' for name in evaluation.measurement_ids)}", ""]
    return layout.unbroken("\n".join(lines))


def _markdown_row(cells: Sequence[str]) -> str:
    """Return one row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _sentences(evaluation: Evaluation) -> list[str]:
    """Return the conclusion in plain sentences that name the folders."""
    return display.sentences(evaluation.verdicts, evaluation.findings, evaluation.folders)


def junit(evaluation: Evaluation) -> bytes:
    """Return the verdicts as JUnit XML: FAIL is a failure, INCONCLUSIVE and INVALID are errors, the rest skipped."""
    suite = ElementTree.Element("testsuite", name="plimsoll")
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for finding in evaluation.findings:
        case = ElementTree.SubElement(suite, "testcase", classname="validity", name=finding.fault.value)
        ElementTree.SubElement(case, "error", type="INVALID", message=f"{finding.measurement_id}: {finding.detail}")
        counts["tests"] += 1
        counts["errors"] += 1
    kinds = {
        Status.FAIL: ("failure", "failures"),
        Status.INCONCLUSIVE: ("error", "errors"),
        Status.NOT_APPLICABLE: ("skipped", "skipped"),
    }
    for one in evaluation.verdicts:
        classname = f"slo.{one.mode.value}" if one.mode else "slo"
        case = ElementTree.SubElement(suite, "testcase", classname=classname, name=one.name)
        counts["tests"] += 1
        if one.verdict in kinds:
            tag, counted = kinds[one.verdict]
            said = ElementTree.SubElement(case, tag, message=one.reason)
            if tag != "skipped":
                said.set("type", one.verdict.value)
            counts[counted] += 1
        else:
            ElementTree.SubElement(case, "system-out").text = one.reason
    for name, count in counts.items():
        suite.set(name, str(count))
    ElementTree.indent(suite)
    written: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
    return written + b"\n"


def verdict_lines(evaluation: Evaluation) -> list[str]:
    """Return the verdicts as lines of a terminal, in columns."""
    first, *rest = _sentences(evaluation)
    lines = [f"{display.heading(evaluation.verdicts, evaluation.findings)}: {first}"]
    if evaluation.findings:
        return lines + [f"  {sentence}" for sentence in rest]
    rows = [display.VERDICT_COLUMNS, *(display.verdict_row(one) for one in evaluation.verdicts)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(display.VERDICT_COLUMNS))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    open_ = [one for one in evaluation.verdicts if one.verdict in {Status.FAIL, Status.INCONCLUSIVE}]
    lines += [f"{one.title}: {one.reason}" for one in open_]
    return lines + [f"note: {note}" for note in evaluation.data.notes]
