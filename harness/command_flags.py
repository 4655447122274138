"""What the harness's commands may be asked for: flags, their units and their bounds.

Bad usage is one line and the exit code that the contract gives it. Flags that belong to one command alone and have
rules of their own are beside it (`run_command`, `latencies_command`). Next: `__main__`, which carries commands out.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NoReturn

from harness import latencies_command
from harness.bench import GROUPS
from harness.errors import ExitCode
from harness.flags import seconds as _seconds
from harness.flags import whole as _whole
from harness.importers.formats import EXPORTS, Format, Unit
from harness.recalibration import command as recalibrate_command
from harness.run_command import add_flags
from harness.sample import Endpoint
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


def parser_of_commands() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
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
