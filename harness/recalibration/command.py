"""The flags of `python -m harness recalibrate`, and what they ask for.

What a search costs and how sure it is are its own flags (`burst-limits`, `capacity`); here both are chosen together.
How the proposal is then carried out is the service's plan: those flags are passed on as they are, and only when given.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import BadUsage
from harness.flags import seconds, whole
from harness.folders import find_in_checkout
from harness.sample import Endpoint
from harness.search import ENDPOINTS, TRIALS_MIN
from harness.slofile import SLO_FILE, read_slos

if TYPE_CHECKING:
    from harness.burst_limits import BurstPlan
    from harness.capacity import CapacityPlan

WAIT_MAX_S = 86_400.0


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long the searches take, and so how often they come to an answer; how often they are wrong stays the same."""

    trials: int
    max_burst: int
    window_s: float
    first_rate_per_s: float
    max_rate_per_s: float


FULL = Effort(trials=20, max_burst=1024, window_s=4.0, first_rate_per_s=10.0, max_rate_per_s=2000.0)
"""The defaults of the two searches: about an hour."""

QUICK = Effort(trials=TRIALS_MIN, max_burst=16, window_s=1.0, first_rate_per_s=160.0, max_rate_per_s=2560.0)
"""Some four minutes for each endpoint: the fewest and shortest trials that prove anything. More often without an
answer, and then nothing is changed."""


@dataclasses.dataclass(frozen=True)
class Wish:
    """What was asked for."""

    bursts: BurstPlan
    capacity: CapacityPlan
    slo_file: Path
    url: str | None  # what is measured; null: an embedded stack
    token: str | None = dataclasses.field(repr=False)
    same_service: bool  # measure the very service whose quotas are to change
    plan: tuple[str, ...]  # flags for the service: how the proposal is carried out
    machine_worth: str | None
    dry_run: bool
    wait_s: float | None  # how long to wait for its end; null: as the service's kind suggests

    def settings(self) -> dict[str, Any]:
        """Return what must be the same for steps that are done to count; no secret is among it."""
        return {"url": self.url, "bursts": self.bursts.parameters(), "capacity": self.capacity.parameters()}


def add_flags(command: argparse.ArgumentParser, trials: Callable[[str], int], rate: Callable[[str], float],
              window: Callable[[str], float]) -> None:  # fmt: skip
    """Add all flags; the arguments read what the searches' own flags read."""
    add = command.add_argument
    add("--dry-run", action="store_true", help="measure and report, and only say what the service would decide: nothing"
        " is written there")  # fmt: skip
    add("--url", help="staging service to measure, http://host:port (default: an embedded stack; PLIMSOLL_URL is not"
        " read)")  # fmt: skip
    add("--token", help="installation token of that service (or PLIMSOLL_TOKEN)")
    add("--same-service", action="store_true", help="measure although --url is the service whose quotas are to change")
    add("--quick", action="store_true", help=f"{QUICK.trials} trials of {QUICK.window_s:g} s, rates from"
        f" {QUICK.first_rate_per_s:g} to {QUICK.max_rate_per_s:g}/s: minutes instead of an hour, and more often no"
        " answer, which changes nothing; flags below override it")  # fmt: skip
    add("--endpoint", choices=[*(str(endpoint) for endpoint in ENDPOINTS), "all"], default="all",
        help="which rates to measure; the others are held (default: all)")  # fmt: skip
    add("--slo", type=Path, metavar="FILE", help="the SLOs to meet; default: data/slo.yaml of the checkout")
    add("--trials", type=trials, metavar="N", help=f"trials at each level (default: {FULL.trials})")
    add("--max-burst", type=whole(1, 4096), metavar="N",
        help=f"largest burst to try, in requests (default: {FULL.max_burst})")  # fmt: skip
    add("--window", type=window, metavar="S", help=f"seconds of each window of load (default: {FULL.window_s:g})")
    add("--first-rate", type=rate, metavar="R",
        help=f"where doubling begins, in requests per second (default: {FULL.first_rate_per_s:g})")  # fmt: skip
    add("--max-rate", type=rate, metavar="R",
        help=f"highest rate to try, in requests per second (default: {FULL.max_rate_per_s:g})")  # fmt: skip
    add("--seed", type=whole(0, 2**32 - 1), default=1, metavar="N", help="of the instants (default: 1)")
    add("--machine-worth", type=_factor, metavar="X", help="what rates measured on another machine than those in force"
        " are multiplied by (default: they are refused)")  # fmt: skip
    add("--unattended", action="store_true", help="let the service put it in force without a person")
    for phase in ("shadow", "canary", "watch"):
        add(f"--{phase}-minutes", type=_minutes, metavar="N", help="minutes of the phase, see `python -m service quotas"
            " recalibrate --help`")  # fmt: skip
    add("--canary-percent", type=whole(1, 100), metavar="N", help="percent of workspaces that are the canaries")
    add("--wait", type=seconds, metavar="S", help="seconds to wait for the end, or until a person is needed (default:"
        " 0; 300 when the embedded stack itself is recalibrated)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object")


def wish_of(given: argparse.Namespace) -> Wish:
    """Return what the flags ask for; raises BadUsage where they contradict each other."""
    from harness.burst_limits import BurstPlan  # both are slow to import
    from harness.burst_limits import requirements_of as burst_requirements
    from harness.capacity import CapacityPlan
    from harness.capacity import requirements_of as rate_requirements

    if given.url is None and given.token:
        raise BadUsage("--token needs --url: an embedded stack makes its own token")
    if given.url is None and given.same_service:
        raise BadUsage("--same-service needs --url: an embedded stack is nobody's service")
    if given.url is None and os.environ.get("PLIMSOLL_URL"):
        raise BadUsage("PLIMSOLL_URL is set, and recalibrate loads nothing that --url does not name: give --url, or"
                       " unset it to measure an embedded stack")  # fmt: skip
    slo_file = find_in_checkout(given.slo or SLO_FILE)
    slos = read_slos(slo_file)
    endpoints = ENDPOINTS if given.endpoint == "all" else (Endpoint(given.endpoint),)
    effort = QUICK if given.quick else FULL
    trials = given.trials or effort.trials
    first, most = given.first_rate or effort.first_rate_per_s, given.max_rate or effort.max_rate_per_s
    return Wish(
        BurstPlan(burst_requirements(slos, endpoints, slo_file), trials, given.max_burst or effort.max_burst),
        CapacityPlan(
            rate_requirements(slos, endpoints, slo_file), trials, given.window or effort.window_s, first, most,
            given.seed,
        ),
        slo_file,
        given.url,
        given.token or os.environ.get("PLIMSOLL_TOKEN"),
        given.same_service,
        _plan(given),
        given.machine_worth,
        given.dry_run,
        given.wait,
    )  # fmt: skip


def _plan(given: argparse.Namespace) -> tuple[str, ...]:
    """Return the flags of the service's plan that were given."""
    flags = ["--unattended"] if given.unattended else []
    for name in ("shadow_minutes", "canary_minutes", "watch_minutes", "canary_percent"):
        if (value := getattr(given, name)) is not None:
            flags += [f"--{name.replace('_', '-')}", f"{value:g}"]
    return tuple(flags)


def _factor(text: str) -> str:
    return _within(text, 0.001, 1_000, "a factor")


def _minutes(text: str) -> float:
    return float(_within(text, 0, 525_600, "minutes"))


def _within(text: str, least: float, most: float, what: str) -> str:
    """Return a number's text; raises ArgumentTypeError outside of these bounds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not usable: give {what} from {least:g} to {most:g}")
    return text
