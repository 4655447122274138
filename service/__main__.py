"""The service's commands: `python -m service --help`.

Exit codes: 0 done, 64 bad usage (one line that names the flag), 1 something is in the way (one line that says what and
the mend). Each command is described in `command_line.py` and done in `up.py`, `serve.py`, `administration.py`,
`archiving.py`, `revising.py` or `recalibrating.py`; modules that a command does not need are not imported for it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from service.command_line import build_parser
from service.errors import ApiError, BadUsage, Invalid, NotFound, PlimsollError, Unavailable
from service.settings import Settings, given_addresses, is_utf8, settings_for, stack_folder

if TYPE_CHECKING:
    from service.quota.recalibration_cycle import Plan

BAD_USAGE = 64  # EX_USAGE of sysexits.h
IN_THE_WAY = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for number, word in enumerate(words, 1):
        if not is_utf8(word):
            return _complain(f"argument {number} is not valid UTF-8", BAD_USAGE)
    given = build_parser().parse_args(words)
    try:
        return _run(given)
    except (BadUsage, ApiError) as refusal:
        return _complain(
            _with_flag(refusal, given.flags), IN_THE_WAY if isinstance(refusal, Unavailable) else BAD_USAGE
        )
    except PlimsollError as error:
        return _complain(str(error), IN_THE_WAY)


def _run(given: argparse.Namespace) -> int:
    """Do what was asked for."""
    match given.command:
        case "up":
            return _up(given)
        case "serve":
            return _serve(given)
        case "worker":
            from service.serve import work

            return work(_settings(), given.processes)
        case "archive-runs":
            return _archive(given)
        case "quotas":
            return _quotas(given)
        case _:
            result = _administer(given, _settings())
            _show(result, as_json=given.json)
            return 0


def _up(given: argparse.Namespace) -> int:
    """Run everything."""
    from service.up import up

    database_url, redis_url = given_addresses()
    return up(
        stack_folder(),
        {"postgres": database_url, "redis": redis_url},
        host=given.host,
        port=given.port,
        processes=given.processes,
        workers=given.workers,
        say=lambda line: print(line, flush=True),
    )


def _serve(given: argparse.Namespace) -> int:
    """Answer HTTP on a socket of our own, or on the one that our supervisor opened."""
    from service.serve import address_of, inherited, listen, serve

    settings = _settings()
    if given.fd is not None:
        return serve(settings, inherited(given.fd), given.processes)
    with listen(given.host, given.port) as listener:
        print(f"url: {address_of(listener)}", flush=True)
        return serve(settings, listener, given.processes)


def _archive(given: argparse.Namespace) -> int:
    """Archive, compact and purge what is due; 1 when some run or bundle was left out."""
    from service.archiving import archive_runs, plan_of

    def write(piece: str) -> None:
        print(piece, end="", flush=True)

    plan = plan_of(given.older_than, given.compact, given.verbose_events, given.limit, given.purge_older_than)
    tally = archive_runs(
        _settings(), plan, as_json=given.json, write=write, complain=lambda fault: _complain(fault, IN_THE_WAY)
    )
    return IN_THE_WAY if tally.faults else 0


def _quotas(given: argparse.Namespace) -> int:
    """Show or change quota revisions."""
    from service import recalibrating, revising
    from service.quota.limits import Limit

    settings = _settings()
    result: dict[str, Any]
    match given.verb:
        case "show":
            sys.stdout.write(revising.show(settings, given.revision, as_json=given.json))
            return 0
        case "history":
            sys.stdout.write(revising.history(settings, given.limit, as_json=given.json))
            return 0
        case "explain":
            sys.stdout.write(revising.explain(settings, given.workspace, as_json=given.json))
            return 0
        case "propose":
            result = revising.propose(settings, given.file, given.by)
        case "activate" if given.shadow:
            if given.force:
                raise BadUsage("--force: a shadow needs none, it refuses nobody")
            result = revising.shadow(settings, given.revision, given.by, given.reason)
        case "activate":
            result = revising.activate(settings, given.revision, given.by, given.reason, force=given.force)
        case "recalibrate":
            result = recalibrating.recalibrate(
                settings, given.file, given.by, _plan_of(given), machine_worth=given.machine_worth,
                recalibration_id=given.recalibration, dry_run=given.dry_run,
            )  # fmt: skip
        case "recalibration":
            result = recalibrating.stand(settings)
        case "measuring":

            def say(number: int) -> None:
                _show({"recalibration": number}, as_json=given.json)

            recalibrating.measuring(settings, given.by, _plan_of(given), given.recalibration, say=say)
            return 0
        case "rollback":
            result = revising.rollback(settings, given.by, given.reason)
        case "reject":
            result = revising.reject(settings, given.revision, given.by, given.reason)
        case "override":
            if given.limit not in list(Limit):
                raise BadUsage(f"LIMIT: give one of {', '.join(Limit)}, not {given.limit!r}")
            result = revising.override(
                settings, given.workspace, Limit(given.limit), given.value, given.burst, given.by, given.reason,
                clear=given.clear, as_json=given.json,
            )  # fmt: skip
        case verb:
            raise RuntimeError(f"the parser knows {verb}, this function does not")
    _show(result, as_json=given.json)
    return 0


def _plan_of(given: argparse.Namespace) -> Plan:
    """Return how a recalibration is to be carried out."""
    from service.quota.recalibration_cycle import Plan

    return Plan(
        needs_approval=not given.unattended,
        shadow_s=given.shadow_minutes * 60,
        canary_s=given.canary_minutes * 60,
        watch_s=given.watch_minutes * 60,
        canary_percent=given.canary_percent,
    )


def _administer(given: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """Do one administrative command and return its result."""
    from service import administration

    match given.command, getattr(given, "verb", None):
        case "migrate", _:
            return administration.bring_schema_up_to_date(settings)
        case "workspace", "create":
            return administration.make_workspace(settings, given.name, given.quota_class)
        case "agent", "create":
            bounds = (given.max_steps, given.max_tool_calls)
            return administration.make_agent(settings, given.workspace, given.name, given.script, given.model, *bounds)
        case "token", "create":
            return administration.make_token(settings, given.workspace, given.role, given.expires_days)
        case "token", "revoke":
            return administration.take_token_back(settings, given.token)
        case "token", "known":
            return administration.is_token_known(settings)
        case "rehydrate-run", _:
            from service.archiving import restore_run

            return restore_run(settings, given.file)
        case command:
            raise RuntimeError(f"the parser knows {command}, this function does not")


def _settings() -> Settings:
    """Return the environment's settings; addresses that it does not give are those of this checkout's running stack."""
    database_url, redis_url = given_addresses()
    if database_url is None or redis_url is None:
        from service.embedded import running_stack

        if told := running_stack(stack_folder()):
            return settings_for(database_url or told.database_url, redis_url or told.redis_url)
    return Settings.from_environment()


def _show(result: dict[str, Any], *, as_json: bool) -> None:
    """Print a result, as one JSON object or for a person."""
    print(json.dumps(result) if as_json else _as_lines(result) or "none", flush=True)


def _as_lines(result: dict[str, Any]) -> str:
    """Return a result for a person: a line per value that is there."""
    return "\n".join(f"{name}: {_in_words(value)}" for name, value in result.items() if value is not None)


def _in_words(value: object) -> str:
    """Return one value, a list without its brackets."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _with_flag(refusal: PlimsollError, flags: dict[str, str]) -> str:
    """Return what a refusal says, with the flag in place of the API's field."""
    if isinstance(refusal, NotFound) and "workspace_id" in flags:
        return f"{flags['workspace_id']}: {refusal.detail}"
    if not isinstance(refusal, Invalid):
        return str(refusal)
    field, _, reason = refusal.detail.partition(": ")
    for name, flag in flags.items():
        if field.startswith(name):
            return f"{flag}{field.removeprefix(name)}: {reason}"
    return refusal.detail


def _complain(sentence: str, code: int) -> int:
    """Say one line on standard error, whatever a file or an argument brought into it, and return the exit code."""
    line = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in sentence)
    print(f"python -m service: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
