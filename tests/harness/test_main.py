"""The commands as a shell sees them: exit code, one line for bad usage, results on stdout."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

from harness.__main__ import main
from harness.request import Request
from harness.sampleset import newest_sample_set, read_sample_set
from tests.harness.fake_service import ModelService, RunningModel, http
from tests.harness.synthetic import Plan, write_sample_set

pytestmark = pytest.mark.usefixtures("data")

ROOT = Path(__file__).parents[2]

SECONDS = "give seconds from 0 to 86400 (see --help)"


def exit_code(*words: str) -> int:
    """What the shell gets: argparse leaves by SystemExit."""
    try:
        return main(words)
    except SystemExit as left:
        return int(left.code or 0)


RUN = ("run", "--mode", "smoke")
OPEN = ("--arrivals", "constant", "--rate", "50", "--duration", "1")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ((), "python -m harness: the following arguments are required: COMMAND (see --help)"),
        (
            ("run",),
            "python -m harness run: give --mode smoke, burst or soak for a closed loop, or --arrivals with --rate",
        ),
        (("run", "--mode", "open"), "argument --mode: invalid choice: 'open'"),
        (("sail",), "argument COMMAND: invalid choice: 'sail'"),
        ((*RUN, "--runs", "0"), "argument --runs: '0' is not usable: give a whole number from 1 to 100000"),
        ((*RUN, "--runs", "100001"), "argument --runs: '100001' is not usable"),
        ((*RUN, "--runs", "2.5"), "argument --runs: '2.5' is not usable"),
        ((*RUN, "--children", "-1"), "argument --children: '-1' is not usable: give a whole number from 0 to 4"),
        ((*RUN, "--children", "5"), "argument --children: '5' is not usable"),
        ((*RUN, "--burst-size", "0"), "argument --burst-size: '0' is not usable"),
        ((*RUN, "--poll-interval", "-0.1"), f"argument --poll-interval: '-0.1' is not usable: {SECONDS}"),
        ((*RUN, "--poll-interval", "nan"), f"argument --poll-interval: 'nan' is not usable: {SECONDS}"),
        ((*RUN, "--poll-timeout", "inf"), f"argument --poll-timeout: 'inf' is not usable: {SECONDS}"),
        ((*RUN, "--soak-interval", "soon"), f"argument --soak-interval: 'soon' is not usable: {SECONDS}"),
        ((*RUN, "--poll", "1"), "unrecognized arguments: --poll 1"),  # no flag by its beginning
        ((*RUN, "--seed", "1"), "--seed belongs to an open loop and needs --arrivals; --mode smoke has none"),
        ((*RUN, "--rate", "1"), "--rate belongs to an open loop and needs --arrivals; --mode smoke has none"),
        ((*RUN, "--soak-interval", "1"), "--soak-interval belongs to --mode soak; --mode smoke does not wait between"),
        (("run", "--mode", "soak", *OPEN), "--mode soak and --arrivals contradict each other"),
        (("run", *OPEN, "--runs", "5"), "--runs and --arrivals contradict each other: --rate and --duration say how"),
        (("run", *OPEN, "--soak-interval", "5"), "--soak-interval and --arrivals contradict each other"),
        (("run", *OPEN, "--burst-size", "5"), "--burst-size and --arrivals constant contradict each other: only"),
        (("run", *OPEN[:4]), "--arrivals constant needs --duration"),
        (("run", "--arrivals", "poisson", "--duration", "1"), "--arrivals poisson needs --rate"),
        (("run", "--arrivals", "often"), "argument --arrivals: invalid choice: 'often'"),
        (("run", *OPEN, "--rate", "0"), "argument --rate: '0' is not usable: give creates per second above 0, at most"),
        (
            ("run", *OPEN, "--duration", "inf"),
            "argument --duration: 'inf' is not usable: give seconds above 0, at most",
        ),
        (("run", *OPEN, "--rate", "0.1"), "--rate and --duration: 0.1 arrivals per second for 1 s is less than one"),
        (("run", *OPEN, "--rate", "50000", "--duration", "86400"), "--rate times --duration is more than 20,000,000"),
        (("run", *OPEN, "--workers", "3", "--connections", "2"), "--connections 2 is fewer than --workers 3"),
        (("run", *OPEN, "--workers", "0"), "argument --workers: '0' is not usable: give a whole number from 1 to 64"),
        ((*RUN, "--url", "https://host", "--token", "t"), "--url: https is not supported"),
        ((*RUN, "--url", "http://host"), "--url needs --token (or PLIMSOLL_TOKEN)"),
        ((*RUN, "--token", "t"), "--token needs --url (or PLIMSOLL_URL): an embedded stack makes its own token"),
        (("report",), "the following arguments are required: --samples (see --help)"),
        (("report", "--samples", "/no/such/set"), "--samples /no/such/set does not exist: give the folder of a"),
        (("report", "--samples", ".", "--notebooks", " , "), "--notebooks names none: give names by commas"),
    ],
)
def test_bad_usage_is_one_line_that_names_the_flag_and_exits_64(
    words: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*words) == 64
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert error in err


def test_an_unwritable_folder_is_bad_usage_before_any_load(
    running: RunningModel[ModelService], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "samples"
    assert exit_code(*RUN, "--url", running.url, "--token", "t", "--out", str(out)) == 64
    assert capsys.readouterr().err == (
        f"python -m harness run: cannot write samples to {out} (Not a directory): give --out a folder that can be"
        " written\n"
    )
    assert running.model.asked == []


@pytest.mark.parametrize("command", [("run", "--help"), ("report", "--help"), ("--help",)])
def test_help_needs_nothing_and_hides_secrets(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLIMSOLL_TOKEN", "hush")
    assert exit_code(*command) == 0
    assert "hush" not in capsys.readouterr().out


def test_a_run_prints_where_its_samples_are_and_a_short_table(
    running: RunningModel[ModelService], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*RUN, "--runs", "2", "--url", running.url, "--token", "hush") == 0
    path = newest_sample_set(data / "samples")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"samples: {path}"
    assert lines[1].split() == ["endpoint", "requests", "failed", "mean", "ms", "p95", "ms"]
    assert [line.split()[:3] for line in lines[2:5]] == [
        ["create", "2", "0"],
        ["spawn", "2", "0"],
        ["snapshot", "2", "0"],
    ]
    assert lines[5:] == [
        "runs: 2 of 2 completed, 0 failed, 0 timed out, mean completion 250.0 ms",
        "subruns: 2 of 2 completed, 0 failed, 0 timed out, mean completion 250.0 ms",
    ]
    assert read_sample_set(path).manifest.complete


def test_no_file_of_a_sample_set_holds_a_token(running: RunningModel[ModelService], data: Path) -> None:
    assert exit_code(*RUN, "--url", running.url, "--token", "hush-installation") == 0
    for file in newest_sample_set(data / "samples").iterdir():
        content = file.read_bytes()
        assert b"hush" not in content
        assert b"token-of" not in content


def test_json_is_one_object_with_the_same_numbers(
    running: RunningModel[ModelService], data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLIMSOLL_URL", running.url)
    monkeypatch.setenv("PLIMSOLL_TOKEN", "hush")
    assert exit_code(*RUN, "--runs", "1", "--children", "0", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    rows = read_sample_set(newest_sample_set(data / "samples")).samples.to_pylist()
    assert told == {
        "samples": str(newest_sample_set(data / "samples")),
        "complete": True,
        "endpoints": {
            row["endpoint"]: {
                "requests": 1,
                "failed": 0,
                "latency_ms_mean": row["latency_ms"],
                "latency_ms_p95": row["latency_ms"],
            }
            for row in rows
        },
        "runs": {"planned": 1, "completed": 1, "failed": 0, "timed_out": 0, "completion_ms_mean": 250.0},
        "subruns": {"planned": 0, "completed": 0, "failed": 0, "timed_out": 0, "completion_ms_mean": None},
    }


def test_a_poll_faster_than_the_quota_is_noted(
    running: RunningModel[ModelService], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*RUN, "--runs", "1", "--poll-interval", "0.01", "--url", running.url, "--token", "t") == 0
    assert "note: --poll-interval 0.01 is faster than the 18.49/s" in capsys.readouterr().err


def test_a_failed_measurement_leaves_no_set_and_exits_by_whose_fault_it_is(
    running: RunningModel[ModelService], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running.model.overrides["POST /api/workspaces/"] = http(401, {"error": "unknown token"})
    prefix = "python -m harness run: cannot make a workspace: "
    assert exit_code(*RUN, "--url", running.url, "--token", "wrong") == 64
    running.model.overrides["POST /api/workspaces/"] = http(503, {"error": "the database is down"})
    assert exit_code(*RUN, "--url", running.url, "--token", "right") == 2
    assert exit_code(*RUN, "--url", "http://127.0.0.1:1", "--token", "right") == 2
    assert capsys.readouterr().err.splitlines() == [
        f"{prefix}the service answered 401 (unknown token; --token must be an installation token)",
        f"{prefix}the service answered 503 (the database is down)",
        f"{prefix}cannot connect to 127.0.0.1:1: Connection refused",
    ]
    assert list((data / "samples").iterdir()) == []


@pytest.mark.parametrize(
    ("how", "code", "error"),
    [
        (signal.SIGINT, 130, "python -m harness run: interrupted; what was recorded is in {}, and is not complete"),
        (signal.SIGTERM, 130, "python -m harness run: interrupted; what was recorded is in {}, and is not complete"),
        (signal.SIGKILL, -9, None),
    ],
)
def test_a_harness_that_is_ended_leaves_a_readable_set_that_is_not_complete(
    running: RunningModel[ModelService], data: Path, how: signal.Signals, code: int, error: str | None
) -> None:
    polled = threading.Event()
    running.model.polls_to_end = 1_000_000
    running.model.on_poll = lambda run_id: polled.set() if running.model.polls[run_id] > 150 else None
    words = ["--runs", "2", "--poll-interval", "0.01", "--url", running.url, "--token", "t"]
    with subprocess.Popen(  # noqa: S603 - our own command
        [sys.executable, "-m", "harness", *RUN, *words], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        polled.wait()  # more than the time between two writes
        process.send_signal(how)
        told = process.stderr.read().splitlines()
    measured = read_sample_set(newest_sample_set(data / "samples"))
    assert process.returncode == code
    assert not measured.manifest.complete
    assert {"create", "spawn", "snapshot"} <= set(measured.samples["endpoint"].to_pylist())
    assert sorted(measured.runs["run_key"].to_pylist()) == ["1", "1.1", "2", "2.1"]
    if error is not None:
        assert told[-1] == error.format(measured.path)
        assert sorted(running.model.canceled) == ["r1", "r1.c1", "r2", "r2.c1"]


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What the report was asked for; it answers that some SLO failed."""
    asked: list[Request] = []

    def judge(request: Request) -> types.SimpleNamespace:
        asked.append(request)
        return types.SimpleNamespace(lines=("verdict: FAIL",), exit_code=1)

    report = types.ModuleType("harness.report")
    report.write_report = judge  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "harness.report", report)
    return asked


def test_a_gated_run_exits_as_the_report_of_its_own_samples(
    running: RunningModel[ModelService], data: Path, judged: list[Request], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*RUN, "--runs", "1", "--url", running.url, "--token", "t", "--gate", "--json") == 1
    assert [request.samples for request in judged] == [(newest_sample_set(data / "samples"),)]
    out, err = capsys.readouterr()
    assert json.loads(out)["complete"] is True  # the report's words do not get into the object
    assert "verdict: FAIL" in err


def test_a_gate_whose_slos_cannot_be_read_makes_no_load(
    running: RunningModel[ModelService],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "slo.yaml").write_text("kind: SLO\n")
    monkeypatch.chdir(tmp_path)
    assert exit_code(*RUN, "--url", running.url, "--token", "t", "--gate") == 64
    assert capsys.readouterr().err.startswith("python -m harness run: data/slo.yaml, document 1: ")
    assert running.model.asked == []


def test_a_report_is_asked_for_as_given(tmp_path: Path, judged: list[Request]) -> None:
    samples = write_sample_set(tmp_path, Plan(runs=1))
    slos = tmp_path / "mine.yaml"
    slos.write_bytes((ROOT / "data" / "slo.yaml").read_bytes())
    words = ("--samples", str(samples), "--notebooks", "run_overview, slo_compliance", "--out", str(tmp_path / "there"))
    assert exit_code("report", *words, "--partial", "--slo", str(slos), "--parameter", "slowest=5") == 1
    ours = {"samples": [str(samples)], "partial": True, "slo_file": str(slos), "baseline": ""}
    (request,) = judged
    assert [notebook.name for notebook in request.notebooks] == ["run_overview", "slo_compliance"]
    assert dataclasses.replace(request, notebooks=()) == Request(
        samples=(samples,),
        slo_file=slos,
        notebooks=(),
        parameters={"run_overview": ours | {"slowest": 5}, "slo_compliance": ours},
        baseline=None,
        out=tmp_path / "there",
        partial=True,
    )


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ("--parameter", "nope=3"),
            (
                "--parameter: no notebook has a parameter 'nope':"
                " there are active, busy_shares, fraction, margin, slowest, tenants"
            ),
        ),
        (("--parameter", "slowest=few"), "--parameter: notebook run_overview: parameter 'slowest': expected int, got"),
        (("--notebooks", "nope"), "--notebooks: no notebook is called 'nope': there are slo_compliance, burst_limits"),
        (("--slo", "nope.yaml"), "--slo nope.yaml: this file of SLOs does not exist"),
        (("--slo", "pyproject.toml"), "--slo pyproject.toml: is not YAML"),
        (("--out", "pyproject.toml/report"), "--out pyproject.toml/report: cannot be written"),
    ],
)
def test_a_report_that_cannot_be_made_is_refused_in_one_line_before_the_report_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    error: str,
) -> None:
    monkeypatch.setitem(sys.modules, "harness.report", None)  # importing it is an ImportError
    assert exit_code("report", "--samples", str(write_sample_set(tmp_path, Plan(runs=1))), *words) == 64
    err = capsys.readouterr().err
    assert (err.count("\n"), err.startswith(f"python -m harness report: {error}")) == (1, True)


def test_a_folder_of_sample_sets_is_refused_with_the_names_of_the_newest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [write_sample_set(tmp_path, Plan(runs=1, measurement_id=f"set-{number}")) for number in range(5)]
    assert exit_code("report", "--samples", str(tmp_path)) == 2
    assert capsys.readouterr().err == (
        f"python -m harness report: {tmp_path} has no manifest.json: it is no sample set; sample sets in it are"
        f" {sets[4].name}, {sets[3].name}, {sets[2].name} and 2 older\n"
    )


def test_a_fault_of_the_harness_is_one_line_exits_2_and_keeps_its_traceback(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "harness.report", None)
    assert exit_code("report", "--samples", str(write_sample_set(tmp_path, Plan(runs=1)))) == 2
    (log,) = (data / "logs").iterdir()
    assert "Traceback" in log.read_text()
    assert capsys.readouterr().err.splitlines()[-1] == (
        "python -m harness report: this is a fault of the harness, nothing was judged: ModuleNotFoundError:"
        f" import of harness.report halted; None in sys.modules (its traceback is in {log})"
    )


def test_a_traceback_that_cannot_be_kept_is_printed(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "harness.report", None)
    data.write_text("in the way")
    assert exit_code("report", "--samples", str(write_sample_set(tmp_path, Plan(runs=1)))) == 2
    err = capsys.readouterr().err
    assert ("Traceback" in err, "(its traceback is above)" in err.splitlines()[-1]) == (True, True)


def test_a_report_writes_nothing_to_anybodys_home(tmp_path: Path) -> None:
    samples, home = write_sample_set(tmp_path, Plan(runs=3)), tmp_path / "home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "MPL", "JUPYTER", "IPY"))}
    made = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-m", "harness", "report", "--samples", samples, "--notebooks", "run_overview"],
        cwd=ROOT, env={**kept, "HOME": str(home)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (made.returncode, list(home.iterdir())) == (3, []), made.stderr
    assert (tmp_path / "data" / "cache" / "matplotlib").is_dir()
