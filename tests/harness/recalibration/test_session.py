"""From searches to the service's decision: real notebook and commands; what is searched is a made-up service."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode

from harness import report
from harness.__main__ import main
from harness.errors import HarnessError
from harness.execution import run_notebook
from harness.measurement import Measured, Wanted
from harness.notebooks import Notebook
from harness.recalibration import progress, session
from harness.sample import Endpoint, Mode
from harness.target import Target
from service.__main__ import main as command_of_service
from service.quota.limits import Limit
from service.quota.tables import parse, write
from tests.harness import synthetic
from tests.harness.synthetic_capacity import write_capacity
from tests.harness.synthetic_search import write_search
from tests.quotatables import rate, tables

pytestmark = pytest.mark.timeout(400)  # a report takes ten seconds and more on a busy machine

CARRIED_PER_S = 640.0
IN_FORCE_PER_S = 400.0  # far more than a quarter of that

Recalibrate = Callable[..., tuple[int, dict[str, Any], str]]


class Searches:
    """Searches on a made-up service, in place of a load; each may be told to fail."""

    def __init__(self) -> None:
        self.made: list[Mode] = []
        self.fault: dict[Mode, BaseException] = {}
        self.carried_per_s = CARRIED_PER_S
        self._numbers = itertools.count(1)

    def __call__(self, plan: Wanted, target: AbstractContextManager[Target], root: Path) -> Measured:
        self.made.append(plan.mode)
        with target as service:
            service.check()
        if fault := self.fault.pop(plan.mode, None):
            raise fault
        number = next(self._numbers)
        folder = root / f"{number}"
        if plan.mode is Mode.BURST_LIMITS:
            return Measured(write_search(folder, most=32, measurement_id=f"0190-bursts-{number}"), True)
        carried = {Endpoint.CREATE: self.carried_per_s}
        return Measured(write_capacity(folder, carried, measurement_id=f"0190-capacity-{number}"), True)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> Searches:
    """The searches of this test, made just now."""
    made = Searches()
    own = Target("http://127.0.0.1:1", "none", set, lambda: None, embedded=True)
    monkeypatch.setattr(session, "measure", made)
    monkeypatch.setattr(session, "own_stack", lambda _: contextlib.nullcontext(own))
    monkeypatch.setattr(synthetic, "WALL_NS", time.time_ns() - 60_000_000_000)
    return made


@pytest.fixture
def service(
    database_url: str, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Return a function that runs a command of the service on the test's own servers; returns what it prints as JSON.

    It runs in this process, which has imported the service before; the harness starts one for each of its questions.
    """
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("PLIMSOLL_DATA", str(tmp_path / "data"))
    for name in ("PLIMSOLL_URL", "PLIMSOLL_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: str) -> dict[str, Any]:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert command_of_service([*words, "--json"]) == 0
        told: dict[str, Any] = json.loads(printed.getvalue())
        return told

    return run


@pytest.fixture
def too_much(service: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """A table in force that the service cannot carry."""
    (tmp_path / "table.json").write_bytes(write(tables(run_creation=rate(IN_FORCE_PER_S, 400))))
    revision = service("quotas", "propose", str(tmp_path / "table.json"))["revision"]
    service("quotas", "activate", str(revision), "--force", "--by", "a test", "--reason", "to be found too high")


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the notebook that was executed first is kept: that takes seconds, and `test_quota_report` looks at them."""
    return tmp_path_factory.mktemp("executed") / "quota_table.ipynb"


@pytest.fixture
def recalibrate(
    searches: Searches,
    service: Callable[..., dict[str, Any]],
    executed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Recalibrate:
    """Return a function that runs the command; returns its exit code, what it printed, and its last complaint."""

    def execute_once(notebook: Notebook, parameters: Mapping[str, object], target: Path, root: Path) -> NotebookNode:
        if not executed.exists():
            run_notebook(notebook, parameters, executed, root)
        shutil.copy(executed, target)
        node: NotebookNode = nbformat.read(target, nbformat.NO_CONVERT)  # type: ignore[no-untyped-call]
        return node

    monkeypatch.setattr(report, "run_notebook", execute_once)

    def run(*words: str) -> tuple[int, dict[str, Any], str]:
        capfd.readouterr()
        code = main(["recalibrate", "--endpoint", "create", "--json", *words])
        out, err = capfd.readouterr()
        return code, json.loads(out) if out else {}, (err.strip().splitlines() or [""])[-1]

    return run


def stand(service: Callable[..., dict[str, Any]]) -> tuple[int | None, str | None, int | None]:
    """Return number, phase and revision of the newest recalibration."""
    told = service("quotas", "recalibration")
    return told["recalibration"], told["phase"], told["revision"]


@pytest.fixture
def held(service: Callable[..., dict[str, Any]]) -> Iterator[int]:
    """The number of a recalibration for which somebody else measures."""
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "quotas", "measuring", "--json", "--by", "somebody else"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    yield json.loads(process.stdout.readline())["recalibration"]
    process.communicate(timeout=30)


@pytest.mark.usefixtures("too_much")
def test_searches_become_a_shadow_with_its_evidence_and_a_dry_run_leaves_nothing(
    recalibrate: Recalibrate, searches: Searches, service: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    code, told, _ = recalibrate("--dry-run")
    assert (code, told["phase"], told["run_creation"][:12]) == (0, "shadow", "cut: -20.0% ")
    assert stand(service) == (None, None, None)
    assert not (tmp_path / "data" / "recalibration").exists()
    assert [each["revision"] for each in service("quotas", "history")["revisions"]] == [2, 1]

    code, told, _ = recalibrate()
    number = told["recalibration"]
    assert (code, told["revision"], told["phase"]) == (0, 3, "shadow")
    assert searches.made == [Mode.BURST_LIMITS, Mode.CAPACITY] * 2
    assert stand(service) == (number, "shadow", 3)
    folder = Path(told["report"])
    assert parse((folder / "quotas_in_force.json").read_bytes()).limits == tables(
        run_creation=rate(IN_FORCE_PER_S, 400)
    )
    (proposed, *_) = service("quotas", "history")["revisions"]
    provenance = proposed["provenance"]
    assert provenance["notebook"] == "quota_table.ipynb"
    assert set(provenance["samples"]) == {"0190-bursts-3", "0190-capacity-4"}
    assert (folder / provenance["notebook"]).is_file()
    assert set(provenance["measured"]) == {Limit.RUN_CREATION}
    assert not (tmp_path / "data" / "recalibration" / "under_way.json").exists()

    code, told, complaint = recalibrate()
    assert (code, told) == (2, {})
    assert f"the service whose quotas are to change: recalibration {number} is under way: shadow since " in complaint
    assert len(searches.made) == 4  # it asked before it measured


@pytest.mark.usefixtures("too_much")
def test_a_recalibration_that_was_killed_goes_on_with_what_is_done_and_hands_in_once(
    recalibrate: Recalibrate,
    searches: Searches,
    service: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searches.fault[Mode.CAPACITY] = KeyboardInterrupt()
    assert recalibrate()[0] == 130
    assert stand(service) == (1, "measuring", None)
    searches.fault[Mode.CAPACITY] = HarnessError("the generator could not keep up")
    code, _, complaint = recalibrate()
    assert (code, complaint) == (2, "python -m harness recalibrate: the generator could not keep up")
    assert stand(service) == (1, "abandoned", None)  # nobody has to wait for its lease
    with monkeypatch.context() as killed_after_handing_in:
        killed_after_handing_in.setattr(progress, "forget", killed)
        assert recalibrate()[0] == 130
    code, told, _ = recalibrate()
    assert (code, told["phase"], told["recalibration"], told["revision"]) == (0, "shadow", 2, 3)
    assert stand(service) == (2, "shadow", 3)
    assert searches.made == [Mode.BURST_LIMITS, *[Mode.CAPACITY] * 3]


def killed(_: Path) -> None:
    """End as Ctrl-C does."""
    raise KeyboardInterrupt


def test_a_search_that_shows_no_rate_proposes_nothing_and_lets_the_next_one_begin(
    recalibrate: Recalibrate, searches: Searches, service: Callable[..., dict[str, Any]]
) -> None:
    searches.carried_per_s = 5.0
    code, told, complaint = recalibrate()
    assert (code, told.get("phase")) == (3, "nothing proposed"), complaint
    assert stand(service) == (1, "abandoned", None)
    assert len(service("quotas", "history")["revisions"]) == 1


def test_while_somebody_else_measures_nothing_is_measured(
    recalibrate: Recalibrate, searches: Searches, held: int
) -> None:
    code, _, complaint = recalibrate()
    assert (code, searches.made) == (2, [])
    assert f"recalibration {held} is under way: measuring since " in complaint
    assert complaint.endswith(", begun by somebody else")


def test_the_service_whose_quotas_are_to_change_is_measured_only_when_told_so(
    recalibrate: Recalibrate, searches: Searches, service: Callable[..., dict[str, Any]]
) -> None:
    token = service("token", "create", "--installation", "--role", "OWNER")["token"]
    named = ("--url", "http://127.0.0.1:1", "--token", token, "--dry-run")
    code, _, complaint = recalibrate(*named)
    assert (code, searches.made) == (64, [])
    assert complaint == (
        "python -m harness recalibrate: --url http://127.0.0.1:1 takes a token of the service whose quotas are to"
        " change, so it is that service: name a staging one, or give --same-service to load it all the same"
    )
    searches.fault[Mode.BURST_LIMITS] = HarnessError("it was asked")
    assert recalibrate(*named, "--same-service")[2].endswith("it was asked")
    searches.fault[Mode.BURST_LIMITS] = HarnessError("it was asked")
    assert recalibrate(*named[:3], "a-token-of-another", "--dry-run")[2].endswith("it was asked")


@pytest.mark.parametrize(
    ("decided", "code"),
    [
        ({"phase": "shadow", "run_creation": "cut: -20.0%", "tick": "gap: was not measured"}, 0),
        ({"phase": "unchanged", "run_creation": "steady: it is", "tick": "gap: was not measured"}, 0),
        ({"phase": "unchanged", "run_creation": "gap: was not measured", "tick": "gap: was not measured"}, 3),
        ({"phase": "nothing proposed"}, 3),
        ({"phase": "nothing proposed, the generator could not keep up"}, 2),
        ({"phase": "refused", "doubt about fresh": "it is old"}, 2),
    ],
)
def test_the_exit_code_says_whether_something_was_decided(decided: dict[str, Any], code: int) -> None:
    assert session.Outcome({}, "", decided, None).exit_code == code


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--token", "t"], "--token needs --url: an embedded stack makes its own token"),
        (["--same-service"], "--same-service needs --url: an embedded stack is nobody's service"),
        (["--url", "http://host"], "--url needs --token (or PLIMSOLL_TOKEN)"),
        (["--slo", "/no/such/file"], "/no/such/file"),
        (["--first-rate", "100", "--max-rate", "50"], "--first-rate 100 is above --max-rate 50"),
        (["--canary-percent", "0"], "--canary-percent: '0' is not usable: give a whole number from 1 to 100"),
        (["--shadow-minutes", "-1"], "--shadow-minutes: '-1' is not usable: give minutes from 0 to 525600"),
        (["--machine-worth", "nan"], "--machine-worth: 'nan' is not usable: give a factor from 0.001 to 1000"),
        (["--trials", "3"], "--trials: '3' is not usable: fewer than 10 trials a level prove nothing"),
    ],
)
def test_bad_usage_is_one_line_that_names_the_flag(
    service: object, words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["recalibrate", *words])
    except SystemExit as left:
        code = int(left.code or 0)
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (64, "", 1)
    assert complaint in err


def test_an_address_in_the_environment_is_not_loaded_silently(
    service: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PLIMSOLL_URL", "http://127.0.0.1:1")
    assert main(["recalibrate"]) == 64
    assert capsys.readouterr().err == (
        "python -m harness recalibrate: PLIMSOLL_URL is set, and recalibrate loads nothing that --url does not name:"
        " give --url, or unset it to measure an embedded stack\n"
    )
