"""What can be typed after `python -m service`: every command, flag, default and unit. Parses; does nothing.

`flags` of each command maps the names of API fields to what the person typed, so that a refusal names that.
"""

from __future__ import annotations

import argparse
import uuid
from pathlib import Path
from typing import NoReturn

from service.settings import parse_days

PROCESSES_MAX = 64  # each HTTP process holds several of the database's connections; more belong on more machines
RUNS_MAX = 10**9
ROLES = "OWNER, ADMIN, OPERATOR or VIEWER"


class Parser(argparse.ArgumentParser):
    """A parser whose refusal is one line and exit code 64 (EX_USAGE)."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and end."""
        self.exit(64, f"{self.prog}: {message} (see --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = Parser(
        prog="python -m service",
        description="Accepts runs of AI agents, advances them, and guards itself.",
        epilog="Commands other than `up` use DATABASE_URL and REDIS_URL, or else the stack that `up` runs in this"
        " checkout. PLIMSOLL_STACK_DIR chooses its folder (default data/stack/up).",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    _add_roles(commands)
    _add_administration(commands)
    _add_archives(commands)
    _add_quotas(commands)
    return parser


def _add_roles(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the commands that run until they are told to stop."""
    up = commands.add_parser(
        "up",
        help="embedded PostgreSQL and Redis, the HTTP service and the worker, until Ctrl-C",
        description="Start everything on this machine and print `url: …` and `token: …` (an installation token) when"
        " it is ready. Ctrl-C or SIGTERM drains and stops all within about 15 seconds. DATABASE_URL or REDIS_URL, when"
        " set, replace the embedded server.",
        allow_abbrev=False,
    )
    _add_listening(up)
    up.add_argument("--workers", type=_count, default=1, metavar="N", help="worker processes (default 1)")
    up.set_defaults(flags={})
    serve = commands.add_parser(
        "serve", help="the HTTP service alone", description="Answer HTTP until SIGTERM or Ctrl-C.", allow_abbrev=False
    )
    _add_listening(serve)
    serve.add_argument(
        "--fd", type=int, metavar="N", help="listen on this inherited open socket instead of --host and --port"
    )
    serve.set_defaults(flags={})
    worker = commands.add_parser(
        "worker", help="the worker alone", description="Advance runs until SIGTERM or Ctrl-C.", allow_abbrev=False
    )
    worker.add_argument("--processes", type=_count, default=1, metavar="N", help="worker processes (default 1)")
    worker.set_defaults(flags={})


def _add_listening(command: Parser) -> None:
    """Add what a command that answers HTTP understands."""
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    command.add_argument("--port", type=_port, default=8000, help="TCP port; 0 takes a free one (default 8000)")
    command.add_argument("--processes", type=_count, default=1, metavar="N", help="HTTP processes (default 1)")


def _add_administration(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the commands that change something once and end."""
    migrate = commands.add_parser("migrate", help="bring the database's schema up to date", allow_abbrev=False)
    migrate.set_defaults(flags={})
    _add_json(migrate)

    workspace = _verbs(commands, "workspace", "make workspaces").add_parser(
        "create", help="make a workspace and print its id", allow_abbrev=False
    )
    workspace.add_argument("name", metavar="NAME", help="1 to 200 characters")
    workspace.add_argument(
        "--quota-class", default="default", metavar="CLASS", help="default, or calibration, whose rates and caps are"
        " lifted (default: default)",
    )  # fmt: skip
    workspace.set_defaults(flags={"name": "NAME", "quota_class": "--quota-class"})
    _add_json(workspace)

    agent = _verbs(commands, "agent", "make agents").add_parser(
        "create", help="make an agent and print its id", allow_abbrev=False
    )
    agent.add_argument("--workspace", type=uuid.UUID, required=True, metavar="ID", help="the workspace's id")
    agent.add_argument("--name", required=True, help="1 to 200 characters")
    agent.add_argument(
        "--script", metavar="FILE|JSON", help='the steps of each run, such as \'[{"kind": "MODEL_CALL", "latency_ms":'
        ' 500}]\' (latency in milliseconds), or a file with them (default: MODEL_CALL, then OBSERVATION)',
    )  # fmt: skip
    agent.add_argument(
        "--model",
        metavar="JSON|FILE",
        help="a model behind a chat-completions endpoint, instead of a script: "
        '\'{"model": "NAME", "base_url": "https://…/v1", "system_prompt": "…", "tools": ["echo"]}\'',
    )
    agent.add_argument("--max-steps", type=int, metavar="N", help="most steps of a run (default 50, or what it needs)")
    agent.add_argument(
        "--max-tool-calls", type=int, metavar="N", help="most tool calls of a run (default 20, or what it needs)"
    )
    agent.set_defaults(
        flags={
            "name": "--name",
            "script": "--script",
            "workspace_id": "--workspace",
            "model": "--model",
            "max_steps": "--max-steps",
            "max_tool_calls": "--max-tool-calls",
        }
    )
    _add_json(agent)

    tokens = _verbs(commands, "token", "make and revoke tokens")
    token = tokens.add_parser("create", help="make a token and print it, this once", allow_abbrev=False)
    owner = token.add_mutually_exclusive_group(required=True)
    owner.add_argument("--workspace", type=uuid.UUID, metavar="ID", help="the workspace it is for")
    owner.add_argument("--installation", action="store_true", help="for all workspaces, and for making new ones")
    token.add_argument("--role", required=True, help=ROLES)
    token.add_argument("--expires-days", type=float, metavar="N", help="days until it expires (default: never)")
    token.set_defaults(flags={"role": "--role", "expires_days": "--expires-days", "workspace_id": "--workspace"})
    _add_json(token)

    revoke = tokens.add_parser("revoke", help="revoke a token; in force within a second", allow_abbrev=False)
    revoke.add_argument("token", metavar="TOKEN_OR_PREFIX", help="the token, or its first 13 characters")
    revoke.set_defaults(flags={"token": "TOKEN_OR_PREFIX"})
    _add_json(revoke)

    known = tokens.add_parser("known", help="say whether the token on standard input was made here", allow_abbrev=False)
    known.set_defaults(flags={})
    _add_json(known)


def _add_archives(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the commands on bundles of finished runs."""
    archive = commands.add_parser(
        "archive-runs",
        help="bundle finished runs; compact and purge what is bundled",
        description="Bundle every final run that ended at least so many days ago and has changed since its last bundle,"
        " and print the path of each bundle. Several at once share the work. Exit code 1 when some run could not be"
        " archived or some bundle is damaged; each is told in one line.",
        allow_abbrev=False,
    )
    archive.add_argument(
        "--older-than", type=_days, default=30.0, metavar="DAYS", help="days since a run's end, fractions allowed;"
        " for archiving and compacting (default 30)",
    )  # fmt: skip
    archive.add_argument(
        "--compact", action="store_true", help="delete verbose events of runs whose bundle was found whole; the bundle"
        " keeps them",
    )  # fmt: skip
    archive.add_argument(
        "--verbose-events", metavar="A,B", help="the event types that --compact deletes; an empty list deletes nothing"
        " (default: step_created)",
    )  # fmt: skip
    archive.add_argument(
        "--limit", type=_runs, metavar="N", help="at most N runs archived, N compacted and N purged (default: all)"
    )
    archive.add_argument(
        "--purge-older-than", type=_days, metavar="DAYS", help="delete runs that ended at least so many days ago and"
        " whose bundle was found whole, children before parents (default: none)",
    )  # fmt: skip
    archive.set_defaults(flags={})
    _add_json(archive)

    rehydrate = commands.add_parser(
        "rehydrate-run",
        help="restore a purged run from its bundle",
        description="Restore the run whose bundle is in FILE, to the very rows that were bundled, here or in an empty"
        " migrated database; a subrun after its parent. Prints the run's id.",
        allow_abbrev=False,
    )
    rehydrate.add_argument("file", type=Path, metavar="FILE", help="a run_snapshot_….json.zip")
    rehydrate.set_defaults(flags={})
    _add_json(rehydrate)


def _add_quotas(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the commands on quota revisions."""
    verbs = _verbs(commands, "quotas", "quota revisions: which values are in force, and how they change")

    def verb(name: str, summary: str, more: str = "") -> Parser:
        command = verbs.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.{more}",
                                   allow_abbrev=False)  # fmt: skip
        command.set_defaults(flags={"reason": "--reason", "by": "--by"})
        _add_json(command)
        return command

    show = verb("show", "print the values in force", " With --json exactly what `propose` reads.")
    show.add_argument("--revision", type=_revision, metavar="REV", help="another revision than the one in force")
    history = verb("history", "print the revisions, newest first, with all that happened to them")
    history.add_argument("--limit", type=_runs, default=50, metavar="N", help="at most N revisions (default 50)")
    propose = verb("propose", "store the values of a file as a new revision, without effect", " Prints its number.")
    propose.add_argument("file", metavar="FILE", help="a quota_revision.json, or what `show --json` prints; -: stdin")
    activate = verb(
        "activate",
        "put a revision in force in every process within a second, unless a guardrail refuses",
        " A refusal changes nothing: it is told in one line, kept in the history, and the exit code is 1.",
    )
    activate.add_argument("revision", type=_revision, metavar="REV", help="a proposed revision, or the shadow")
    activate.add_argument(
        "--shadow", action="store_true", help="ask it beside the active one and count what it would refuse, instead"
    )
    activate.add_argument("--force", action="store_true", help="overrule the guardrails that a person may overrule;"
                          " needs --by and --reason")  # fmt: skip
    recalibrate = verb(
        "recalibrate",
        "decide what a measurement means for the table in force, and begin to carry that out",
        " What is not believed is rejected with its reasons; what moves a rate becomes the shadow, waits for a person"
        " (`activate` or `reject`), and is watched once it is in force. A worker takes each turn, once a minute.",
    )
    recalibrate.add_argument("file", metavar="FILE", help="a measured quota_revision.json; -: stdin")
    recalibrate.add_argument("--dry-run", action="store_true", help="only say what would be decided")
    recalibrate.add_argument("--machine-worth", type=_factor, metavar="X", help="what rates measured on another machine"
                             " than those in force are multiplied by (default: they are refused)")  # fmt: skip
    measuring = verb(
        "measuring",
        "hold the place of whoever measures, for as long as standard input is open",
        " Prints its number, and nobody else may begin. When its input ends, its lease does within two minutes, or at"
        " once after the line `given up`.",
    )
    for command in (recalibrate, measuring):
        command.add_argument("--recalibration", type=_revision, metavar="N",
                             help="the one that `measuring` began (default: a new one)")  # fmt: skip
        _add_plan(command)
    verb("recalibration", "say how the newest recalibration stands")
    rollback = verb("rollback", "put back the revision that the active one replaced")
    reject = verb("reject", "decide against a revision that is not in force")
    reject.add_argument("revision", type=_revision, metavar="REV", help="a proposed revision, or the shadow")
    override = verb(
        "override",
        "give one workspace its own value of a limit, whichever revision is in force",
        " In force in every process within a second; no guardrail is asked.",
    )
    override.add_argument("workspace", type=uuid.UUID, metavar="WORKSPACE", help="the workspace's id")
    override.add_argument("limit", metavar="LIMIT", help="a limit's name, as `quotas show` prints it")
    override.add_argument("value", nargs="?", metavar="VALUE", help="requests per second of a rate, a cap's number, or"
                          " `lifted`")  # fmt: skip
    override.add_argument("--burst", type=int, metavar="N", help="of a rate: requests at once after a rest")
    override.add_argument("--clear", action="store_true", help="go back to the value of the workspace's class")
    explain = verb("explain", "say what a workspace uses of each limit, who holds its caps, and when a retry succeeds")
    explain.add_argument("workspace", type=uuid.UUID, metavar="WORKSPACE", help="the workspace's id")
    for command in (override, explain):
        command.set_defaults(flags={"workspace_id": "WORKSPACE", "reason": "--reason", "by": "--by"})
    for command in (propose, activate, recalibrate, measuring, rollback, reject, override):
        command.add_argument("--by", metavar="NAME", help="who wants it (default: the name this command runs under)")
    for command in (activate, rollback, reject, override):
        command.add_argument("--reason", metavar="TEXT", help="why, for the history")


def _add_plan(command: Parser) -> None:
    """Add how a recalibration is to be carried out."""
    command.add_argument("--unattended", action="store_true", help="put it in force without a person: a few"
                         " workspaces first, then all")  # fmt: skip
    for flag, minutes, meaning in (
        ("--shadow-minutes", 1440.0, "as shadow at the least"),
        ("--canary-minutes", 60.0, "in force for a few"),
        ("--watch-minutes", 1440.0, "watched when in force for all"),
    ):
        command.add_argument(flag, type=_minutes, default=minutes, metavar="N",
                             help=f"minutes {meaning}, fractions allowed (default {minutes:g})")  # fmt: skip
    command.add_argument("--canary-percent", type=_percent, default=5, metavar="N",
                         help="percent of workspaces that are the few (default 5)")  # fmt: skip


def _verbs(
    commands: argparse._SubParsersAction[Parser],
    name: str,
    summary: str,
) -> argparse._SubParsersAction[Parser]:
    """Add a command that has commands of its own."""
    noun = commands.add_parser(name, help=summary, allow_abbrev=False)
    return noun.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)


def _add_json(command: Parser) -> None:
    """Add the choice of how the result is printed."""
    command.add_argument("--json", action="store_true", help="print the result as one JSON object")


def _minutes(text: str) -> float:
    """Return a number of minutes, a year at most."""
    value = _float(text)
    if not 0 <= value <= 525_600:
        raise argparse.ArgumentTypeError(f"{text!r} is not usable: give minutes from 0 to 525600")
    return value


def _factor(text: str) -> float:
    """Return a factor between two machines."""
    value = _float(text)
    if not 0.001 <= value <= 1_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not usable: give a factor from 0.001 to 1000")
    return value


def _percent(text: str) -> int:
    """Return a whole percentage."""
    if text.isascii() and text.isdigit() and 1 <= int(text) <= 100:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not usable: give a whole number from 1 to 100")


def _float(text: str) -> float:
    """Return a number; NaN for what is none, which no range holds."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _port(text: str) -> int:
    """Return a TCP port."""
    if text.isascii() and text.isdigit() and int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")


def _revision(text: str) -> int:
    """Return a revision's number."""
    if text.isascii() and text.isdigit() and 1 <= int(text[:11]) <= 2**31 - 1:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a revision's number: 1, 2, 3, …")


def _days(text: str) -> float:
    """Return a number of days."""
    try:
        return parse_days(text)
    except ValueError as wrong:
        raise argparse.ArgumentTypeError(f"{text!r}: {wrong}") from None


def _runs(text: str) -> int:
    """Return a number of runs."""
    if text.isascii() and text.isdigit() and 1 <= int(text) <= RUNS_MAX:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {RUNS_MAX}")


def _count(text: str) -> int:
    """Return a number of processes."""
    if text.isascii() and text.isdigit() and 1 <= int(text) <= PROCESSES_MAX:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {PROCESSES_MAX}")
