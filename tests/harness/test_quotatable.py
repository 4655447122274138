"""What is proposed, against what, and when nothing may be."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from harness.analysis.quotas import differences
from harness.analysis.quotasets import counted
from harness.analysis.slo import Status
from harness.errors import BadUsage
from harness.evaluation import load
from harness.quotatable import evidence, quota_table, revision_file
from harness.sample import Endpoint
from service.quota.limits import Limit
from service.quota.recalibration_evidence import Known, doubts_about
from service.quota.recalibration_evidence import whole as whole_or_not
from service.quota.tables import FIRST, Provenance, RateValue, parse, write
from tests.harness.synthetic import write_sample_set
from tests.harness.synthetic_capacity import write_capacity
from tests.harness.synthetic_search import write_search

CREATE = {Endpoint.CREATE: 640.0}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a search for the capacity of creates, and one for their burst limit."""
    root = tmp_path_factory.mktemp("searched")
    return write_capacity(root, CREATE, most=400.0), write_search(root)


def change_manifest(path: Path, **values: Any) -> Path:
    document = json.loads((path / "manifest.json").read_bytes()) | values
    (path / "manifest.json").write_text(json.dumps(document), encoding="utf-8")
    return path


def test_the_file_is_one_that_the_service_reads_and_changes_the_measured_rate_alone(
    searched: tuple[Path, Path], tmp_path: Path
) -> None:
    evaluation = load(searched)
    table = quota_table(evaluation)
    (row,) = table.measured
    notebook = tmp_path / "quota_table.ipynb"
    notebook.write_bytes(b"executed")
    written = revision_file(table, evaluation, notebook)
    assert written is not None
    file = parse(written)
    value = RateValue(row.quota_per_s or 0.0, 10)  # a quarter of a burst of 40
    assert differences(file.limits, FIRST) == {"run_creation": (RateValue(10.29, 11), value)}
    assert file.limits.calibration == FIRST.calibration
    capacity, bursts = searched
    assert file.provenance.samples == {
        "0190-bursts-1": hashlib.sha256((bursts / "manifest.json").read_bytes()).hexdigest(),
        "0190-capacity-1": hashlib.sha256((capacity / "manifest.json").read_bytes()).hexdigest(),
    }
    assert (file.provenance.notebook, file.provenance.commit) == ("quota_table.ipynb", "c0ffee")
    assert file.provenance.notebook_sha256 == hashlib.sha256(b"executed").hexdigest()
    assert file.provenance.machine == {"cpu": "made up", "cpu_count": 2}
    ends = [json.loads((path / "manifest.json").read_bytes())["clock"]["end"]["wall_ns"] for path in searched]
    assert file.provenance.measured_at is not None
    assert file.provenance.measured_at.timestamp() == pytest.approx(max(ends) / 1e9, abs=0.002)
    assert revision_file(table, evaluation, notebook) == written


def test_the_evidence_under_each_rate_is_one_that_a_recalibration_believes(tmp_path: Path) -> None:
    path = write_capacity(tmp_path, CREATE)
    evaluation = load([path])
    written = revision_file(quota_table(evaluation), evaluation)
    assert written is not None
    file = parse(written)
    (search,) = counted(evaluation.data).values()
    measured = file.provenance.measured[Limit.RUN_CREATION]
    samples = evaluation.data.samples
    assert (measured.per_s, measured.upper_per_s) == (search.highest_pass_per_s, search.lowest_fail_per_s)
    assert measured.requests_recorded == int((samples["level"] == measured.per_s).sum())
    assert measured.seconds == pytest.approx(0.7 * len(search.best))
    assert measured.late_share == 0.0
    assert measured.measured_at == file.provenance.measured_at
    now = measured.measured_at + datetime.timedelta(hours=1)
    assert doubts_about(file, Known(Provenance(), now)) == ()


def test_rows_that_a_set_lacks_are_counted_against_its_rates_and_a_recalibration_doubts_them(tmp_path: Path) -> None:
    evaluation = load([write_capacity(tmp_path, CREATE)])
    table = quota_table(evaluation)
    whole = evidence(table, evaluation)[Limit.RUN_CREATION]
    assert whole.requests_planned == whole.requests_recorded
    (manifest,) = evaluation.data.manifests
    larger = dataclasses.replace(manifest, planned_requests=manifest.planned_requests + 3)
    lacking = dataclasses.replace(evaluation, data=dataclasses.replace(evaluation.data, manifests=(larger,)))
    found = evidence(table, lacking)[Limit.RUN_CREATION]
    assert found == msgspec.structs.replace(whole, requests_planned=whole.requests_planned + 3)
    known = Known(Provenance(), found.measured_at)
    recorded = found.requests_recorded
    assert whole_or_not(Limit.RUN_CREATION, whole, known) is None
    doubt = whole_or_not(Limit.RUN_CREATION, found, known)
    assert doubt == f"has rows of {recorded:,} of {recorded + 3:,} planned requests"


def test_without_a_rate_that_is_not_sustained_there_is_no_evidence_to_act_on_alone(
    searched: tuple[Path, Path],
) -> None:
    evaluation = load(searched)
    written = revision_file(quota_table(evaluation), evaluation)
    assert written is not None
    assert parse(written).provenance.measured == {}


def test_the_table_in_force_may_be_a_file_and_what_was_not_measured_stays_as_it_says(
    searched: tuple[Path, Path], tmp_path: Path
) -> None:
    default = msgspec.structs.replace(FIRST.default, snapshot_poll=RateValue(77.0, 80), run_creation=None)
    active = msgspec.structs.replace(FIRST, default=default)
    (tmp_path / "active.json").write_bytes(write(active))
    evaluation = load(searched)
    table = quota_table(evaluation, active=str(tmp_path / "active.json"))
    written = revision_file(table, evaluation)
    assert written is not None
    limits = parse(written).limits
    assert limits.default.snapshot_poll == RateValue(77.0, 80)
    assert limits.default.run_creation is not None
    assert (table.rows[0].change, table.active_named) == (None, "active.json")


def test_without_any_burst_a_lifted_limit_stays_lifted(searched: tuple[Path, Path], tmp_path: Path) -> None:
    default = msgspec.structs.replace(FIRST.default, run_creation=None)
    (tmp_path / "active.json").write_bytes(write(msgspec.structs.replace(FIRST, default=default)))
    table = quota_table(load(searched[:1]), active=str(tmp_path / "active.json"))
    assert table.measured == ()
    assert "no limit was measured well enough" in (table.refusal or "")
    assert "the limit stays lifted" in table.rows[0].reason


def test_a_burst_that_was_not_searched_for_stays_what_it_is(searched: tuple[Path, Path]) -> None:
    (row,) = quota_table(load(searched[:1])).measured
    assert row.burst == 11
    assert "No burst was shown to meet the SLO: what may come at once stays." in row.reason


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        # A revision that this checkout does not know: limits that were not measured would be guessed.
        ({"quota_revision": 7}, r"the table in force \(revision 7\) is not known here"),
        ({"quota_revision": None}, r"the table in force \(revision unknown\) is not known here"),
        # A search that was killed may have been about to find a failure further down.
        ({"complete": False}, "a measurement was cut short"),
        ({"commit": "another"}, "measured on different commits"),
    ],
)
def test_nothing_is_proposed(tmp_path: Path, manifest: dict[str, Any], words: str) -> None:
    capacity = change_manifest(write_capacity(tmp_path, CREATE, most=100.0), **manifest)
    bursts = write_search(tmp_path, most=8)
    if "quota_revision" in manifest:
        change_manifest(bursts, **manifest)
    evaluation = load([capacity, bursts], partial=True)
    assert evaluation.findings == ()
    table = quota_table(evaluation)
    assert re.search(words, table.refusal or "")
    assert revision_file(table, evaluation) is None


def test_an_unknown_table_in_force_gives_no_number_at_all(tmp_path: Path) -> None:
    path = write_capacity(tmp_path, CREATE, most=100.0, manifest={"quota_revision": 7})
    assert quota_table(load([path])).rows == ()


def test_a_measurement_that_cannot_be_trusted_proposes_nothing(tmp_path: Path) -> None:
    path = change_manifest(write_capacity(tmp_path, CREATE, most=100.0), complete=False)
    evaluation = load([path])
    table = quota_table(evaluation)
    assert (table.rows, table.refusal) == ((), "Nothing is proposed, because the measurement cannot be trusted.")
    assert revision_file(table, evaluation) is None


def test_samples_without_a_search_for_capacity_propose_nothing(tmp_path: Path) -> None:
    evaluation = load([write_sample_set(tmp_path)])
    table = quota_table(evaluation)
    assert (table.refusal or "").startswith("These samples hold no search for capacity")
    assert revision_file(table, evaluation) is None
    assert {row.status for row in table.rows} <= {Status.INCONCLUSIVE}


def test_a_search_in_which_nothing_passed_proposes_nothing(tmp_path: Path) -> None:
    evaluation = load([write_capacity(tmp_path, {Endpoint.CREATE: 5.0}, most=100.0)])
    table = quota_table(evaluation)
    assert "no limit was measured well enough" in (table.refusal or "")
    assert revision_file(table, evaluation) is None
    assert [row.quota_per_s for row in table.rows if row.limit is Limit.RUN_CREATION] == [10.29]


def test_a_fraction_that_is_none_is_refused(searched: tuple[Path, Path]) -> None:
    with pytest.raises(BadUsage, match="fraction lies above 0 and at most at 1, not 25"):
        quota_table(load(searched), fraction=25.0)
