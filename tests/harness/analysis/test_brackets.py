"""What recorded trials come to, read back from the rows of a search on a server that is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.analysis import bursts_shown
from harness.analysis.brackets import Limit, limits_frame, limits_of
from harness.analysis.drawing import Drawing
from harness.analysis.slo import Status
from harness.evaluation import load
from harness.sample import Endpoint
from harness.sampleset import UnreadableFile
from tests.harness.synthetic import write_sample_set
from tests.harness.synthetic_search import write_search


def found(*paths: Path) -> tuple[Limit, ...]:
    return limits_of(load(paths).data)


def test_the_limit_of_a_known_server_is_found_from_both_sides(tmp_path: Path) -> None:
    # 6 ms a request: a burst of 50 ends after 300 ms, and a twentieth of 52 is later than that
    (limit,) = found(write_search(tmp_path))
    assert (limit.highest_pass, limit.lowest_fail, limit.status) == (40, 56, Status.PASS)
    said = (
        "create: bursts of 40 meet p95 < 300 ms; bursts of 56 miss it; what was tried in between (48) proved neither."
    )
    assert limit.words == said


def test_a_search_that_never_met_its_end_is_open_and_says_so(tmp_path: Path) -> None:
    (limit,) = found(write_search(tmp_path, most=32))
    assert (limit.highest_pass, limit.lowest_fail, limit.status) == (32, None, Status.INCONCLUSIVE)
    assert limit.words == (
        "create: bursts of 32 meet p95 < 300 ms; none was shown to miss it (a higher --max-burst, or more --trials,"
        " may)."
    )


def test_a_search_in_which_nothing_passed_claims_nothing(tmp_path: Path) -> None:
    (limit,) = found(write_search(tmp_path, most=8, service_ms=400.0))
    assert (limit.highest_pass, limit.lowest_fail) == (None, 1)
    assert "no burst was shown to meet p95 < 300 ms (more --trials may show one); bursts of 1 miss it" in limit.words


def test_two_searches_are_never_pooled(tmp_path: Path) -> None:
    paths = [write_search(tmp_path, most=most, measurement_id=f"search-{most}") for most in (16, 32)]
    limits = found(*paths)
    assert [(one.measurement_id, one.highest_pass) for one in limits] == [("search-16", 16), ("search-32", 32)]
    frame = limits_frame(limits)
    assert frame.groupby("measurement_id")["level"].max().to_dict() == {"search-16": 16, "search-32": 32}


def test_a_search_whose_manifest_forgot_its_question_is_refused(tmp_path: Path) -> None:
    path = write_search(tmp_path, most=8)
    manifest = json.loads((path / "manifest.json").read_bytes())
    del manifest["parameters"]["requirements"]
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UnreadableFile, match=r"its parameters are no search for burst limits: .*requirements"):
        found(path)


def test_the_picture_has_every_level_in_words(tmp_path: Path) -> None:
    data = load([write_search(tmp_path, failing=0.02, endpoints=(Endpoint.CREATE, Endpoint.SPAWN))]).data
    drawing = bursts_shown.strips(data)
    assert isinstance(drawing, Drawing)
    for limit in limits_of(data):
        told = drawing.alt.split(f"{limit.requirement.endpoint.value}, p95")[1].split(";")[0]
        levels = [f"{row['level']} {row['verdict']} (" for _, row in limit.levels.iterrows()]
        assert [one for one in levels if one not in told] == []


def test_samples_without_a_search_say_so_everywhere(tmp_path: Path) -> None:
    data = load([write_sample_set(tmp_path)]).data
    shown = [bursts_shown.conclusion(data), bursts_shown.strips(data), bursts_shown.levels(data)]
    assert [bursts_shown.NONE in str(one) for one in shown] == [True, True, True]
