from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from harness.errors import ExitCode
from harness.evaluation import load
from harness.verdictfile import (
    SCHEMA,
    VerdictFileError,
    read_verdict,
    verdict_document,
    verdict_schema,
    write_verdict,
)
from tests.harness.synthetic import Plan, write_sample_set

ROOT = Path(__file__).parents[2]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_verdict(tmp_path / "verdict.json", verdict_document(load([write_sample_set(tmp_path, Plan(runs=5))])))
    return tmp_path / "verdict.json"


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = (
        write_sample_set(tmp_path / folder, Plan(runs=20, measurement_id=name))
        for folder, name in (("a", "one"), ("b", "two"))
    )
    write_verdict(tmp_path / "first.json", verdict_document(load([one, two])))
    write_verdict(tmp_path / "second.json", verdict_document(load([two, one])))
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "second.json").read_bytes()


MAKE = """
import sys
from pathlib import Path
from harness.evaluation import load
from harness.verdictfile import verdict_document, write_verdict

samples, baseline, out = map(Path, sys.argv[1:])
write_verdict(out, verdict_document(load([samples], baseline=baseline)))
"""


def test_two_processes_with_other_hash_seeds_write_the_same_bytes(tmp_path: Path) -> None:
    samples = write_sample_set(tmp_path / "samples", Plan(runs=40, measurement_id="candidate"))
    for number in range(5):
        write_sample_set(tmp_path / "baseline", Plan(runs=40, measurement_id=f"base{number}", seed=number + 2))
    written = []
    for seed in ("1", "4242"):
        out = tmp_path / f"{seed}.json"
        words = [sys.executable, "-c", MAKE, str(samples), str(tmp_path / "baseline"), str(out)]
        subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}, check=True)  # noqa: S603 - our own
        written.append(out.read_bytes())
    assert written[0] == written[1]
    assert len(json.loads(written[0])["baseline"]) == 5


def test_neither_paths_nor_times_are_in_the_file(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    assert str(written.parent) not in text
    assert "20260101T" not in text


def test_the_file_meets_its_published_schema(written: Path) -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(written.read_text(encoding="utf-8")), schema, jsonschema.Draft202012Validator)


def test_the_published_schema_is_that_of_the_types() -> None:
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == verdict_schema()


def test_every_check_says_its_interval_sample_and_reason(written: Path) -> None:
    checks = json.loads(written.read_text(encoding="utf-8"))["checks"]
    assert {check["name"]: check["verdict"] for check in checks} == {
        "create-mean": "PASS", "spawn-mean": "PASS", "snapshot-p95": "INCONCLUSIVE", "tick-throughput": "PASS",
        "no-failed-responses": "PASS", "burst-errors": "NOT_APPLICABLE", "burst-completion": "NOT_APPLICABLE",
        "soak-drift": "NOT_APPLICABLE",
    }  # fmt: skip
    judged = [check for check in checks if check["verdict"] != "NOT_APPLICABLE"]
    assert all(check["interval"] and check["sample_size"] and check["reason"] for check in judged)


def test_an_absent_file_is_no_pass(tmp_path: Path) -> None:
    with pytest.raises(VerdictFileError, match="there is no verdict file, so nothing passed") as refusal:
        read_verdict(tmp_path / "verdict.json")
    assert refusal.value.exit_code is ExitCode.INVALID


@pytest.mark.parametrize(
    ("values", "said"),
    [
        # a verdict made better by hand
        ({"verdict": "PASS", "exit_code": 0}, "its digest is not that of its content"),
        ({"verdict": "GOOD"}, "is no verdict file: Invalid enum value 'GOOD'"),
        ({"note": "all fine"}, "is no verdict file: Object contains unknown field `note`"),
        ({"checks": "none"}, "is no verdict file: Expected `array`, got `str`"),
        ({"digest": "0" * 64}, "its digest is not that of its content"),
    ],
)
def test_an_edited_file_is_refused(written: Path, values: dict[str, Any], said: str) -> None:
    edit(written, **values)
    with pytest.raises(VerdictFileError, match=said):
        read_verdict(written)


def test_a_truncated_file_is_refused(written: Path) -> None:
    written.write_bytes(written.read_bytes()[:-40])
    with pytest.raises(VerdictFileError, match="is no verdict file"):
        read_verdict(written)
