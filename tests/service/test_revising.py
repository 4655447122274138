"""The commands on quota revisions as they are typed: what they print, what they refuse and with which exit code."""

from __future__ import annotations

import datetime as dt
import io
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.quota.limits import Limit, Quota
from service.quota.tables import FIRST, write
from service.quota.usage import Holder, Kind, LimitUse, Per, Usage, WorkspaceQuotas
from service.runs import RunStatus
from service.workspaces import QuotaClass
from tests.quotatables import tables
from tests.service.conftest import Command


@pytest.fixture
def quotas(command: Command, database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `python -m service` in this process on the test's own servers; returns exit code, output and errors."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("REDIS_URL", redis_url)
    return command


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes a revision's file with values of the class `default` changed."""

    def make(**default: Any) -> str:
        path = tmp_path / "quota_revision.json"
        path.write_bytes(write(tables(**default)))
        return str(path)

    return make


def test_what_show_prints_is_what_propose_reads_and_stores(
    quotas: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, shown, _ = quotas("quotas", "show", "--json")
    assert (code, shown.encode()) == (0, write(FIRST))
    path = tmp_path / "table.json"
    path.write_text(shown)
    code, out, _ = quotas("quotas", "propose", str(path), "--json")
    assert (code, json.loads(out)) == (0, {"revision": 2})
    assert quotas("quotas", "show", "--revision", "2", "--json") == (0, shown, "")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(shown.encode())))
    assert quotas("quotas", "propose", "-") == (0, "revision: 3\n", "")


def test_a_person_sees_the_table_in_force(quotas: Command) -> None:
    code, out, _ = quotas("quotas", "show")
    lines = out.splitlines()
    assert (code, lines[0]) == (0, "revision 1, active")
    assert [line.split() for line in lines[1:4]] == [
        ["limit", "default", "calibration"],
        ["run_creation", "10.29/s,", "burst", "11", "lifted"],
        ["subrun_spawn", "2.14/s,", "burst", "5", "lifted"],
    ]


def test_rollback_restores_the_identical_table(quotas: Command, file: Callable[..., str]) -> None:
    before = quotas("quotas", "show", "--json")
    assert quotas("quotas", "propose", file(live_runs=13))[0] == 0
    assert quotas("quotas", "activate", "2", "--json") == (0, '{"revision": 2, "replaced": 1}\n', "")
    assert quotas("quotas", "show", "--json")[1].encode() == write(tables(live_runs=13))
    assert quotas("quotas", "rollback", "--json") == (0, '{"revision": 1, "replaced": 2}\n', "")
    assert quotas("quotas", "show", "--json") == before
    assert quotas("quotas", "rollback") == (
        64, "", "python -m service: revision 1 is the first: there is nothing to go back to\n",
    )  # fmt: skip


def test_a_refused_activation_is_one_line_with_the_guardrail_and_its_numbers(
    quotas: Command, file: Callable[..., str]
) -> None:
    quotas("quotas", "propose", file(live_runs=20))
    before = quotas("quotas", "show", "--json")
    refusal = "step limit: default.live_runs 12 -> 20 (+66.7%): at most 20% in one revision."
    assert quotas("quotas", "activate", "2") == (
        1, "", f"python -m service: revision 2 is not activated. {refusal}\n",
    )  # fmt: skip
    assert quotas("quotas", "show", "--json") == before
    assert f"    {refusal.removesuffix('.')}\n" in quotas("quotas", "history")[1]


def test_force_needs_a_name_and_a_reason_and_is_told_in_the_history(quotas: Command, file: Callable[..., str]) -> None:
    quotas("quotas", "propose", file(live_runs=20))
    for missing in (["--by", "ada"], ["--reason", "a launch"], []):
        code, _, err = quotas("quotas", "activate", "2", "--force", *missing)
        assert (code, err.count("\n")) == (64, 1)
        assert "--force needs --by and --reason" in err
    code, out, _ = quotas("quotas", "activate", "2", "--force", "--by", "ada", "--reason", "a launch")
    assert (code, out) == (0, "revision: 2\nreplaced: 1\noverruled: step limit\n")
    (newest, _) = json.loads(quotas("quotas", "history", "--json")[1])["revisions"]
    (_, activated) = newest["changes"]
    assert (activated["change"], activated["by"], activated["reason"]) == ("activate", "ada", "a launch")
    assert [(each["guardrail"], each["forced"]) for each in activated["findings"]] == [("step limit", True)]


def test_what_is_implausible_cannot_be_forced(quotas: Command, file: Callable[..., str]) -> None:
    quotas("quotas", "propose", file(live_runs=0))
    code, _, err = quotas("quotas", "activate", "2", "--force", "--by", "ada", "--reason", "x")
    assert (code, err.count("\n")) == (1, 1)
    assert "revision 2 is not activated. implausible values: default.live_runs 0 (plausible: 1 to 100000)" in err


def test_a_shadow_is_told_and_can_be_rejected(quotas: Command, file: Callable[..., str]) -> None:
    quotas("quotas", "propose", file(live_runs=13))
    assert quotas("quotas", "activate", "2", "--shadow", "--json") == (0, '{"revision": 2, "state": "shadow"}\n', "")
    assert quotas("quotas", "reject", "2", "--reason", "no") == (0, "revision: 2\nstate: rejected\n", "")
    assert quotas("quotas", "activate", "2")[0] == 64


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["propose", "nowhere.json"], "FILE: cannot read nowhere.json: No such file or directory"),
        (["propose", "."], "FILE: cannot read .: Is a directory"),
        (["propose"], "the following arguments are required: FILE"),
        (["activate", "0"], "argument REV: '0' is not a revision's number"),
        (["activate", "one"], "argument REV: 'one' is not a revision's number"),
        (["activate", "99999999999999999999"], "argument REV: '99999999999999999999' is not a revision's number"),
        (["activate", "7"], "there is no quota revision 7"),
        (["activate", "1"], "revision 1 is active: only a proposed one or the shadow can be activated"),
        (["activate", "1", "--shadow", "--force"], "--force: a shadow needs none"),
        (["show", "--revision", "7"], "there is no quota revision 7"),
        (["propose", "x", "--by", ""], "FILE: cannot read x: No such file or directory"),
        (["rollback", "--by", " "], "--by: give 1 to 200 printable characters"),
        (["history", "--limit", "0"], "argument --limit: '0' is not a whole number"),
        (["explain", "me"], "argument WORKSPACE: invalid UUID value: 'me'"),
        (["explain", str(uuid.UUID(int=1))], "WORKSPACE: no such workspace"),
        (["override", str(uuid.UUID(int=1)), "live_runs", "3"], "WORKSPACE: no such workspace"),
        (["override", str(uuid.UUID(int=1)), "lives", "3"], "LIMIT: give one of run_creation, subrun_spawn"),
        (["override", str(uuid.UUID(int=1)), "live_runs"], "VALUE: give a number, or `lifted`; or --clear"),
        (["override", str(uuid.UUID(int=1)), "live_runs", "x"], "VALUE: 'x' is not a number, nor `lifted`"),
        (["override", str(uuid.UUID(int=1)), "live_runs", "-3"], "VALUE: Expected `int` >= 0"),
        (["override", str(uuid.UUID(int=1)), "live_runs", "1.5"], "VALUE: Expected `int | null`, got `float`"),
        (["override", str(uuid.UUID(int=1)), "live_runs", "3", "--burst", "1"], "--burst: live_runs is a cap"),
        (["override", str(uuid.UUID(int=1)), "tick", "3"], "--burst: tick is a rate; say how many requests may come"),
        (["override", str(uuid.UUID(int=1)), "tick", "0.0001", "--burst", "1"], "VALUE: give a multiple of 0.001"),
        (["override", str(uuid.UUID(int=1)), "tick", "3", "--clear"], "--clear: goes without VALUE and --burst"),
    ],
)
def test_bad_usage_is_one_line_that_names_the_place(quotas: Command, arguments: list[str], sentence: str) -> None:
    code, out, err = quotas("quotas", *arguments)
    assert (code, out) == (64, "")
    assert sentence in err
    assert err.count("\n") == 1


def test_a_bad_file_is_one_line_that_names_the_field(quotas: Command, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(write(FIRST).replace(b'"live_runs": 12', b'"live_runs": -12'))
    sentence = f"python -m service: {path}: limits.default.live_runs: expected `int` >= 0\n"
    assert quotas("quotas", "propose", str(path)) == (64, "", sentence)


def test_what_a_file_brings_into_a_sentence_breaks_no_line_and_commands_no_terminal(
    quotas: Command, tmp_path: Path
) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(b'{"a\\n\\u0000\\u001b[2Jb": 1}')
    field = r"a\n\x00\x1b[2Jb"
    sentence = f"python -m service: {path}: {field}: object contains unknown field `{field}`\n"
    assert quotas("quotas", "propose", str(path)) == (64, "", sentence)


def test_without_a_database_every_command_says_so_in_one_line(
    quotas: Command, file: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1:1/none")
    for arguments in (["show"], ["propose", file()], ["rollback"], ["explain", str(uuid.UUID(int=1))]):
        code, out, err = quotas("quotas", *arguments)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert "cannot reach the database that DATABASE_URL names" in err


def test_an_override_is_set_explained_and_taken_back(quotas: Command) -> None:
    workspace = json.loads(quotas("workspace", "create", "acme", "--json")[1])["workspace_id"]
    code, out, _ = quotas("quotas", "override", workspace, "tick", "7.5", "--burst", "9", "--json")
    told = {"workspace_id": workspace, "limit": "tick", "value": {"per_s": 7.5, "burst": 9}}
    assert (code, json.loads(out)) == (0, told)
    for typed, told_back in (
        (["tick", "7.5", "--burst", "9"], "limit: tick\nvalue: 7.5/s, burst 9\n"),
        (["live_runs", "lifted"], "limit: live_runs\nvalue: lifted\n"),
        (["live_parent_runs", "0"], "limit: live_parent_runs\nvalue: 0\n"),
    ):
        assert quotas("quotas", "override", workspace, *typed)[:2] == (0, f"workspace_id: {workspace}\n{told_back}")
    use = json.loads(quotas("quotas", "explain", workspace, "--json")[1])
    own = {
        each["limit"]: (each["value"], each["burst"], each["remaining"]) for each in use["limits"] if each["overridden"]
    }
    assert own == {"tick": (7.5, 9, 9), "live_runs": (None, None, None), "live_parent_runs": (0, None, 0)}
    text = quotas("quotas", "explain", workspace)[1]
    assert text.startswith(f"workspace {workspace}, class default, revision 1 in force\n")
    assert "tick                        7.5/s, burst 9 (its own)" in text
    parents = next(line for line in text.splitlines() if line.startswith("live_parent_runs"))
    assert parents.split(maxsplit=5)[1:] == ["0", "(its", "own)", "0", "0     not under a cap of 0"]
    for limit, gone in (("tick", True), ("tick", False), ("live_runs", True), ("live_parent_runs", True)):
        code, out, _ = quotas("quotas", "override", workspace, limit, "--clear", "--json")
        assert (code, json.loads(out)["cleared"]) == (0, gone)
    use = json.loads(quotas("quotas", "explain", workspace, "--json")[1])
    assert [each["limit"] for each in use["limits"] if each["overridden"]] == []


def test_without_redis_the_answer_alone_is_printed_and_says_what_nobody_knows(
    quotas: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace_id = json.loads(quotas("workspace", "create", "acme", "--json")[1])["workspace_id"]
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")
    code, out, err = quotas("quotas", "explain", workspace_id, "--json")
    told = {each["limit"]: each["retry_when"] for each in json.loads(out)["limits"]}
    assert (code, err, told["tick"]) == (0, "", "while Redis does not answer nobody knows")


def test_the_holders_of_a_cap_are_a_table_with_the_fields_that_say_something(
    quotas: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = json.loads(quotas("workspace", "create", "acme", "--json")[1])["workspace_id"]
    ids = [uuid.UUID(int=n) for n in (1, 2)]
    at = dt.datetime(2026, 1, 2, 3, 4, 5, 678, dt.UTC)
    holders = [
        Holder(run_id=ids[0], status=RunStatus.PAUSED, since=at),
        Holder(run_id=ids[1], status=RunStatus.RUNNING),
    ]
    use = LimitUse(Limit.LIVE_RUNS, Kind.CAP, Per.WORKSPACE, 2, None, False, 2, 0, None, None, "when one ends", holders)

    async def of(self: Usage, workspace_id: uuid.UUID, quota: Quota) -> WorkspaceQuotas:
        return WorkspaceQuotas(workspace_id, QuotaClass.DEFAULT, 1, None, at, [use])

    monkeypatch.setattr(Usage, "of", of)
    assert quotas("quotas", "explain", workspace) == (
        0,
        f"""workspace {workspace}, class default, revision 1 in force

limit      value  used  left  a retry succeeds
live_runs  2      2     0     when one ends

live_runs is held by
run_id                                status   since
{ids[0]}  PAUSED   2026-01-02 03:04:05Z
{ids[1]}  RUNNING
""",
        "",
    )
