"""From sample sets to a report that a person opens and an exit code that a CI job reads.

The order is the order of refusal: what was asked for (64, see `request`), whether the measurement can be trusted (2),
what it proves (1, 3 or 0). Everything that can be refused is refused before the first notebook runs. Progress goes to
stderr. Next: `evaluation`, `verdictfile`, `pages`, `execution`.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import sys
from pathlib import Path

from harness import pages, verdictfile
from harness.analysis.histories import Series, series_of
from harness.analysis.layout import unbroken
from harness.analysis.quotas import FRACTION
from harness.analysis.quotasets import QuotaTable
from harness.errors import BadUsage, ExitCode, HarnessError
from harness.evaluation import Evaluation, load
from harness.execution import page_of, run_notebook
from harness.folders import data_folder_of_checkout
from harness.pastreports import past_reports, read_report
from harness.quotaparameters import NOTEBOOK
from harness.quotatable import REVISION, quota_table, revision_file
from harness.request import Request

VERDICT = "verdict.json"

PAGE_BYTES_MAX = 2_000_000
"""A page larger than this is slow to open and to mail; its figures hold too much."""


class PageTooLarge(HarnessError):
    """A notebook's page is larger than a report may be."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__(f"notebook {name} made a page of {size:,} bytes; at most {PAGE_BYTES_MAX:,} are allowed")
        self.name = name
        self.size = size


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
    """A report that was made."""

    folder: Path
    exit_code: ExitCode
    lines: tuple[str, ...]  # for a terminal: the path of index.html and the verdicts


def write_report(request: Request) -> Written:
    """Judge the sample sets and write the report. Raises HarnessError."""
    if request.out is not None:  # what an earlier report found is no verdict on these samples, and no quota
        for stale in (VERDICT, REVISION):
            (request.out / stale).unlink(missing_ok=True)
    evaluation = load(request.samples, request.slo_file, partial=request.partial, baseline=request.baseline or "")
    folder = _make_folder(request.out, evaluation)
    try:
        _write(request, folder, evaluation)
    except BaseException:  # of a report that was not finished, nobody may read that it passed, or take quotas
        for unfinished in (VERDICT, REVISION):
            (folder / unfinished).unlink(missing_ok=True)
        raise
    lines = (str(folder / "index.html"), "", *pages.verdict_lines(evaluation))
    return Written(folder, evaluation.exit_code, lines)


def _write(request: Request, folder: Path, evaluation: Evaluation) -> None:
    """Write all files of a report. Raises HarnessError, with some of them written."""
    document = verdictfile.verdict_document(evaluation)
    verdictfile.write_verdict(folder / VERDICT, document)
    quotas = None if evaluation.findings else _quotas(request, evaluation)
    table_files = pages.write_tables(folder / "tables", evaluation, quotas)
    (folder / "summary.md").write_text(pages.summary(evaluation), encoding="utf-8")
    (folder / "junit.xml").write_bytes(pages.junit(evaluation))
    shown = [] if evaluation.findings else _show(request, folder, evaluation)
    proposed = None if quotas is None else revision_file(quotas, evaluation, folder / f"{NOTEBOOK}.ipynb")
    if proposed is not None:
        (folder / REVISION).write_bytes(proposed)
    pages.write_index(folder / "index.html", evaluation, shown, table_files, REVISION if proposed else None)
    # What a CI job reads is what counts: if it is gone or was changed meanwhile, nothing passed.
    if verdictfile.read_verdict(folder / VERDICT) != document:
        raise verdictfile.VerdictFileError(folder / VERDICT, "was changed while the report was made")


def _quotas(request: Request, evaluation: Evaluation) -> QuotaTable | None:
    """Return the table of quotas that its notebook shows; null where that is not run. Raises BadUsage."""
    if not any(notebook.name == NOTEBOOK for notebook in request.notebooks):
        return None
    given = request.parameters[NOTEBOOK]
    return quota_table(evaluation, given.get("fraction", FRACTION), given.get("active", ""))


def _make_folder(out: Path | None, evaluation: Evaluation) -> Path:
    """Return the report's folder, made; a new one below data/reports unless one was named. Raises BadUsage."""
    short = re.sub(r"[^0-9A-Za-z]", "", evaluation.measurement_ids[0])[:8]
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    folder = data_folder_of_checkout() / "reports" / f"{now}-{short}" if out is None else out
    number = 1
    while out is None and folder.exists():  # a second report of one measurement within a second
        number += 1
        folder = folder.with_name(f"{now}-{short}-{number}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tables").mkdir(exist_ok=True)
    except OSError as fault:
        raise BadUsage(f"--out {folder}: cannot be written ({fault.strerror})") from None
    return folder


def _show(request: Request, folder: Path, evaluation: Evaluation) -> list[pages.Page]:
    """Run each notebook and write its page; return them as the index names them."""
    chosen = request.notebooks
    made = [pages.Page(f"{one.name}.html", f"{one.name}.ipynb", one.title, one.contents) for one in chosen]
    history = _history(folder)
    shown = [*made, pages.HISTORY] if history else made
    if history:
        pages.write_history(folder / pages.HISTORY.file, history, shown, evaluation)
    for notebook, page in zip(chosen, made, strict=True):
        _progress(f"running notebook {notebook.name}")
        parameters = request.parameters[notebook.name]
        executed = run_notebook(notebook, parameters, folder / page.notebook, notebook.path.resolve().parent.parent)
        said = {name: value for name, value in parameters.items() if name not in {"samples", "slo_file", "baseline"}}
        line = f"{pages.footer(evaluation)} Parameters: {json.dumps(said)}."
        resources = {"css": pages.style(), "title": page.title, "pages": shown, "here": page.file, "footer": line}
        markup = unbroken(page_of(executed, resources))
        if len(markup.encode()) > PAGE_BYTES_MAX:
            raise PageTooLarge(notebook.name, len(markup.encode()))
        (folder / page.file).write_text(markup, encoding="utf-8")
    return shown


def _history(folder: Path) -> tuple[Series, ...]:
    """Return each figure over the reports of this checkout, whose tables are written; empty without an earlier one."""
    current = read_report(folder)
    found = () if current is None else series_of(past_reports(data_folder_of_checkout() / "reports", folder), current)
    return found if any(len(one.points) > 1 for one in found) else ()


def _progress(words: str) -> None:
    """Say on stderr what is being done."""
    sys.stderr.write(f"{words}\n")
    sys.stderr.flush()
