"""The commands as they are typed: what they print, what they refuse and with which exit code."""

from __future__ import annotations

import json
import socket
import uuid
from pathlib import Path

import pytest

from service.embedded import Stack
from service.settings import sqlalchemy_url
from tests.service.conftest import Command

NEGATIVE = '[{"kind": "PLAN", "latency_ms": -1}]'


@pytest.fixture
def administration(command: Command, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run commands on a database of the test's own."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")  # none of these commands asks Redis
    return command


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["up", "--port", "x"], "python -m service up: argument --port: 'x' is not a port from 0 to 65535"),
        (["up", "--port", "65536"], "argument --port: '65536' is not a port from 0 to 65535"),
        (["up", "--processes", "0"], "argument --processes: '0' is not a whole number from 1 to 64"),
        (["serve", "--procs", "2"], "unrecognized arguments: --procs 2"),
        (["worker", "--processes", "two"], "argument --processes: 'two' is not a whole number from 1 to 64"),
        (["fly"], "argument COMMAND: invalid choice: 'fly'"),
        ([], "the following arguments are required: COMMAND"),
        (["archive-runs", "--older-than", "-1"], "argument --older-than: '-1': give a number of days from 0 to 36500"),
        (["archive-runs", "--older-than", "nan"], "argument --older-than: 'nan': give a number of days from 0 to"),
        (["archive-runs", "--purge-older-than", "x"], "argument --purge-older-than: 'x': give a number of days from 0"),
        (["archive-runs", "--limit", "0"], "argument --limit: '0' is not a whole number from 1 to 1000000000"),
        (["archive-runs", "--verbose-events"], "argument --verbose-events: expected one argument"),
        (["rehydrate-run"], "the following arguments are required: FILE"),
        (["workspace"], "python -m service workspace: the following arguments are required: VERB"),
        (["agent", "create", "--workspace", "x", "--name", "a"], "argument --workspace: invalid UUID value: 'x'"),
        (["token", "create", "--role", "OWNER"], "one of the arguments --workspace --installation is required"),
        (["token", "create", "--installation"], "the following arguments are required: --role"),
    ],
)
def test_bad_usage_is_one_line_that_names_the_flag(command: Command, arguments: list[str], sentence: str) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (64, "")
    assert sentence in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "name",
    ["up", "serve", "worker", "migrate", "workspace", "agent", "token", "archive-runs", "rehydrate-run", "quotas"],
)
def test_every_command_has_help(command: Command, name: str) -> None:
    code, out, _ = command(name, "--help")
    assert code == 0
    assert f"python -m service {name}" in out


def test_a_workspace_an_agent_and_a_token_are_made_and_the_token_is_revoked(administration: Command) -> None:
    code, out, _ = administration("workspace", "create", "acme", "--quota-class", "calibration", "--json")
    workspace = json.loads(out)
    assert code == 0
    assert workspace == {
        "workspace_id": str(uuid.UUID(workspace["workspace_id"])), "name": "acme", "quota_class": "calibration",
    }  # fmt: skip

    code, out, _ = administration(
        "agent", "create", "--workspace", workspace["workspace_id"], "--name", "a", "--json",
        "--script", '[{"kind": "MODEL_CALL", "latency_ms": 5}]',
    )  # fmt: skip
    agent = json.loads(out)
    assert code == 0
    assert agent == {
        "agent_id": str(uuid.UUID(agent["agent_id"])), "workspace_id": workspace["workspace_id"], "name": "a",
    }  # fmt: skip

    code, out, _ = administration("token", "create", "--workspace", workspace["workspace_id"], "--role", "VIEWER")
    assert code == 0
    lines = dict(line.split(": ") for line in out.splitlines())
    assert lines == {"token": lines["token"], "role": "VIEWER"}

    assert administration("token", "revoke", lines["token"]) == (0, "revoked: True\n", "")
    assert administration("token", "revoke", lines["token"]) == (
        64, "", "python -m service: TOKEN_OR_PREFIX: no token in force is called so\n",
    )  # fmt: skip


def test_a_script_may_be_a_file(administration: Command, tmp_path: Path) -> None:
    workspace = json.loads(administration("workspace", "create", "acme", "--json")[1])["workspace_id"]
    script = tmp_path / "script.json"
    script.write_text('[{"kind": "OBSERVATION"}]')
    assert administration("agent", "create", "--workspace", workspace, "--name", "a", "--script", str(script))[0] == 0


def test_an_agent_may_be_a_model(administration: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLIMSOLL_MODEL_ALLOW", "models.example")
    workspace = json.loads(administration("workspace", "create", "a", "--json")[1])["workspace_id"]
    model = json.dumps({"model": "m", "base_url": "https://models.example/v1", "tools": ["echo"]})
    bounds = ("--max-steps", "5", "--max-tool-calls", "0")
    code, out, err = administration(
        "agent", "create", "--workspace", workspace, "--name", "a", "--model", model, *bounds, "--json"
    )
    assert (code, err, json.loads(out)["workspace_id"]) == (0, "", workspace)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["workspace", "create", " "], "NAME: give 1 to 200 characters, without U+0000"),
        (["workspace", "create", "a", "--quota-class", "x"], "--quota-class: give default or calibration, not 'x'"),
        (["token", "create", "--installation", "--role", "KING"], "--role: give one of OWNER, ADMIN, OPERATOR"),
        (
            ["token", "create", "--installation", "--role", "OWNER", "--expires-days", "-1"],
            "--expires-days: give a number of days above 0, at most 3650",
        ),
        (["token", "create", "--workspace", str(uuid.UUID(int=1)), "--role", "ADMIN"], "--workspace: no such"),
        (["agent", "create", "--workspace", str(uuid.UUID(int=1)), "--name", "a"], "--workspace: no such workspace"),
        (
            ["agent", "create", "--workspace", str(uuid.UUID(int=1)), "--name", "a", "--script", "nowhere/script.json"],
            "--script: cannot read nowhere/script.json: No such file or directory",
        ),
        (["agent", "create", "--workspace", str(uuid.UUID(int=1)), "--name", "a", "--script", "[1"], "--script: "),
        (
            ["agent", "create", "--workspace", str(uuid.UUID(int=1)), "--name", "a", "--script", NEGATIVE],
            "--script[0].latency_ms: give 0 to 3600000 milliseconds",
        ),
        (
            ["agent", "create", "--workspace", str(uuid.UUID(int=1)), "--name", "a", "--model", '{"model": "m"}'],
            "--model.base_url: give one: the installation has no endpoint of its own",
        ),
        (
            ["agent", "create", "--workspace", str(uuid.UUID(int=1)), "--name", "a", "--model", "[]"],
            "--model: Expected `object`, got `array`",
        ),
        (
            ["agent", "create", "--workspace", str(uuid.UUID(int=1)), "--name", "a", "--max-steps", "0"],
            "--max-steps: give a whole number from 1 to 2000",
        ),
    ],
)  # fmt: skip
def test_what_the_service_refuses_is_told_with_the_flag(
    administration: Command, arguments: list[str], sentence: str
) -> None:
    code, out, err = administration(*arguments)
    assert (code, out) == (64, "")
    assert err.startswith(f"python -m service: {sentence}")
    assert err.count("\n") == 1


def test_without_addresses_and_without_a_running_stack_the_mend_is_said(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.setenv("PLIMSOLL_STACK_DIR", str(tmp_path))
    assert command("migrate") == (
        1, "",
        "python -m service: DATABASE_URL is not set: set it, or start this checkout's own stack with `make up`\n",
    )  # fmt: skip


def test_without_addresses_the_running_stack_is_used(
    command: Command, monkeypatch: pytest.MonkeyPatch, stack: Stack
) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.setenv("PLIMSOLL_STACK_DIR", str(stack.folder))
    assert command("migrate", "--json") == (0, '{"schema": "up to date"}\n', "")
    assert command("workspace", "create", "acme")[0] == 0


def test_a_database_that_is_down_is_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:secret@127.0.0.1:1/x")
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")
    for arguments in (["migrate"], ["workspace", "create", "acme"]):
        code, out, err = command(*arguments)
        assert (code, out) == (1, "")
        assert err.startswith("python -m service: cannot reach the database that DATABASE_URL names: ")
        assert err.count("\n") == 1
        assert "secret" not in err


def test_a_database_without_the_schema_names_the_command_that_makes_it(
    command: Command, monkeypatch: pytest.MonkeyPatch, stack: Stack
) -> None:
    assert stack.postgres is not None
    monkeypatch.setenv("DATABASE_URL", stack.postgres.url_of("postgres"))
    monkeypatch.setenv("REDIS_URL", stack.redis_url)
    assert command("workspace", "create", "acme") == (
        1, "", "python -m service: the database has no schema yet: run `python -m service migrate`\n",
    )  # fmt: skip


@pytest.mark.parametrize("role", ["up", "serve"])
def test_a_port_in_use_is_one_line_and_nothing_is_started(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, role: str
) -> None:
    monkeypatch.setenv("PLIMSOLL_STACK_DIR", str(tmp_path / "stack"))
    monkeypatch.setenv("DATABASE_URL", "postgresql://127.0.0.1:1/x")
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")
    mend = "stop what listens there, or choose another with --port (0: a free one)"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert command(role, "--port", str(port)) == (
            1, "",
            f"python -m service: port {port} on 127.0.0.1 is already in use: {mend}\n",
        )  # fmt: skip
    assert not (tmp_path / "stack" / "stack.json").exists()


def test_a_host_that_is_none_is_bad_usage(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://127.0.0.1:1/x")
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")
    code, out, err = command("serve", "--host", "no such host", "--port", "0")
    assert (code, out) == (64, "")
    assert err.startswith("python -m service: --host no such host: ")
    assert err.count("\n") == 1


def test_a_locked_stack_is_one_line_with_its_address(
    command: Command, monkeypatch: pytest.MonkeyPatch, stack: Stack
) -> None:
    monkeypatch.setenv("PLIMSOLL_STACK_DIR", str(stack.folder))
    code, out, err = command("up", "--port", "0")
    assert (code, out) == (1, "")
    assert err.startswith(f"python -m service: the stack in {stack.folder} is already running (process ")
    assert err.count("\n") == 1


def test_a_socket_that_was_not_inherited_is_bad_usage(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://127.0.0.1:1/x")
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")
    code, out, err = command("serve", "--fd", "987")
    assert (code, out) == (64, "")
    assert err.startswith("python -m service: --fd 987: no listening socket was inherited")


@pytest.mark.parametrize(
    "arguments",
    [("workspace", "create", "\udcff"), ("token", "revoke", "\udcff"), ("serve", "--port", "0", "--host", "\udcff")],
)
def test_an_argument_that_is_no_utf_8_is_bad_usage(command: Command, arguments: tuple[str, ...]) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (64, "")
    assert err == f"python -m service: argument {len(arguments)} is not valid UTF-8\n"


def test_a_script_that_is_nested_too_deeply_is_bad_usage(administration: Command) -> None:
    script = '[{"kind": ' + "[" * 5000 + "]" * 5000 + "}]"
    code, _, err = administration(
        "agent", "create", "--workspace", str(uuid.uuid4()), "--name", "a", "--script", script
    )
    assert (code, err) == (64, "python -m service: --script: it is nested too deeply\n")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        (
            "DATABASE_URL",
            "postgresql://x@127.0.0.1:99999/db",
            "DATABASE_URL is not an address: Port",
        ),
        ("DATABASE_URL", "postgresql://[::1/db", "DATABASE_URL is not an address: Invalid IPv6 URL"),
        ("DATABASE_URL", "postgresql://x@127.0.0.1:1/db?colour=red", "DATABASE_URL: the parameter colour is not known"),
        ("REDIS_URL", "http://127.0.0.1:1", "REDIS_URL must begin with redis://, rediss:// or unix://"),
        ("PLIMSOLL_STACK_DIR", "data/\udcff", "PLIMSOLL_STACK_DIR is not valid UTF-8"),
    ],
)
def test_an_address_that_cannot_be_used_is_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    if name != "PLIMSOLL_STACK_DIR":
        monkeypatch.setenv("DATABASE_URL", "postgresql://x@127.0.0.1:1/db")
        monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")
    monkeypatch.setenv(name, value)
    code, out, err = command("workspace", "create", "a")
    assert (code, out, err.count("\n"), sentence in err) == (1, "", 1, True), err


@pytest.mark.parametrize(("part", "other"), [("/", ""), ("plimsoll@", "nobody@")])
def test_a_database_or_user_that_does_not_exist_is_one_line(
    command: Command, database_url: str, monkeypatch: pytest.MonkeyPatch, part: str, other: str
) -> None:
    address, query = database_url.split("?")
    head, _, name = address.rpartition("/")
    monkeypatch.setenv("DATABASE_URL", f"{head}/absent?{query}" if part == "/" else database_url.replace(part, other))
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")
    code, out, err = command("workspace", "create", "a")
    assert (code, out, err.count("\n")) == (1, "", 1), (name, err)
    assert "cannot reach the database that DATABASE_URL names" in err


def test_a_libpq_sslmode_is_understood() -> None:
    assert sqlalchemy_url("postgresql://u@h/d?sslmode=require") == "postgresql+asyncpg://u@h/d?ssl=require"
