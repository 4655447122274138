"""The search for capacity as a shell sees it, against a service that answers only so many requests of each window."""

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import capacity, command_flags, trials, windows
from harness.__main__ import main
from harness.analysis import capacity as rules
from harness.analysis.bursts import Requirement
from harness.analysis.capacity import Check, Finding, RateRequirement, RateVerdict
from harness.analysis.ratesets import StableThroughput, capacities
from harness.analysis.slo import Op, Status
from harness.capacity import CapacityPlan, CapacityTally, read_capacity, requirements_of
from harness.errors import BadUsage
from harness.evaluation import load
from harness.sample import Endpoint
from harness.sampleset import newest_sample_set, read_sample_set
from harness.slofile import SLO_FILE, read_slos
from tests.harness.fake_service import RunningModel, http
from tests.harness.limited_service import LimitedService

ROOT = Path(__file__).parents[2]


Running = RunningModel[LimitedService]


@pytest.fixture(autouse=True)
def data(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # A small search in which nothing depends on how busy this machine is: only refusals count.
    monkeypatch.setattr(trials, "REST_POLL_S", 0.001)
    monkeypatch.setattr(windows, "SETTLE_S", 0.0)
    monkeypatch.setattr(windows, "POLLED_RUNS", 20)
    monkeypatch.setattr(capacity, "LEAD_S", 0.02)
    monkeypatch.setattr(command_flags, "WINDOW_MIN_S", 0.05)
    monkeypatch.setattr(rules, "REQUESTS_MIN", 80)
    monkeypatch.setattr(rules, "LATE_MS", 1e9)
    monkeypatch.setattr(rules, "LOOK_LATE_SHARE", 10.0)
    monkeypatch.setattr(capacity, "RateRequirement", functools.partial(RateRequirement, growth_share=100.0))
    return data


@pytest.fixture
def patient(tmp_path: Path) -> Path:
    """SLOs that no answer on this machine misses, however busy, with a share of errors that few requests settle."""
    file = tmp_path / "patient.yaml"
    documents = [
        text
        for text in (ROOT / SLO_FILE).read_text().split("\n---\n")
        if "measure: latency" in text or "error_share," in text
    ]
    text = "\n---\n".join(documents).replace("value: 0.01", "value: 0.1")
    file.write_text(re.sub(r"value: (300|200|375)\b", "value: 4000", text))
    return file


@pytest.fixture
def limited(request: pytest.FixtureRequest) -> Iterator[Running]:
    running = RunningModel(LimitedService(*request.param))
    running.start()
    yield running
    running.stop()


def words(running: Running, *more: str) -> tuple[str, ...]:
    given = ("--trials", "10", "--window", "0.2", "--first-rate", "100")
    return ("capacity", "--url", running.url, "--token", "hush", *given, *more)


@pytest.mark.parametrize("limited", [("create", 40)], indirect=True)
def test_json_tells_the_highest_rate_that_is_sustained_and_the_lowest_that_is_not(
    limited: Running, data: Path, patient: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--endpoint", "create", "--window", "0.1", "--first-rate", "200", "--max-rate", "500")
    assert main(words(limited, *given, "--slo", str(patient), "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["endpoints"]) == ["create"]
    create = told["endpoints"]["create"]
    # 40 answers in 0.12 s are 333 a second, one in twenty may be slow. 200/s are 24, 500/s are 60.
    assert 200.0 <= create["highest_pass"] < 400.0
    assert create["highest_pass"] < create["lowest_fail"] <= 500.0
    assert create["stable"]["rate_per_s"] == create["highest_pass"]
    assert create["stable"]["served_per_s_lower"] <= create["stable"]["served_per_s"]
    assert create["invalid_from"] is None
    path = newest_sample_set(data / "samples")
    assert told["samples"] == str(path)
    measured = read_sample_set(path)
    assert measured.manifest.complete
    assert set(measured.samples["mode"].to_pylist()) == {"capacity"}
    assert {level["rate_per_s"] for level in create["levels"]} == set(measured.samples["level"].to_pylist())
    assert all(b"hush" not in file.read_bytes() for file in path.iterdir())
    # Read again, the rows give the same answer, by the command's reader and by what quotas are made from.
    again = read_capacity(path, patient)
    assert json.loads(json.dumps(again.endpoints)) == told["endpoints"]
    found = capacities(load([path], patient).data)
    assert [one.stable for one in found] == [
        StableThroughput(Endpoint.CREATE, *(create["stable"][key] for key in ("rate_per_s", "served_per_s",
                         "served_per_s_lower", "trials")))
    ]  # fmt: skip


@pytest.mark.parametrize("limited", [("snapshot", 10_000)], indirect=True)
def test_without_a_failure_up_to_the_highest_rate_there_is_no_bracket(
    limited: Running, patient: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words(limited, "--endpoint", "snapshot", "--max-rate", "100", "--slo", str(patient))
    assert main(given) == 3
    out, err = capsys.readouterr()
    assert "snapshot: p95 < 4000 ms, errors <= 0.1, queues grow <= 100" in out
    assert re.fullmatch(
        r"snapshot: 100/s is sustained \(\d+(\.\d+)?/s answered, at least \d+(\.\d+)?/s\); none was shown not to be"
        r" \(more --trials or a higher --max-rate may\)",
        out.splitlines()[-1],
    )
    assert "snapshot 100/s: 10 of at most 10 trials; before: snapshot 100/s PASS after 10 trials" in err
    assert len(limited.model.polls) == windows.POLLED_RUNS


@pytest.mark.parametrize("limited", [("spawn", 0)], indirect=True)
def test_a_service_that_refuses_everything_sustains_nothing(
    limited: Running, patient: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words(limited, "--endpoint", "spawn", "--max-rate", "100", "--slo", str(patient))
    assert main(given) == 3
    out, _ = capsys.readouterr()
    assert "errors 100 % of 10 %" in out
    assert out.splitlines()[-1] == (
        "spawn: no rate was shown to be sustained, 12.5/s is not (a lower --first-rate may show one)"
    )
    # Parents that were given fewer subruns than they wait for are cancelled.
    assert sorted(set(limited.model.canceled)) == sorted(limited.model.children)


@pytest.mark.parametrize("limited", [("create", 10_000)], indirect=True)
def test_a_rate_that_the_generator_cannot_keep_is_invalid_and_never_the_services_failure(
    limited: Running, patient: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rules, "LATE_MS", -1.0)  # every request left too late
    given = words(limited, "--endpoint", "create", "--max-rate", "100", "--slo", str(patient))
    assert main(given) == 2
    out, _ = capsys.readouterr()
    assert "the generator was late" in out
    assert "FAIL" not in out
    assert "the generator could not keep up" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (("--trials", "9"), "argument --trials: '9' is not usable: fewer than 10 trials a level prove nothing,"),
        (("--window", "0"), "argument --window: '0' is not usable: give seconds from"),
        (("--window", "soon"), "argument --window: 'soon' is not usable: give seconds from"),
        (("--first-rate", "0"), "argument --first-rate: '0' is not usable: give requests per second from 0.1 to 5000"),
        (("--first-rate", "8.55"), "argument --first-rate: '8.55' is not usable: give requests per second"),
        (("--max-rate", "1e9"), "argument --max-rate: '1e9' is not usable"),
        (("--first-rate", "50", "--max-rate", "20"), "--first-rate 50 is above --max-rate 20"),
        (("--first-rate", "1", "--window", "1"), "--window 1 holds fewer than 2 requests at the lowest rate"),
        (("--endpoint", "cancel"), "argument --endpoint: invalid choice: 'cancel'"),
        (("--slo", "/no/such.yaml"), "/no/such.yaml: this file of SLOs does not exist"),
        (("--token", "t"), "--token needs --url"),
        (("--url", "ftp://x"), "ftp://x"),
    ],
)
def test_bad_usage_is_one_line_and_exits_64(
    more: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(("capacity", *more))
    except SystemExit as left:
        code = int(left.code or 0)
    assert code == 64
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert error in err


def test_a_typo_in_the_slos_is_named_before_any_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "slo.yaml"
    file.write_text((ROOT / SLO_FILE).read_text().replace("measure: latency", "measure: latencey", 1))
    assert main(("capacity", "--slo", str(file))) == 64
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"{file}, document 1: Invalid enum value 'latencey'" in err


def test_a_service_that_is_not_there_is_one_line(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("capacity", "--url", "http://127.0.0.1:1", "--token", "t", "--endpoint", "create")) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "cannot make a workspace: cannot connect to 127.0.0.1:1" in err
    assert not list((data / "samples").iterdir())


@pytest.mark.parametrize("limited", [("create", 1)], indirect=True)
def test_a_token_that_may_not_prepare_is_bad_usage(limited: Running, capsys: pytest.CaptureFixture[str]) -> None:
    limited.model.overrides["POST /api/workspaces/"] = http(403, {"error": "role too low"})
    assert main(words(limited)) == 64
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "role too low; --token must be an installation token" in err


def test_what_must_be_met_is_latency_as_a_p95_the_files_error_share_and_no_growth() -> None:
    found = requirements_of(read_slos(ROOT / SLO_FILE), (Endpoint.SPAWN,), SLO_FILE)
    assert found == (RateRequirement(Requirement(Endpoint.SPAWN, Op.LT, 200.0, 0.05), 0.01, 100.0),)
    assert RateRequirement(found[0].latency).words == "p95 < 200 ms, errors <= 0.01, queues grow <= 0.05"


def test_a_rate_that_needs_more_connections_than_there_are_is_refused() -> None:
    slow = RateRequirement(Requirement(Endpoint.CREATE, Op.LT, 9_000.0, 0.05))
    with pytest.raises(BadUsage, match=r"--max-rate 500 with a target of 9,?000 ms needs 9,000 connections"):
        CapacityPlan((slow,), 10, 4.0, 10.0, 500.0, 1)


def test_the_same_plan_has_the_same_arrivals_and_every_trial_its_own() -> None:
    plan = CapacityPlan((RateRequirement(Requirement(Endpoint.CREATE, Op.LT, 300.0, 0.05)),), 10, 4.0, 10.0, 100.0, 7)
    first = plan.arrivals(Endpoint.CREATE, 500, 0)
    assert first.tolist() == plan.arrivals(Endpoint.CREATE, 500, 0).tolist()
    assert first[0] == 0.0
    assert first[-1] < plan.span.whole_s
    assert first.tolist() != plan.arrivals(Endpoint.CREATE, 500, 1).tolist()
    assert first.tolist() != plan.arrivals(Endpoint.SPAWN, 500, 0).tolist()


def test_progress_tells_the_level_at_hand_and_what_the_one_before_came_to() -> None:
    requirement = RateRequirement(Requirement(Endpoint.CREATE, Op.LT, 300.0, 0.05))
    good, bad = Finding(Status.PASS, 0.0, 0.0, 0.01), Finding(Status.FAIL, 0.2, 0.1, 0.3)
    tally = CapacityTally()
    assert tally.line() == "warming up: 0 of at most 1 trial"
    tally.begin(Endpoint.CREATE, 8.5, 20)
    tally.end_trial()
    tally.end_level(RateVerdict(Status.FAIL, False, {Check.ERRORS: good, Check.DEPTH: bad}, 10), requirement)
    tally.begin(Endpoint.CREATE, 17.0, 20)
    assert (tally.runs, tally.ended, tally.milestone) == (20, 0, 1)
    assert tally.line() == (
        "create 17/s: 0 of at most 20 trials; before: create 8.5/s FAIL after 10 trials (depth 20 % of 5 %)"
    )
