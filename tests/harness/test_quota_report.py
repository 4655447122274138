"""The report on searches for capacity: what it proposes, and when it leaves nothing to propose."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pandas as pd
import pytest

from harness.errors import BadUsage
from harness.report import write_report
from harness.request import check_request
from harness.sample import Endpoint
from service.quota.tables import FIRST, parse, write
from tests.harness.synthetic_capacity import write_capacity
from tests.harness.synthetic_search import write_search

CREATE = {Endpoint.CREATE: 640.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a report with the notebook of quotas alone."""
    root = tmp_path_factory.mktemp("quotas")
    samples = [write_capacity(root / "samples", CREATE, most=400.0), write_search(root / "samples", most=32)]
    (root / "active.json").write_bytes(write(FIRST))
    parameters = {"fraction": "0.2", "active": str(root / "active.json"), "tenants": "[10, 30]"}
    request = check_request(samples, ["quota_table"], root / "report", parameters=parameters)
    assert write_report(request).exit_code == 3  # no SLO of the file is about a search
    return root / "report"


def test_the_revision_is_what_the_page_and_the_table_say(made: Path) -> None:
    file = parse((made / "quota_revision.json").read_bytes())
    table = pd.read_csv(made / "tables" / "quotas.csv").set_index("limit")
    create = file.limits.default.run_creation
    assert create is not None
    assert create.per_s == table.loc["run_creation", "quota_per_s"]
    assert create.burst == table.loc["run_creation", "burst"] == 6  # a fifth of a burst of 32
    lower = float(str(table.loc["run_creation", "throughput_per_s_lower"]))
    assert 0.0 <= 0.2 * lower - create.per_s < 0.001
    text = re.sub("<[^>]+>", "", (made / "quota_table.html").read_text(encoding="utf-8")).replace("\u00a0", " ")
    assert f"create: {create.per_s:.3g}/s for each tenant, 20 % of at least {lower:.3g}/s" in text
    assert "against active.json" in text


def test_the_revision_names_the_executed_notebook_by_its_bytes(made: Path) -> None:
    provenance = parse((made / "quota_revision.json").read_bytes()).provenance
    assert provenance.notebook == "quota_table.ipynb"
    assert provenance.notebook_sha256 == hashlib.sha256((made / "quota_table.ipynb").read_bytes()).hexdigest()


def test_the_index_links_it_and_its_numbers_are_traced(made: Path) -> None:
    assert '<a href="quota_revision.json">' in (made / "index.html").read_text(encoding="utf-8")
    numbers = json.loads((made / "tables" / "numbers.json").read_bytes())
    (found,) = (one for one in numbers["numbers"] if one["id"] == "quotas/run_creation/quota_per_s")
    assert found["function"] == "harness.analysis.quotas.quota_rows"
    assert {numbers["files"][digest].split("/")[0] for digest in found["files"]} == {"0190-capacity-1"}


def test_a_report_that_proposes_nothing_takes_away_what_an_earlier_one_proposed(tmp_path: Path) -> None:
    samples = write_capacity(tmp_path, {Endpoint.CREATE: 5.0}, most=100.0)
    out = tmp_path / "report"
    out.mkdir()
    (out / "quota_revision.json").write_bytes(write(FIRST))
    write_report(check_request([samples], ["quota_table"], out))
    assert not (out / "quota_revision.json").exists()
    assert "quota_revision.json" not in (out / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("fraction", "0.0", "fraction lies above 0 and at most at 1, not 0.0"),
        ("fraction", "25.0", "fraction lies above 0 and at most at 1, not 25.0"),
        ("tenants", "[10, 0]", "tenants are from 1 to 100,000, not 0"),
        ("busy_shares", "[1.5]", "busy_shares lie from 0 to 1, not 1.5"),
        ("active", "nowhere.json", "active: nowhere.json cannot be read"),
        ("active", "empty.json", r"active: .*empty.json: .*is not valid JSON"),
        ("active", "typo.json", r"active: .*typo.json: .*limits"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_read(
    tmp_path: Path, name: str, value: str, words: str
) -> None:
    (tmp_path / "empty.json").write_bytes(b"")
    (tmp_path / "typo.json").write_bytes(b'{"format": "plimsoll.quota_revision/1"}')
    samples = write_capacity(tmp_path, CREATE, most=100.0)
    if value.endswith(".json"):
        value = str(tmp_path / value) if (tmp_path / value).exists() else value
    with pytest.raises(BadUsage, match=words):
        check_request([samples], ["quota_table"], parameters={name: value})
