"""The harness's commands: what may be asked for, within which bounds, and what is printed.

Results go to stdout, progress and errors to stderr. Bad usage is one line and exit code 64. The work is done elsewhere:
`measurement` makes load, `importers` takes in what other tools measured, `report` judges it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import math
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NoReturn

import msgspec

from harness import latencies_command
from harness.bench import GROUPS
from harness.errors import BadUsage, ExitCode, HarnessError
from harness.flags import seconds as _seconds
from harness.flags import whole as _whole
from harness.folders import data_folder, find_in_checkout, keep_caches_here
from harness.generator import Plan
from harness.importers.formats import EXPORTS, Format, Unit
from harness.measurement import measure
from harness.openloop import OpenPlan
from harness.recalibration import command as recalibrate_command
from harness.request import Request, check_request, require_judgeable
from harness.run_command import add_flags, plan_of
from harness.sample import Endpoint
from harness.sampleset import read_sample_set
from harness.search import (
    BURST_MAX,
    ENDPOINTS,
    RATE_MAX_PER_S,
    RATE_UNIT_PER_S,
    TRIALS_MAX,
    TRIALS_MIN,
    level_of,
    rate_per_s,
)
from harness.slofile import SLO_FILE, read_slos
from harness.summary import summarise
from harness.target import Target, named_target, own_stack
from harness.workspaces import SNAPSHOT_RATE_PER_S

WINDOW_MIN_S, WINDOW_MAX_S = 0.5, 600.0  # of a capacity search; a shorter one is all beginning and end
CELL_SECONDS_MIN, CELL_SECONDS_MAX = 0.1, 60.0  # of one cell of the bench
BASELINE_HELP = "a sample set, or a folder that holds some, than which these samples must not be more than 5 %% slower"


class _Parser(argparse.ArgumentParser):
    """Answers bad usage with one line and the exit code that the contract gives it."""

    def error(self, message: str) -> NoReturn:
        self.exit(ExitCode.USAGE, f"{self.prog}: {message} (see --help)\n")


def _cell_seconds(text: str) -> float:
    value = _seconds(text)
    if not CELL_SECONDS_MIN <= value <= CELL_SECONDS_MAX:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not usable: give seconds from {CELL_SECONDS_MIN:g} to {CELL_SECONDS_MAX:g}"
        )
    return value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m harness", description="Makes load, records every request, judges the samples.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    run = commands.add_parser(
        "run",
        help="make load and record it",
        description="Make load against a service and record every request. Without --url an embedded stack is started"
        " for the measurement and stopped afterwards. Prints the sample set's folder and a short table.",
        allow_abbrev=False,
    )
    _add_run(run)
    limits = commands.add_parser(
        "burst-limits",
        help="find the highest burst that meets the SLO, and the first that does not",
        description="Send bursts of requests, all intended at one instant, in calibration workspaces, and find for each"
        " endpoint the highest burst that meets its latency SLO (p95, milliseconds) and the lowest that misses it, each"
        " with a bounded error. Exit code 0: found from both sides, 3: not, 2: the measurement is not valid.",
        allow_abbrev=False,
    )
    _add_burst_limits(limits)
    capacity = commands.add_parser(
        "capacity",
        help="find the highest sustained rate that meets the SLO, and the first that does not",
        description="Send requests at Poisson instants, open loop, in calibration workspaces, and find for each"
        " endpoint the highest rate (requests per second) whose latency (p95, milliseconds), errors and queues all"
        " stay within bounds, and the lowest rate at which one of them does not, each with a bounded error. Exit code"
        " 0: found from both sides, 3: not, 2: the measurement is not valid, or the generator could not keep up.",
        allow_abbrev=False,
    )
    _add_capacity(capacity)
    recalibration = commands.add_parser(
        "recalibrate",
        help="measure burst limits and capacity, and propose quotas from them",
        description="Measure an embedded stack, or a staging service that --url names; execute the notebook of quotas"
        " over it; hand the table to the service that DATABASE_URL and REDIS_URL name (or this checkout's running"
        " stack), whose guardrails, shadow and canaries decide. Without such a service the embedded stack's own quotas"
        " are recalibrated. Killed, it goes on where it was. Exit code 0: decided, 3: nothing was found out, 2: the"
        " measurement is not valid, not believed, or could not be made.",
        allow_abbrev=False,
    )
    recalibrate_command.add_flags(recalibration, _trials, _rate, _window)
    report = commands.add_parser(
        "report",
        help="judge sample sets and write the report",
        description="Execute the notebooks over sample sets and write HTML, verdict and tables.",
        allow_abbrev=False,
    )
    report.add_argument("--samples", nargs="+", type=Path, required=True, metavar="PATH", help="sample set folders")
    report.add_argument("--baseline", type=Path, metavar="PATH", help=BASELINE_HELP)
    report.add_argument("--notebooks", metavar="A,B", help="names of the notebooks, by commas; default: all that apply")
    report.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the report; default: a new one in data/reports"
    )
    report.add_argument("--partial", action="store_true", help="accept a set that is not complete (a killed harness)")
    report.add_argument(
        "--slo", type=Path, metavar="FILE", help="the SLOs to judge by; default: data/slo.yaml of the checkout"
    )
    report.add_argument(
        "--parameter",
        action="append",
        default=[],
        type=_assignment,
        metavar="NAME=VALUE",
        help="a notebook's parameter, its value as YAML; may be repeated",
    )
    taken = commands.add_parser(
        "import",
        help="read another tool's results into a sample set",
        description="Read the requests that another tool recorded into a sample set, for `report` to judge. What the"
        " tool cannot know stays null and is told in the set's manifest and in every report. Files may be gzipped."
        " Aggregates without rows are refused.",
        epilog="How each file is made: " + "; ".join(f"{kind}: {how}" for kind, how in EXPORTS.items()) + ".",
        allow_abbrev=False,
    )
    _add_import(taken)
    latencies_command.add_flags(
        commands.add_parser(
            "latencies",
            help=latencies_command.HELP,
            description=latencies_command.DESCRIPTION,
            allow_abbrev=False,
        )
    )
    bench = commands.add_parser(
        "bench",
        help="measure the service's paths, the harness and the analysis beside their floors",
        description="Measure what each path costs as a ratio to its floor, on private servers that are stopped"
        " afterwards. Prints a table and the path of bench.json. Aims that are not reached are no failure; an answer"
        " that is wrong is (exit code 2).",
        allow_abbrev=False,
    )
    _add_bench(bench)
    return parser


def _add_import(taken: argparse.ArgumentParser) -> None:
    add = taken.add_argument
    add("--from", dest="kind", choices=[str(kind) for kind in Format], required=True, help="what wrote the file")
    add("file", type=Path, metavar="FILE", help="the tool's rows, one for each request")
    add("--endpoint", choices=[str(endpoint) for endpoint in Endpoint if endpoint is not Endpoint.OTHER],
        help="what those requests asked for whose address or name does not tell it (default: other)")  # fmt: skip
    add("--unit", choices=[str(unit) for unit in Unit],
        help="of hdr-log only: the unit of its values, which the log does not say (default: ns)")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="folder in which the sample set is made (default: data/samples)")
    add("--json", action="store_true", help="print one JSON object (counts of rows) instead of the table")


def _assignment(text: str) -> tuple[str, str]:
    """Return a parameter's name and the text of its value."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not usable: give NAME=VALUE")
    return name, value


def _add_bench(bench: argparse.ArgumentParser) -> None:
    add = bench.add_argument
    add("--repeats", type=_whole(1, 100), metavar="N", help="how often each cell is measured, in turn (default: 5)")
    add("--seconds", type=_cell_seconds, metavar="S", help="seconds of each cell (default: 3)")
    add("--only", metavar="A,B", help=f"measure these and their floors only: {', '.join(GROUPS)}")
    add("--quick", action="store_true", help="2 repeats of short cells: shows that it works, proves nothing")
    add("--json", action="store_true", help="print the content of bench.json instead of the table")


def _add_burst_limits(limits: argparse.ArgumentParser) -> None:
    add = limits.add_argument
    endpoints = [str(endpoint) for endpoint in ENDPOINTS]
    add("--endpoint", choices=[*endpoints, "all"], default="all", help="where to send bursts (default: all)")
    add("--slo", type=Path, metavar="FILE", help="the SLOs to meet; default: data/slo.yaml of the checkout")
    add("--trials", type=_trials, default=20, metavar="N",
        help=f"bursts at each level (default: 20, at least {TRIALS_MIN}); levels of few requests get more, a level"
        " that is clear halfway gets no more")  # fmt: skip
    add("--max-burst", type=_whole(1, BURST_MAX), default=1024, metavar="N",
        help=f"largest burst to try, in requests (default: %(default)s, at most {BURST_MAX}: each has its own"
        " connection)")  # fmt: skip
    _add_target(limits)
    add("--json", action="store_true", help="print one JSON object (milliseconds) instead of the tables")


def _add_capacity(capacity: argparse.ArgumentParser) -> None:
    add = capacity.add_argument
    endpoints = [str(endpoint) for endpoint in ENDPOINTS]
    add("--endpoint", choices=[*endpoints, "all"], default="all", help="where to send requests (default: all)")
    add("--slo", type=Path, metavar="FILE", help="the SLOs to meet; default: data/slo.yaml of the checkout")
    add("--trials", type=_trials, default=20, metavar="N",
        help=f"windows at each rate (default: 20, at least {TRIALS_MIN}); low rates get more, a rate that is clear"
        " halfway gets no more")  # fmt: skip
    add("--window", type=_window, default=4.0, metavar="S",
        help="seconds of load that are judged in each, after a second that is not (default: 4)")  # fmt: skip
    add("--first-rate", type=_rate, default=10.0, metavar="R",
        help="where doubling begins, in requests per second (default: 10)")  # fmt: skip
    add("--max-rate", type=_rate, default=2000.0, metavar="R",
        help=f"highest rate to try, in requests per second (default: 2000, at most {RATE_MAX_PER_S:g})")  # fmt: skip
    add("--seed", type=_whole(0, 2**32 - 1), default=1, metavar="N", help="of the instants (default: 1)")
    _add_target(capacity)
    add("--json", action="store_true", help="print one JSON object (requests per second, ms) instead of the tables")


def _window(text: str) -> float:
    value = _seconds(text)
    if not WINDOW_MIN_S <= value <= WINDOW_MAX_S:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not usable: give seconds from {WINDOW_MIN_S:g} to {WINDOW_MAX_S:g}"
        )
    return value


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not RATE_UNIT_PER_S <= value <= RATE_MAX_PER_S or value != rate_per_s(level_of(value)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not usable: give requests per second from {RATE_UNIT_PER_S:g} to {RATE_MAX_PER_S:g}, in steps"
            f" of {RATE_UNIT_PER_S:g}"
        )
    return value


def _trials(text: str) -> int:
    value = _whole(1, TRIALS_MAX)(text)
    if value < TRIALS_MIN:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not usable: fewer than {TRIALS_MIN} trials a level prove nothing, give at least {TRIALS_MIN}"
        )
    return value


def _add_target(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--out", type=Path, metavar="DIR", help="folder in which the sample set is made (default: data/samples)")
    # The defaults of these two come from the environment and are not shown: one of them is a secret.
    add("--url", help="service to measure, http://host:port (or PLIMSOLL_URL; default: an embedded stack)")
    add("--token", help="installation token of that service (or PLIMSOLL_TOKEN)")


def _add_run(run: argparse.ArgumentParser) -> None:
    add_flags(run)
    _add_target(run)
    add = run.add_argument
    add("--gate", action="store_true", help="judge the samples at once and exit as `report` does")
    add("--baseline", type=Path, metavar="PATH", help=f"with --gate: {BASELINE_HELP}")
    add("--json", action="store_true", help="print one JSON object (milliseconds) instead of the table")


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
    arguments = _parser().parse_args(words)
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
