"""The whole search as a shell sees it, against a service whose limit is known: it answers so many of each burst."""

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import trials
from harness.__main__ import main
from harness.analysis import bursts, lateness
from harness.analysis.bursts import Requirement
from harness.analysis.slo import Op, Status
from harness.burst_limits import SearchTally, requirements_of
from harness.errors import BadUsage
from harness.sample import Endpoint
from harness.sampleset import newest_sample_set, read_sample_set
from harness.slofile import SLO_FILE, read_slos
from tests.harness.fake_service import RunningModel
from tests.harness.limited_service import LimitedService

ROOT = Path(__file__).parents[2]


Running = RunningModel[LimitedService]


@pytest.fixture(autouse=True)
def data(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(trials, "REST_POLL_S", 0.001)
    # A smaller search: here all trials of a level are alike, and no latency is near a target.
    monkeypatch.setattr(bursts, "REQUESTS_MIN", 80)
    monkeypatch.setattr(lateness, "LATE_MS", {True: 1e9, False: 1e9})  # however busy the machine is
    return data


@pytest.fixture
def patient(tmp_path: Path) -> Path:
    """SLOs that no answer on this machine misses, however busy: what counts are the failures."""
    file = tmp_path / "patient.yaml"
    documents = [text for text in (ROOT / SLO_FILE).read_text().split("\n---\n") if "measure: latency" in text]
    file.write_text("\n---\n".join(documents).replace("value: 300", "value: 9000").replace("value: 200", "value: 9000")
                    .replace("value: 375", "value: 9000"))  # fmt: skip
    return file


@pytest.fixture
def limited(request: pytest.FixtureRequest) -> Iterator[Running]:
    running = RunningModel(LimitedService(*request.param))
    running.start()
    yield running
    running.stop()


def words(running: Running, *more: str) -> tuple[str, ...]:
    return ("burst-limits", "--url", running.url, "--token", "hush", "--trials", "10", *more)


@pytest.mark.parametrize("limited", [("create", 20)], indirect=True)
def test_json_tells_the_highest_burst_that_passes_and_the_lowest_that_fails(
    limited: Running, data: Path, patient: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words(limited, "--endpoint", "create", "--max-burst", "64", "--slo", str(patient), "--json")
    assert main(given) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["endpoints"]) == ["create"]
    create = told["endpoints"]["create"]
    # 20 of 20 answered; of 21 one is refused, 4.8 %: met, but not to be proven by ten trials; of 24 four, 17 %.
    assert (create["highest_pass"], create["lowest_fail"]) == (20, 24)
    assert [(level["level"], level["verdict"], level["failed"]) for level in create["levels"]] == [
        (8, "PASS", 0),
        (16, "PASS", 0),
        (20, "PASS", 0),
        (24, "FAIL", 40),
        (32, "FAIL", 120),
    ]
    assert create["levels"][0]["queue_depth_max"] == 0.0
    assert told["trials"] == 10
    path = newest_sample_set(data / "samples")
    assert told["samples"] == str(path)
    measured = read_sample_set(path)
    assert measured.manifest.complete
    assert set(measured.samples["mode"].to_pylist()) == {"burst-limits"}
    assert len(measured.samples) == sum(level["requests"] for level in create["levels"])
    assert all(b"hush" not in file.read_bytes() for file in path.iterdir())


@pytest.mark.parametrize("limited", [("snapshot", 1_000)], indirect=True)
def test_without_a_failure_up_to_the_largest_burst_there_is_no_bracket(
    limited: Running, patient: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(limited, "--endpoint", "snapshot", "--max-burst", "16", "--slo", str(patient))) == 3
    out, err = capsys.readouterr()
    assert "snapshot: p95 < 9000 ms, counted from the instant of the burst" in out
    assert out.splitlines()[-1] == (
        "snapshot: bursts of 16 meet it; none was shown to miss it (more --trials or a higher --max-burst may)"
    )
    assert "snapshot 16: 10 of at most 10 trials; before: snapshot 16 PASS after 10 trials, 0 % slow" in err


@pytest.mark.parametrize("limited", [("spawn", 0)], indirect=True)
def test_a_service_that_refuses_everything_fails_from_one_request_on(
    limited: Running, patient: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(limited, "--endpoint", "spawn", "--max-burst", "8", "--slo", str(patient))) == 3
    assert capsys.readouterr().out.splitlines()[-1] == (
        "spawn: no burst was shown to meet it, bursts of 1 do not (more --trials may show one)"
    )


@pytest.mark.parametrize("limited", [("create", 20)], indirect=True)
def test_a_measurement_that_cannot_be_trusted_gives_no_limit(
    limited: Running, patient: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lateness, "LATE_MS", {True: -1.0, False: -1.0})  # every request left too late
    assert main(words(limited, "--endpoint", "create", "--max-burst", "8", "--slo", str(patient), "--json")) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "the measurement is not valid" in err.splitlines()[-1]
    assert "the generator could not keep its schedule" in err.splitlines()[-1]


@pytest.mark.parametrize("limited", [("create", 1_000)], indirect=True)
def test_a_search_that_is_interrupted_cancels_what_is_unfinished_and_keeps_its_rows(
    limited: Running, data: Path, patient: Path
) -> None:
    under_way = threading.Event()
    # Each trial leaves a run that never ends, so the first one waits for it until it is told to stop.
    limited.model.unfinished = ["stray"]
    limited.model.on_burst = under_way.set
    given = words(limited, "--endpoint", "create", "--slo", str(patient))
    with subprocess.Popen(  # noqa: S603 - our own command
        [sys.executable, "-m", "harness", *given], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        under_way.wait()
        process.send_signal(signal.SIGINT)
        told = process.stderr.read().splitlines()
    measured = read_sample_set(newest_sample_set(data / "samples"))
    assert process.returncode == 130
    assert told[-1] == (
        f"python -m harness burst-limits: interrupted; what was recorded is in {measured.path}, and is not complete"
    )
    assert not measured.manifest.complete
    assert limited.model.canceled == ["stray"]


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (("--trials", "9"), "argument --trials: '9' is not usable: fewer than 10 trials a level prove nothing,"),
        (("--trials", "many"), "argument --trials: 'many' is not usable: give a whole number from 1 to 1000"),
        (("--max-burst", "0"), "argument --max-burst: '0' is not usable: give a whole number from 1 to 4096"),
        (("--max-burst", "5000"), "argument --max-burst: '5000' is not usable"),
        (("--endpoint", "cancel"), "argument --endpoint: invalid choice: 'cancel'"),
        (("--slo", "/no/such.yaml"), "/no/such.yaml: this file of SLOs does not exist"),
        (("--token", "t"), "--token needs --url"),
    ],
)
def test_bad_usage_is_one_line_and_exits_64(
    more: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(("burst-limits", *more))
    except SystemExit as left:
        code = int(left.code or 0)
    assert code == 64
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert error in err


def test_the_targets_are_those_of_the_endpoints_own_slos_as_a_p95() -> None:
    found = requirements_of(read_slos(ROOT / SLO_FILE), (Endpoint.CREATE, Endpoint.SPAWN, Endpoint.SNAPSHOT), SLO_FILE)
    assert found == (
        Requirement(Endpoint.CREATE, Op.LT, 300.0, 0.05),
        Requirement(Endpoint.SPAWN, Op.LT, 200.0, 0.05),
        Requirement(Endpoint.SNAPSHOT, Op.LT, 375.0, 0.05),
    )


def test_an_slo_for_burst_limits_is_taken_as_it_is(tmp_path: Path) -> None:
    text = (ROOT / SLO_FILE).read_text().split("\n---\n")[0]
    own = re.sub(r"modes: \[.*?\]", "modes: [burst-limits]", text).replace("statistic: mean", "statistic: p99")
    own = own.replace("create-mean", "create-burst").replace("value: 300", "value: 500")
    (tmp_path / "slo.yaml").write_text(f"{text}\n---\n{own}")
    slos = read_slos(tmp_path / "slo.yaml")
    assert requirements_of(slos, (Endpoint.CREATE,), SLO_FILE) == (Requirement(Endpoint.CREATE, Op.LT, 500.0, 0.01),)


def test_an_endpoint_without_a_latency_slo_is_refused_by_name() -> None:
    with pytest.raises(BadUsage, match=r"data/slo.yaml has no latency SLO for spawn: add one"):
        requirements_of([], (Endpoint.SPAWN,), SLO_FILE)


def test_progress_tells_the_level_at_hand_and_the_one_before() -> None:
    tally = SearchTally()
    assert tally.line() == "warming up: 0 of at most 1 trial"
    tally.begin(Endpoint.CREATE, 8, 80)
    for _ in range(40):
        tally.end_trial()
    tally.end_level(Status.PASS, 0.0, 0.0123)
    tally.begin(Endpoint.CREATE, 16, 40)
    assert (tally.runs, tally.ended, tally.milestone) == (40, 0, 1)
    assert tally.line() == (
        "create 16: 0 of at most 40 trials; before: create 8 PASS after 40 trials, 0 % slow, at most 1.23 %"
    )
