"""The report from end to end; the tests that run notebooks are few, for each takes seconds."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness import pages
from harness.analysis.layout import unbroken
from harness.errors import HarnessError
from harness.report import write_report
from harness.request import check_request
from tests.harness.synthetic import Plan, hashes, write_sample_set

ROOT = Path(__file__).parents[2]


def main(samples: list[Path], **options: Any) -> int:
    """Make a report as the command does; return the exit code, the rest is printed."""
    try:
        written = write_report(check_request(samples, **options))
    except HarnessError as fault:
        sys.stderr.write(f"{fault}\n")
        return fault.exit_code
    sys.stdout.write("\n".join((*written.lines, "")))
    return written.exit_code


class _Page(HTMLParser):
    """What a browser would load for a page, and what it would say to one who cannot see it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.scripts = 0
        self.alts: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.loads += [values[name] for name in ("src", "srcset", "data", "poster") if name in values]
        self.scripts += tag == "script"
        if tag == "img":
            self.alts.append(values.get("alt", ""))
        if tag == "a":
            self.links.append(values.get("href", ""))
        if tag == "link":
            self.loads.append(values.get("href", ""))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a report of 64 smoke runs, made with both notebooks."""
    folder = tmp_path_factory.mktemp("made")
    code = main([write_sample_set(folder / "samples")], out=folder / "report", parameters={"slowest": "3"})
    assert code == 0
    return folder / "report"


def test_a_report_has_all_of_its_files(made: Path) -> None:
    names = sorted(str(path.relative_to(made)) for path in made.rglob("*") if path.is_file())
    tables = ["failures", "latencies", "measurements", "runs", "verdicts"]
    assert names == sorted(
        ["index.html", "junit.xml", "run_overview.html", "run_overview.ipynb", "slo_compliance.html",
         "slo_compliance.ipynb", "summary.md", "verdict.json",
         "tables/numbers.json", *(f"tables/{name}.{kind}" for name in tables for kind in ("csv", "parquet"))]
    )  # fmt: skip


@pytest.mark.parametrize("name", ["index.html", "slo_compliance.html", "run_overview.html"])
def test_a_page_loads_nothing_and_says_what_its_pictures_show(made: Path, name: str) -> None:
    text = (made / name).read_text(encoding="utf-8")
    page = _Page(text)
    assert [one for one in page.loads if not one.startswith("data:")] == []
    assert [one for one in page.links if one.startswith(("http", "//"))] == []
    assert re.findall(r"url\(\s*['\"]?(?!data:)", text) == []
    assert (page.scripts, "@import" in text, "http://" in text, "https://" in text) == (0, False, False, False)
    assert page.alts
    assert all(len(alt) > 40 for alt in page.alts)
    assert len(text.encode()) <= 2_000_000


def test_a_page_hides_the_code_that_made_it(made: Path) -> None:
    text = (made / "slo_compliance.html").read_text(encoding="utf-8")
    assert ("load(" in text, "import figures" in text, "partial:" in text) == (False, False, False)


def test_every_link_leads_somewhere(made: Path) -> None:
    for page in made.glob("*.html"):
        links = _Page(page.read_text(encoding="utf-8")).links
        assert [link for link in links if not (made / link).is_file()] == []


def test_numbers_are_the_same_on_the_index_in_the_notebook_and_in_the_summary(made: Path) -> None:
    verdicts = pd.read_parquet(made / "tables" / "verdicts.parquet").set_index("name")
    reason = str(verdicts.loc["create-mean", "reason"])
    document = json.loads((made / "verdict.json").read_text(encoding="utf-8"))
    assert [check["reason"] for check in document["checks"] if check["name"] == "create-mean"] == [reason]
    assert unbroken(reason) in (made / "index.html").read_text(encoding="utf-8")
    assert unbroken(reason) in (made / "slo_compliance.html").read_text(encoding="utf-8")
    mean = re.search(r"Mean ([\d.]+ ms)", reason)
    assert mean is not None
    assert unbroken(f"| mean {mean[1]} (p95") in (made / "summary.md").read_text(encoding="utf-8")


def test_a_parameter_given_reaches_its_notebook(made: Path) -> None:
    text = (made / "run_overview.html").read_text(encoding="utf-8")
    slowest = text.split("The slowest requests")[1].split("</table>")[0]
    assert slowest.count("<tr>") == 1 + 3


def test_junit_tells_what_passed_and_what_was_not_judged(made: Path) -> None:
    suite = ElementTree.parse(made / "junit.xml").getroot()  # noqa: S314 - our own file
    assert {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "8", "failures": "0", "errors": "0", "skipped": "3",
    }  # fmt: skip


def run(samples: list[Path], out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Make a report without notebooks; return the exit code and what was printed."""
    code = main(samples, notebooks=[], out=out)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize(
    ("plan", "expected", "word"),
    [
        # all is well
        (Plan(), 0, "PASS"),
        # creation takes three times its target
        (Plan(create_ms=900.0), 1, "FAIL"),
        # too few polls for a p95
        (Plan(runs=5), 3, "INCONCLUSIVE"),
    ],
)
def test_the_exit_code_and_the_table_say_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plan: Plan, expected: int, word: str
) -> None:
    code, out, _ = run([write_sample_set(tmp_path, plan)], tmp_path / "report", capsys)
    assert (code, out.splitlines()[0]) == (expected, str(tmp_path / "report" / "index.html"))
    assert out.splitlines()[2].startswith(f"{word}: ")
    document = json.loads((tmp_path / "report" / "verdict.json").read_text(encoding="utf-8"))
    assert (document["verdict"], document["exit_code"]) == (word, expected)


def test_an_invalid_measurement_has_a_report_that_says_why_and_no_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_sample_set(tmp_path, Plan(), [lambda rows: rows.samples.__delitem__(-1)])
    code, out, _ = run([path], tmp_path / "report", capsys)
    why = "1 row of 256 planned requests are missing."
    assert (code, why in out) == (2, True)
    document = json.loads((tmp_path / "report" / "verdict.json").read_text(encoding="utf-8"))
    assert (document["verdict"], document["checks"]) == ("INVALID", [])
    for name in ("index.html", "summary.md", "junit.xml"):
        assert why in (tmp_path / "report" / name).read_text(encoding="utf-8")
    assert sorted(path.name for path in (tmp_path / "report" / "tables").iterdir()) == [
        "measurements.csv", "measurements.parquet", "numbers.json",
    ]  # fmt: skip


def _truncate(path: Path) -> None:
    file = path / "samples-00001.parquet"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _alter(path: Path) -> None:
    table = pq.read_table(path / "runs.parquet")
    pq.write_table(table.slice(1), path / "runs.parquet")


def _renumber_schema(path: Path) -> None:
    table = pq.read_table(path / "runs.parquet")
    metadata = {**table.schema.metadata, b"plimsoll.schema_version": b"99"}
    pq.write_table(table.replace_schema_metadata(metadata), path / "runs.parquet")
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    (path / "manifest.json").write_text(json.dumps(manifest | {"files": hashes(path)}), encoding="utf-8")


def _mix(path: Path) -> None:
    table = pq.read_table(path / "runs.parquet")
    metadata = {**table.schema.metadata, b"plimsoll.measurement_id": b"another"}
    pq.write_table(table.replace_schema_metadata(metadata), path / "runs.parquet")
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    (path / "manifest.json").write_text(json.dumps(manifest | {"files": hashes(path)}), encoding="utf-8")


def _drop_column(path: Path) -> None:
    table: pa.Table = pq.read_table(path / "runs.parquet")
    pq.write_table(table.drop_columns(["ticks"]), path / "runs.parquet")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (_truncate, "samples-00001.parquet"),
        (_alter, "runs.parquet"),
        (_renumber_schema, "99"),
        (_mix, "another"),
        (_drop_column, "runs.parquet"),
        (lambda path: (path / "resources.parquet").unlink(), "resources.parquet"),
        (lambda path: (path / "manifest.json").write_text("{", encoding="utf-8"), "manifest.json"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json"),
    ],
)
def test_files_that_cannot_be_trusted_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: Callable[[Path], object], said: str
) -> None:
    path = write_sample_set(tmp_path)
    fault(path)
    code, out, err = run([path], tmp_path / "report", capsys)
    assert (code, out, (tmp_path / "report").exists()) == (2, "", False)
    assert said in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"samples": []}, "--samples needs at least one folder"),
        ({"samples": ["absent"]}, "--samples absent does not exist"),
        # what does not exist is told before what cannot be read
        ({"samples": [".", "absent"]}, "--samples absent does not exist"),
        ({"notebooks": ["slo"]}, "--notebooks: no notebook is called 'slo'"),
        ({"parameters": {"slwoest": "3"}}, "--parameter: no notebook has a parameter 'slwoest'"),
        ({"parameters": {"slowest": "few"}}, "parameter 'slowest': expected int, got str"),
        ({"slo_file": Path("absent.yaml")}, "--slo absent.yaml: this file of SLOs does not exist"),
        ({"out": Path("file/report")}, "--out file/report: cannot be written"),
    ],
)
def test_bad_usage_is_refused_in_one_line_and_nothing_is_written(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    said: str,
) -> None:
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=shutil.ignore_patterns("samples", "reports", "stack"))
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    given: dict[str, Any] = {"samples": [write_sample_set(tmp_path / "sets")], "out": tmp_path / "report"} | arguments
    given["samples"] = [Path(str(path)) for path in given["samples"]]
    monkeypatch.chdir(tmp_path)
    assert main(**given) == 64
    said_out, said_err = capsys.readouterr()
    assert (said_out, (tmp_path / "report").exists(), "Traceback" in said_err) == ("", False, False)
    assert said in said_err.splitlines()[-1]


def test_a_notebook_without_its_parameters_tag_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data" / "slo.yaml", tmp_path / "data" / "slo.yaml")
    file = tmp_path / "notebooks" / "slo_compliance.py"
    file.write_text(file.read_text(encoding="utf-8").replace(' tags=["parameters"]', ""), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert main([write_sample_set(tmp_path)], notebooks=["slo_compliance"], out=tmp_path / "report") == 64
    assert "has no cell tagged `parameters`" in capsys.readouterr().err


def test_a_verdict_file_changed_meanwhile_is_no_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def tamper(folder: Path, *_: object) -> None:
        file = folder.parent / "verdict.json"
        file.write_text(file.read_text(encoding="utf-8").replace('"FAIL"', '"PASS"'), encoding="utf-8")

    monkeypatch.setattr(pages, "write_index", tamper)
    code, _, err = run([write_sample_set(tmp_path, Plan(create_ms=900.0))], tmp_path / "report", capsys)
    assert (code, "was changed after it was written" in err) == (2, True)


def test_a_report_without_a_folder_gets_one_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data" / "slo.yaml", tmp_path / "data" / "slo.yaml")
    monkeypatch.chdir(tmp_path)
    path = write_sample_set(tmp_path / "sets", Plan(measurement_id="3f2a9c1e77d0"))
    assert [main([path], notebooks=[]) for _ in range(2)] == [0, 0]
    made = sorted(folder.name for folder in (tmp_path / "data" / "reports").iterdir())
    assert len(made) == 2
    assert all(re.fullmatch(r"\d{8}T\d{6}Z-3f2a9c1e(-2)?", name) for name in made)
    assert str(tmp_path / "data" / "reports" / made[0] / "index.html") in capsys.readouterr().out


def test_the_verdict_does_not_depend_on_where_the_samples_lie(tmp_path: Path) -> None:
    path = write_sample_set(tmp_path / "here")
    moved = shutil.copytree(path, tmp_path / "there" / "renamed")
    for samples, out in ((path, "one"), (moved, "two")):
        assert main([samples], notebooks=[], out=tmp_path / out) == 0
    assert (tmp_path / "one" / "verdict.json").read_bytes() == (tmp_path / "two" / "verdict.json").read_bytes()
    assert "renamed" in (tmp_path / "two" / "index.html").read_text(encoding="utf-8")
