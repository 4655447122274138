"""`python -m harness import` as a shell sees it, and what `report` makes of its sample set."""

from __future__ import annotations

import json
import random
from pathlib import Path

import msgspec
import pytest

from harness.__main__ import main
from harness.evaluation import load
from harness.importers.formats import Format
from harness.sampleset import read_manifest
from harness.verdictfile import VerdictDocument
from tests.harness.importers.reading import FILES, SECOND_NS, written

FROM_SEND = "Latencies are from send; coordinated omission not excluded."
ROOT = Path(__file__).parents[3]
ADDRESSES = (
    ("POST", "/api/runs/", 12),
    ("POST", "/api/runs/018f4e2a-{:04x}/spawn_subrun/", 8),
    ("GET", "/api/runs/018f4e2a-{:04x}/snapshot/?since_seq=0", 4),
)


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder of the test's own."""
    monkeypatch.setenv("PLIMSOLL_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def attack(path: Path, code: int = 200) -> Path:
    """Write the results of a steady attack on our three endpoints; the last one has this code."""
    lines: list[str] = []
    spread = random.Random(1)  # noqa: S311 - the same attack every time
    for run in range(150):
        for place, (method, address, ms) in enumerate(ADDRESSES):
            latency_ns = round(ms * 1_000_000 * spread.lognormvariate(0.0, 0.3))
            at_ns = SECOND_NS + (run * 3 + place) * 20_000_000
            url = f"http://plimsoll.test{address.format(run)}"
            lines.append(f"{at_ns},200,{latency_ns},0,100,,,load,{len(lines)},{method},{url},")
    lines[-1] = lines[-1].replace(",200,", f",{code},", 1)
    return written(path, lines)


def test_the_folder_and_a_table_and_what_the_tool_cannot_know_are_printed(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", "--from", "k6-csv", str(FILES / "k6.csv")]) == 0
    (folder,) = (data / "samples").iterdir()
    assert capsys.readouterr().out.splitlines()[:6] == [
        f"samples: {folder}",
        "endpoint        rows    failed  not sent",
        "create             5         4         2",
        "spawn              1         1         0",
        "snapshot           1         0         0",
        f"note: {FROM_SEND}",
    ]


def test_json_has_the_same_as_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--out", str(tmp_path / "here"), "--endpoint", "snapshot", "--unit", "us", "--json"]
    assert main(["import", "--from", "hdr-log", str(FILES / "tagged-non-monotonic.hlog"), *options]) == 0
    (folder,) = (tmp_path / "here").iterdir()
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "samples": str(folder), "tool": "hdrhistogram", "rows": 4490, "endpoints": {"snapshot": {"ok": 4490}},
        "notes": list(read_manifest(folder).source.notes),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--from", "k6-csv", "none.csv"], 64, "python -m harness import: none.csv: does not exist: give the file"),
        (["--from", "k7", "none.csv"], 64, "python -m harness import: argument --from: invalid choice: 'k7'"),
        (["none.csv"], 64, "python -m harness import: the following arguments are required: --from"),
        (["--from", "k6-csv", str(FILES / "vegeta.csv")], 64, f"python -m harness import: {FILES / 'vegeta.csv'}: "),
        (["--from", "k6-csv", str(FILES / "k6.csv"), "--unit", "ms"], 64, "python -m harness import: --unit is for"),
    ],
)  # fmt: skip
def test_bad_usage_is_one_line(arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        found = main(["import", *arguments])
    except SystemExit as left:
        found = left.code if isinstance(left.code, int) else -1
    complaint = capsys.readouterr().err
    assert (found, complaint.count("\n")) == (code, 1)
    assert complaint.startswith(said)


def test_a_damaged_line_makes_the_import_invalid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "cut.csv", f"{SECOND_NS},200,-1,0,0,,,a,0\n")
    assert main(["import", "--from", "vegeta-csv", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"python -m harness import: {path}: line 1, column latency: '-1' is a negative duration\n"
    )


def test_every_format_has_its_row_in_the_docs() -> None:
    page = (ROOT / "docs" / "importing.md").read_text(encoding="utf-8")
    assert [kind for kind in Format if f"\n| `{kind}` |" not in page] == []


def test_the_report_judges_an_import_from_send_and_says_so_everywhere(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", "--from", "vegeta-csv", str(attack(tmp_path / "a.csv"))]) == 0
    (folder,) = (data / "samples").iterdir()
    assert main(["report", "--samples", str(folder), "--out", str(tmp_path / "report")]) == 0
    assert f"note: vegeta: {FROM_SEND}" in capsys.readouterr().out
    for name in ("index.html", "slo_compliance.html", "run_overview.html", "summary.md", "verdict.json"):
        assert FROM_SEND in (tmp_path / "report" / name).read_text(encoding="utf-8"), name
    document = msgspec.json.decode((tmp_path / "report" / "verdict.json").read_bytes(), type=VerdictDocument)
    checks = {one.name: one for one in document.checks if one.mode is not None}
    assert {name: one.verdict.value for name, one in checks.items()} == dict.fromkeys(
        ["create-mean", "spawn-mean", "snapshot-p95", "no-failed-responses"], "PASS"
    )
    assert [name for name, one in checks.items() if not one.reason.endswith(FROM_SEND)] == ["no-failed-responses"]
    assert checks["create-mean"].sample_unit == "groups"
    assert document.measurements[0].tool == "vegeta"


@pytest.mark.parametrize(("code", "verdict"), [(200, 0), (503, 1)])
def test_one_failed_request_of_an_import_is_a_failed_response(
    code: int, verdict: int, data: Path, tmp_path: Path
) -> None:
    assert main(["import", "--from", "vegeta-csv", str(attack(tmp_path / "a.csv", code))]) == 0
    assert load([*(data / "samples").iterdir()], ROOT / "data" / "slo.yaml").exit_code == verdict


def test_the_same_file_imported_twice_is_refused_by_the_report(data: Path, tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        assert main(["import", "--from", "vegeta-csv", str(attack(tmp_path / name))]) == 0
    evaluation = load([*(data / "samples").iterdir()], ROOT / "data" / "slo.yaml")
    assert evaluation.exit_code == 2
    assert [finding.detail for finding in evaluation.findings][:1] == ["The same measurement was given twice."]


def test_imports_of_two_tools_are_not_pooled(data: Path) -> None:
    assert main(["import", "--from", "vegeta-csv", str(FILES / "vegeta.csv")]) == 0
    assert main(["import", "--from", "locust-csv", str(FILES / "locust.csv")]) == 0
    evaluation = load([*(data / "samples").iterdir()], ROOT / "data" / "slo.yaml")
    (finding,) = evaluation.findings
    assert finding.detail.startswith("These are no repetitions of one import measurement, judge them apart: ")
    assert " by vegeta on an unknown commit" in finding.detail
    assert " by locust on an unknown commit" in finding.detail


def test_a_log_of_histograms_proves_latency_and_nothing_about_failures(data: Path) -> None:
    log = str(FILES / "tagged-non-monotonic.hlog")
    assert main(["import", "--from", "hdr-log", log, "--endpoint", "snapshot"]) == 0
    evaluation = load([*(data / "samples").iterdir()], ROOT / "data" / "slo.yaml")
    found = {one.name: (one.verdict.value, one.reason) for one in evaluation.verdicts}
    assert found["snapshot-p95"][0] == "PASS"
    assert found["no-failed-responses"] == (
        "INCONCLUSIVE",
        "The source of these samples does not tell which requests failed, so failures cannot be counted.",
    )
