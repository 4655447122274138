"""What of the analysis rests on instants that an imported tool need not tell."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from harness.analysis import display
from harness.analysis.dataset import Dataset, in_order, moment_ns
from harness.analysis.figures import latency_over_time
from harness.analysis.tables import first_request_ns, slowest_frame
from harness.importers.importer import source_of
from harness.sample import Sample
from harness.sampleset import Clock, Instant, Manifest, Source

SECOND_NS = 10**9


def manifest(**known: Any) -> Manifest:
    """Return the manifest of an import."""
    begun = Instant(0, 0)
    base: dict[str, Any] = {
        "measurement_id": "m", "mode": "import", "parameters": {}, "planned_requests": 4, "attempt": 1, "commit": None,
        "versions": {}, "machine": {}, "quota_revision": None, "clock": Clock(begun, Instant(9 * SECOND_NS, 9)),
        "files": {}, "complete": True, "source": source_of("k6", [], ["One.", "Two."]),
    }  # fmt: skip
    return Manifest(**base | known)


@pytest.fixture
def samples() -> pd.DataFrame:
    """A dropped arrival, a request that says when it was sent, and two that say only when they were done."""
    instants = {
        "intended_at_ns": [2, None, None, None],
        "sent_at_ns": [None, 1, None, None],
        "done_at_ns": [None, 4, 3, 3],
    }
    frame = pd.DataFrame({name: pd.array(values, "Int64") for name, values in instants.items()}) * SECOND_NS
    frame = frame.assign(
        measurement_id="m", mode="import", endpoint="create", run_key=list("dcba"), root_key=list("dcba"),
        latency_ms=pd.array([None] * 4, "Float64"), service_ms=pd.array([None, 3000.0, 5.0, 7.0], "Float64"),
        outcome=["not_sent", "ok", "ok", "ok"], status=pd.array([None, 200, 200, 200], "Int64"),
    )  # fmt: skip
    rest = [name for name in Sample.__dataclass_fields__ if name not in frame]
    frame[rest] = pd.NA
    return frame


@pytest.fixture
def data(samples: pd.DataFrame) -> Dataset:
    return dataset(samples, manifest())


def dataset(samples: pd.DataFrame, *manifests: Manifest) -> Dataset:
    """Return rows with their manifests, and no run and no resource."""
    none = pd.DataFrame({"measurement_id": [], "mode": []})
    return Dataset(manifests, tuple(one.measurement_id for one in manifests), samples, none, none)


def test_a_request_is_placed_where_it_was_due_or_sent_or_else_done(samples: pd.DataFrame) -> None:
    assert (moment_ns(samples) / SECOND_NS).tolist() == [2, 1, 3, 3]


def test_requests_of_one_moment_keep_the_order_in_which_they_were_recorded(samples: pd.DataFrame) -> None:
    assert in_order(samples)["run_key"].tolist() == ["c", "d", "b", "a"]


def test_time_begins_with_the_first_request_whatever_instant_it_has(data: Dataset) -> None:
    assert first_request_ns(data) == {"m": SECOND_NS}


def test_the_slowest_requests_are_placed_by_what_is_known(data: Dataset) -> None:
    assert slowest_frame(data, 3)[["outcome", "at_s"]].to_dict("list") == {
        "outcome": ["not_sent", "ok", "ok"], "at_s": [1.0, 0.0, 2.0],
    }  # fmt: skip


def test_the_figure_over_time_shows_every_request(data: Dataset) -> None:
    assert "create: 3 requests between 5 ms and 3,000 ms, 1 failure" in latency_over_time(data).alt


def test_what_an_import_cannot_tell_is_said_once_with_its_tool(data: Dataset) -> None:
    twice = dataset(data.samples, manifest(), manifest(measurement_id="n"))
    assert twice.notes[-2:] == ("k6: One.", "k6: Two.")
    assert len(twice.notes) == len(data.notes) == 4
    assert "<li>k6: One.</li>" in display.limitations(data).markup
    assert str(display.limitations(data)).splitlines()[-1] == "k6: Two."


def test_our_own_samples_have_nothing_to_say_there(samples: pd.DataFrame) -> None:
    ours = dataset(samples, manifest(source=Source()))
    assert (ours.notes, display.limitations(ours).markup) == ((), "")


@pytest.mark.parametrize(("unknown", "tells"), [([], True), (["outcome"], False)])
def test_failures_are_counted_only_where_the_source_tells_them(
    unknown: list[str], tells: bool, samples: pd.DataFrame
) -> None:
    assert dataset(samples, manifest(source=source_of("any", unknown, []))).tells_failures is tells
