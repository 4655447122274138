"""From sample sets to a report that a person opens and an exit code that a CI job reads.

The order is the order of refusal: what was asked for (64), whether the measurement can be trusted (2), what it proves
(1, 3 or 0). Everything that can be refused is refused before the first notebook runs. Progress goes to stderr; stdout
gets the path of index.html and the verdicts. Next: `evaluation`, `verdictfile`, `pages`, `notebooks`.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness import pages, verdictfile
from harness.errors import BadUsage, ExitCode, HarnessError
from harness.evaluation import SLO_FILE, Evaluation, find_in_checkout, load
from harness.folders import data_folder, is_chosen
from harness.notebooks import FOLDER, Notebook, check_parameters, find_notebooks, page_of, run_notebook

PAGE_BYTES_MAX = 2_000_000
"""A page larger than this is slow to open and to mail; its figures hold too much."""


class PageTooLarge(HarnessError):
    """A notebook's page is larger than a report may be."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__(f"notebook {name} made a page of {size:,} bytes; at most {PAGE_BYTES_MAX:,} are allowed")
        self.name = name
        self.size = size


def main(
    samples: Sequence[Path],
    notebooks: Sequence[str] | None = None,
    out: Path | None = None,
    partial: bool = False,
    parameters: Mapping[str, str] | None = None,
    slo_file: Path = SLO_FILE,
) -> int:
    """Judge sample sets, write the report, print where it is and what it says; return the exit code.

    `notebooks` are names, all of the checkout's when null; `out` is the folder that gets the files, a new one below
    data/reports when null; `partial` judges sets that were cut short; `parameters` are of notebooks, as YAML texts.
    """
    try:
        return int(_report(samples, notebooks, out, parameters or {}, slo_file, partial=partial))
    except HarnessError as fault:
        sys.stderr.write(f"{fault}\n")
        return int(fault.exit_code)


def _report(
    samples: Sequence[Path],
    names: Sequence[str] | None,
    out: Path | None,
    given: Mapping[str, str],
    slo_file: Path,
    *,
    partial: bool,
) -> ExitCode:
    """Do what `main` says. Raises HarnessError."""
    _refuse_absent(samples)
    chosen = find_notebooks(names, find_in_checkout(Path(FOLDER)))
    ours = {"samples": [str(path.resolve()) for path in samples], "partial": partial}
    ours["slo_file"] = str(find_in_checkout(slo_file).resolve())
    checked = check_parameters(chosen, ours, given)
    _progress(f"reading {', '.join(str(path) for path in samples)}")
    evaluation = load(samples, slo_file, partial=partial)
    folder = _make_folder(out, evaluation)
    document = verdictfile.verdict_document(evaluation)
    verdictfile.write_verdict(folder / "verdict.json", document)
    table_files = pages.write_tables(folder / "tables", evaluation)
    (folder / "summary.md").write_text(pages.summary(evaluation), encoding="utf-8")
    (folder / "junit.xml").write_bytes(pages.junit(evaluation))
    shown = [] if evaluation.findings else _show(chosen, checked, folder, evaluation)
    pages.write_index(folder / "index.html", evaluation, shown, table_files)
    sys.stdout.write("\n".join([str(folder / "index.html"), "", *pages.verdict_lines(evaluation), ""]))
    # What a CI job reads is what counts: if it is gone or was changed meanwhile, nothing passed.
    if verdictfile.read_verdict(folder / "verdict.json") != document:
        raise verdictfile.VerdictFileError(folder / "verdict.json", "was changed while the report was made")
    return evaluation.exit_code


def _refuse_absent(samples: Sequence[Path]) -> None:
    """Raise BadUsage when no path was given or one does not exist."""
    if not samples:
        raise BadUsage("--samples needs at least one folder of a sample set")
    for path in samples:
        if not path.exists():
            raise BadUsage(f"--samples {path}: this path does not exist")


def _make_folder(out: Path | None, evaluation: Evaluation) -> Path:
    """Return the report's folder, made; a new one below data/reports unless one was named. Raises BadUsage."""
    short = re.sub(r"[^0-9A-Za-z]", "", evaluation.measurement_ids[0])[:8]
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    checkout = find_in_checkout(Path(FOLDER)).resolve().parent
    data = data_folder() if is_chosen() else checkout / data_folder()
    folder = (data / "reports" / f"{now}-{short}").resolve() if out is None else out
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


def _show(
    chosen: Sequence[Notebook], checked: Mapping[str, Mapping[str, object]], folder: Path, evaluation: Evaluation
) -> list[pages.Page]:
    """Run each notebook and write its page; return them as the index names them."""
    shown = [pages.Page(f"{one.name}.html", f"{one.name}.ipynb", one.title, one.contents) for one in chosen]
    for notebook, page in zip(chosen, shown, strict=True):
        _progress(f"running notebook {notebook.name}")
        parameters = checked[notebook.name]
        executed = run_notebook(notebook, parameters, folder / page.notebook, notebook.path.resolve().parent.parent)
        said = {name: value for name, value in parameters.items() if name not in {"samples", "slo_file"}}
        line = f"{pages.footer(evaluation)} Parameters: {json.dumps(said)}."
        resources = {"css": pages.style(), "title": page.title, "pages": shown, "here": page.file, "footer": line}
        markup = page_of(executed, resources)
        if len(markup.encode()) > PAGE_BYTES_MAX:
            raise PageTooLarge(notebook.name, len(markup.encode()))
        (folder / page.file).write_text(markup, encoding="utf-8")
    return shown


def _progress(words: str) -> None:
    """Say on stderr what is being done."""
    sys.stderr.write(f"{words}\n")
    sys.stderr.flush()
