"""The harness's commands: what each does, and what is printed. What may be asked for is in `command_flags`.

Results go to stdout, progress and errors to stderr. Bad usage is one line and exit code 64. The work is done elsewhere:
`measurement` makes load, `importers` takes in what other tools measured, `report` judges it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec

from harness import latencies_command
from harness.bench import GROUPS
from harness.command_flags import parser_of_commands
from harness.errors import BadUsage, ExitCode, HarnessError
from harness.folders import data_folder, find_in_checkout, keep_caches_here
from harness.generator import Plan
from harness.importers.formats import Format, Unit
from harness.measurement import measure
from harness.openloop import OpenPlan
from harness.recalibration import command as recalibrate_command
from harness.request import Request, check_request, require_judgeable
from harness.run_command import plan_of
from harness.sample import Endpoint
from harness.sampleset import read_sample_set
from harness.search import (
    ENDPOINTS,
)
from harness.slofile import SLO_FILE, read_slos
from harness.summary import summarise
from harness.target import Target, named_target, own_stack
from harness.workspaces import SNAPSHOT_RATE_PER_S


def _target(arguments: argparse.Namespace) -> AbstractContextManager[Target]:
    url = arguments.url or os.environ.get("PLIMSOLL_URL")
    if url:
        return contextlib.nullcontext(named_target(url, arguments.token or os.environ.get("PLIMSOLL_TOKEN")))
    if arguments.token:
        raise BadUsage("--token needs --url (or PLIMSOLL_URL): an embedded stack makes its own token")
    return own_stack(data_folder() / "stack")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.baseline is not None and not arguments.gate:
        raise BadUsage("--baseline needs --gate: without it nothing is judged")
    if arguments.gate:
        require_judgeable(arguments.baseline)
    plan = plan_of(arguments)
    if isinstance(plan, Plan) and plan.poll_interval_s * SNAPSHOT_RATE_PER_S < 1:
        _complain(f"note: --poll-interval {plan.poll_interval_s:g} is faster than the {SNAPSHOT_RATE_PER_S}/s that a"
                  " workspace may ask for snapshots; expect 429 once its burst capacity is used")  # fmt: skip
    measured = measure(plan, _target(arguments), arguments.out or data_folder() / "samples")
    summary = summarise(read_sample_set(measured.path))
    if arguments.json:
        _show(msgspec.json.encode(dataclasses.asdict(summary)).decode())
    else:
        _show(f"samples: {measured.path}", *summary.lines())
    if not measured.complete:
        raise HarnessError(f"{measured.path} lacks rows of planned requests: the measurement is not valid")
    if not arguments.gate:
        if isinstance(plan, OpenPlan):
            _refuse_untrue(measured.path)
        return ExitCode.PASSED
    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        return _judge(check_request([measured.path], baseline=arguments.baseline))


def _refuse_untrue(path: Path) -> None:
    """Raise HarnessError when an open loop was not what it says: its samples would blame the service for it."""
    from harness.evaluation import find_faults_in

    findings = find_faults_in(path)
    if findings:
        told = " ".join(finding.detail for finding in findings)
        raise HarnessError(f"{path} is kept, but the measurement is not valid: {told}")


def _burst_limits(arguments: argparse.Namespace) -> int:
    from harness.burst_limits import BurstPlan, read_limits, requirements_of

    slo_file = find_in_checkout(arguments.slo or SLO_FILE)
    endpoints = ENDPOINTS if arguments.endpoint == "all" else (Endpoint(arguments.endpoint),)
    plan = BurstPlan(requirements_of(read_slos(slo_file), endpoints, slo_file), arguments.trials, arguments.max_burst)
    measured = measure(plan, _target(arguments), arguments.out or data_folder() / "samples")
    if not measured.complete:
        raise HarnessError(f"{measured.path} lacks rows of planned requests: the measurement is not valid")
    limits = read_limits(measured.path, plan, slo_file)
    if arguments.json:
        _show(msgspec.json.encode(dataclasses.asdict(limits)).decode())
    else:
        _show(f"samples: {limits.samples}", *limits.lines())
    return limits.exit_code


def _capacity(arguments: argparse.Namespace) -> int:
    from harness.capacity import CapacityPlan, read_capacity, requirements_of

    slo_file = find_in_checkout(arguments.slo or SLO_FILE)
    endpoints = ENDPOINTS if arguments.endpoint == "all" else (Endpoint(arguments.endpoint),)
    plan = CapacityPlan(
        requirements_of(read_slos(slo_file), endpoints, slo_file),
        arguments.trials,
        arguments.window,
        arguments.first_rate,
        arguments.max_rate,
        arguments.seed,
    )
    measured = measure(plan, _target(arguments), arguments.out or data_folder() / "samples")
    if not measured.complete:
        raise HarnessError(f"{measured.path} lacks rows of planned requests: the measurement is not valid")
    answer = read_capacity(measured.path, slo_file)
    if arguments.json:
        _show(msgspec.json.encode(dataclasses.asdict(answer)).decode())
    else:
        _show(f"samples: {answer.samples}", *answer.lines())
    return answer.exit_code


def _recalibrate(arguments: argparse.Namespace) -> int:
    from harness.recalibration.session import recalibrate

    outcome = recalibrate(recalibrate_command.wish_of(arguments))
    if arguments.json:
        _show(msgspec.json.encode(outcome.document()).decode())
    else:
        _show(*outcome.lines())
    return outcome.exit_code


def _report(arguments: argparse.Namespace) -> int:
    notebooks = None
    if arguments.notebooks is not None:
        notebooks = [name.strip() for name in arguments.notebooks.split(",") if name.strip()]
        if not notebooks:
            raise BadUsage("--notebooks names none: give names by commas, or leave it out for all that apply")
    return _judge(
        check_request(
            arguments.samples,
            notebooks,
            arguments.out,
            partial=arguments.partial,
            parameters=dict(arguments.parameter),
            slo_file=arguments.slo or SLO_FILE,
            baseline=arguments.baseline,
        )
    )


def _import(arguments: argparse.Namespace) -> int:
    from harness.importers.intake import import_file

    unit = None if arguments.unit is None else Unit(arguments.unit)
    endpoint = None if arguments.endpoint is None else Endpoint(arguments.endpoint)
    root = arguments.out or data_folder() / "samples"
    imported = import_file(Format(arguments.kind), arguments.file, root, unit=unit, endpoint=endpoint)
    if arguments.json:
        _show(msgspec.json.encode(dataclasses.asdict(imported)).decode())
    else:
        _show(f"samples: {imported.samples}", *imported.lines())
    return ExitCode.PASSED


def _bench(arguments: argparse.Namespace) -> int:
    from harness.bench.results import page
    from harness.bench.session import Wish, run_bench

    only = GROUPS if arguments.only is None else [name.strip() for name in arguments.only.split(",")]
    if unknown := [name for name in only if name not in GROUPS]:
        raise BadUsage(f"--only {unknown[0]!r} is not known: give some of {', '.join(GROUPS)}, by commas")
    quick = arguments.quick
    wish = Wish(
        repeats=arguments.repeats or (2 if quick else 5),
        seconds=arguments.seconds or (0.3 if quick else 3.0),
        only=frozenset(only),
        due_runs=500 if quick else 5_000,
        pgbench_scale=1 if quick else 10,
        sample_rows=5_000 if quick else 100_000,
    )
    file, bench = run_bench(wish, data_folder())
    if arguments.json:
        _show(msgspec.json.encode(bench).decode())
    else:
        _show(page(bench), f"bench: {file}")
    return ExitCode.PASSED


def _latencies(arguments: argparse.Namespace) -> int:
    _show(*latencies_command.latency_lines(arguments.places, arguments.memory_mb, as_json=arguments.json))
    return ExitCode.PASSED


def _judge(request: Request) -> int:
    """Hand over to `report`, which is slow to import and not needed for making load; print what it found."""
    _complain(f"reading {', '.join(str(path) for path in request.samples)}")
    keep_caches_here()
    from harness.report import write_report

    written = write_report(request)
    _show(*written.lines)
    return written.exit_code


def _show(*lines: str) -> None:
    """Print results; a reader that has left, as `head` does, must not change the exit code."""
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(text: str) -> None:
    print(" ".join(text.split()), file=sys.stderr)


def _keep_traceback() -> str:
    """Write the traceback of the exception at hand to the data folder, or to stderr where that cannot be written.

    Return where it is, in words.
    """
    folder = data_folder() / "logs"
    file = folder / f"harness-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}-{os.getpid()}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(traceback.format_exc(), encoding="utf-8")
    except OSError:
        traceback.print_exc()
        return "its traceback is above"
    return f"its traceback is in {file}"


def main(words: Sequence[str] | None = None) -> int:
    """Carry out one command and return its exit code."""
    arguments = parser_of_commands().parse_args(words)
    try:
        work = {
            "run": _run,
            "burst-limits": _burst_limits,
            "capacity": _capacity,
            "import": _import,
            "latencies": _latencies,
            "recalibrate": _recalibrate,
            "report": _report,
            "bench": _bench,
        }
        return work[arguments.command](arguments)
    except HarnessError as fault:
        _complain(f"python -m harness {arguments.command}: {fault}")
        return fault.exit_code
    except Exception as fault:  # a bug of ours: Python's own exit code, 1, would tell a CI job that an SLO failed
        _complain(f"python -m harness {arguments.command}: this is a fault of the harness, nothing was judged:"
                  f" {type(fault).__name__}: {fault} ({_keep_traceback()})")  # fmt: skip
        return ExitCode.INVALID
    except KeyboardInterrupt:
        _complain(f"python -m harness {arguments.command}: interrupted")
        return ExitCode.INTERRUPTED


if __name__ == "__main__":
    raise SystemExit(main())
