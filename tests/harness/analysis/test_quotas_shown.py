"""What a reader of the notebook of quotas is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.analysis import quotas_shown
from harness.analysis.drawing import Drawing
from harness.analysis.layout import Passage
from harness.analysis.quotasets import QuotaTable
from harness.evaluation import load
from harness.quotatable import quota_table
from harness.sample import Endpoint
from tests.harness.synthetic import write_sample_set
from tests.harness.synthetic_capacity import write_capacity
from tests.harness.synthetic_search import write_search

TENANTS, BUSY = [5, 20, 100], [0.05, 0.1]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> QuotaTable:
    """Return what one search for the capacity of creates, and one for bursts, come to."""
    root = tmp_path_factory.mktemp("searched")
    return quota_table(load([write_capacity(root, {Endpoint.CREATE: 640.0}), write_search(root)]))


@pytest.fixture(scope="module")
def nothing(tmp_path_factory: pytest.TempPathFactory) -> QuotaTable:
    """Return what samples without a search come to."""
    return quota_table(load([write_sample_set(tmp_path_factory.mktemp("smoke"))]))


def test_the_conclusion_says_what_each_tenant_may_use_and_what_stays(table: QuotaTable) -> None:
    (row,) = table.measured
    first, *rest = str(quotas_shown.conclusion(table)).splitlines()
    assert first == (
        "FOUND. 1 limit of 4 can be set to 25 % of what was shown to be sustained; quota_revision.json proposes it"
        " against revision 1."
    )
    assert rest[0].startswith(f"create: {row.quota_per_s:.3g}/s for each tenant, 25 % of at least ")
    assert rest[0].endswith("against 10.3/s in force.")
    assert rest[1:] == [
        "spawn: no search for its capacity is among these samples: the value in force stays.",
        "snapshot: no search for its capacity is among these samples: the value in force stays.",
        "tick: no search measures the turns of workers: the value in force stays.",
    ]


def test_samples_without_a_search_are_told_so_in_place_of_every_number(nothing: QuotaTable) -> None:
    said = str(quotas_shown.conclusion(nothing))
    assert said.startswith("INCONCLUSIVE. These samples hold no search for capacity")
    for part in (quotas_shown.shares(nothing), quotas_shown.rates(nothing), quotas_shown.levels(nothing)):
        assert isinstance(part, Passage)
        assert "hold no search for capacity" in str(part)


def test_a_limit_that_was_not_measured_shows_no_quota(table: QuotaTable) -> None:
    frame = quotas_shown.quotas(table).data  # type: ignore[union-attr]
    own = frame.set_index("Limit")
    assert own["Verdict"].str.slice(2).tolist() == ["PASS", "INCONCLUSIVE", "INCONCLUSIVE", "INCONCLUSIVE"]
    unknown = own.loc[["spawn", "snapshot", "tick"], ["Stable", "At least", "Quota", "At once", "In flight", "Change"]]
    assert unknown.to_numpy().ravel().tolist() == ["—"] * unknown.size
    assert own["In force"].tolist() == ["10.3", "2.14", "18.5", "41"]


def test_every_figure_says_in_words_what_it_shows(table: QuotaTable) -> None:
    figures = [quotas_shown.shares(table), quotas_shown.rates(table), quotas_shown.oversubscribed(table, TENANTS, BUSY)]
    assert all(isinstance(one, Drawing) for one in figures)
    shares, rates, chances = (str(one) for one in figures)
    assert "tick: not measured, 41/s in force stays" in shares
    assert "create: 6" in shares
    assert "100/s PASS" in rates
    assert "800/s FAIL" in rates
    assert "busy 5 % of the time: < 0.01 % with 5 tenants, 0.26 % with 20 tenants, 56.4 % with 100 tenants" in chances


def test_the_same_samples_give_the_same_bytes(table: QuotaTable) -> None:
    first, second = (quotas_shown.oversubscribed(table, TENANTS, BUSY) for _ in range(2))
    assert isinstance(first, Drawing)
    assert isinstance(second, Drawing)
    assert first.svg == second.svg


def test_the_probabilities_stand_in_the_table_with_a_surge_in_brackets(table: QuotaTable) -> None:
    frame = quotas_shown.chances(table, TENANTS, BUSY).data  # type: ignore[union-attr]
    assert frame.columns.str.replace("\u00a0", " ").tolist() == ["Tenants", "Busy 5 %", "Busy 10 %"]
    plain = [[str(cell).replace("\u00a0", " ") for cell in row] for row in frame.to_numpy().tolist()]
    assert plain[1] == ["20", "0.26 % (1.25 %)", "4.32 % (5.27 %)"]


@pytest.mark.parametrize(("tenants", "busy"), [([], BUSY), (TENANTS, [])])
def test_without_tenants_or_shares_there_is_nothing_to_draw(
    table: QuotaTable, tenants: list[int], busy: list[float]
) -> None:
    for part in (quotas_shown.oversubscribed(table, tenants, busy), quotas_shown.chances(table, tenants, busy)):
        assert str(part) == "Neither tenants nor shares of time were named."


def test_a_measurement_that_cannot_be_trusted_shows_no_number(tmp_path: Path) -> None:
    path = write_capacity(tmp_path, {Endpoint.CREATE: 640.0}, most=100.0, manifest={"complete": False})
    table = quota_table(load([path]))
    assert (
        str(quotas_shown.conclusion(table))
        == "INVALID. Nothing is proposed, because the measurement cannot be trusted."
    )
    for part in (quotas_shown.shares(table), quotas_shown.quotas(table), quotas_shown.rates(table)):
        assert str(part) == "Nothing is proposed, because the measurement cannot be trusted."
