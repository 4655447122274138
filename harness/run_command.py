"""The flags of `python -m harness run`: which belong together, which contradict each other, and the plan they make.

`--mode` asks for a closed loop, `--arrivals` for an open one. A flag of the one is refused with the other instead of
being ignored: a load that is not the one asked for is worse than none.
"""

from __future__ import annotations

import argparse
from typing import Any

from harness.arrivals import RUNS_MAX, Arrivals, EmptyArrivals, Schedule
from harness.crew import Crew
from harness.errors import BadUsage
from harness.flags import SECONDS_MAX, above_zero, seconds, whole
from harness.generator import Plan
from harness.openloop import OpenPlan
from harness.sample import Mode
from harness.scenario import Habits
from harness.sender_process import LocalCrew

CHILDREN_MAX = 4  # the service's cap of pending subruns per parent
RATE_MAX = 50_000.0  # creates per second: more than any machine of today could be sent
WORKERS_MAX = 64
CONNECTIONS_MAX = 50_000
ARRIVALS_MAX = 20_000_000  # 160 MB of instants in each sending process
BURST_DEFAULT = 10
CLOSED_MODES = (Mode.SMOKE, Mode.BURST, Mode.SOAK)

_CLOSED_ONLY = {"runs": 5, "soak_interval": 0.0}  # and their defaults
_OPEN_ONLY = {"rate": None, "duration": None, "workers": 1, "connections": 256, "seed": 1}
_OPEN_ONLY |= {"dask": None, "dask_storage": None}


def add_flags(run: argparse.ArgumentParser) -> None:
    """Add all but where the load goes and how it is told."""
    add = run.add_argument
    add("--mode", choices=[str(mode) for mode in CLOSED_MODES],
        help="closed loop, smoke: at most --burst-size runs side by side; burst: groups of --burst-size started at one"
        " instant; soak: one run after another")  # fmt: skip
    add("--arrivals", choices=[str(kind) for kind in Arrivals],
        help="open loop instead: creates are sent on schedule whatever the replies, evenly (constant), as independent"
        " users come (poisson), or --burst-size at one instant (burst)")  # fmt: skip
    add("--rate", type=above_zero("creates per second", RATE_MAX), metavar="R",
        help="open loop: creates per second, on average")  # fmt: skip
    add("--duration", type=above_zero("seconds", SECONDS_MAX), metavar="S",
        help="open loop: seconds in which creates are due; what they began is waited for")  # fmt: skip
    add("--workers", type=whole(1, WORKERS_MAX), metavar="N",
        help=f"open loop: sending processes (default: {_OPEN_ONLY['workers']})")  # fmt: skip
    add("--dask", metavar="ADDRESS",
        help="open loop: send from the workers of this Dask cluster, tcp://host:port of its scheduler, one sender on"
        " each (--workers N: on so many of them)")  # fmt: skip
    add("--dask-storage", metavar="URL",
        help="with --dask: leave the samples in this folder that all machines reach, as fsspec names it (file:///shared,"
        " s3://bucket/x); default: they are sent here")  # fmt: skip
    add("--connections", type=whole(1, CONNECTIONS_MAX), metavar="N",
        help="open loop: connections of all senders together; a request that finds none free waits, and the wait is"
        f" in its latency (default: {_OPEN_ONLY['connections']})")  # fmt: skip
    add("--seed", type=whole(0, 2**32 - 1), metavar="N",
        help="open loop: seed of what is random in the schedule; the same seed gives the same instants"
        f" (default: {_OPEN_ONLY['seed']})")  # fmt: skip
    add("--runs", type=whole(1, RUNS_MAX), metavar="N",
        help=f"closed loop: parent runs in all (default: {_CLOSED_ONLY['runs']})")  # fmt: skip
    add("--children", type=whole(0, CHILDREN_MAX), default=1, metavar="N",
        help="subruns of each run (default: %(default)s)")  # fmt: skip
    add("--burst-size", type=whole(1, RUNS_MAX), metavar="N",
        help=f"runs live at once, or started at one instant (default: {BURST_DEFAULT})")  # fmt: skip
    add("--poll-interval", type=seconds, default=1.0, metavar="S",
        help="seconds from a poll's answer to the next poll (default: 1)")  # fmt: skip
    add("--poll-timeout", type=seconds, default=20.0, metavar="S",
        help="seconds of polling after which a run is given up and cancelled (default: 20)")  # fmt: skip
    add("--soak-interval", type=seconds, metavar="S",
        help="seconds from the end of a soak's run to the start of the next (default: 0)")  # fmt: skip


def plan_of(arguments: argparse.Namespace) -> Plan | OpenPlan:
    """Return the plan that the flags ask for; raises BadUsage where they contradict each other or lack one."""
    if arguments.arrivals is None:
        return _closed(arguments)
    return _open(arguments)


def _given(arguments: argparse.Namespace, flags: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}" for name in flags if getattr(arguments, name) is not None]


def _value(arguments: argparse.Namespace, name: str, flags: dict[str, Any]) -> Any:
    value = getattr(arguments, name)
    return flags[name] if value is None else value


def _closed(arguments: argparse.Namespace) -> Plan:
    if arguments.mode is None:
        raise BadUsage("give --mode smoke, burst or soak for a closed loop, or --arrivals with --rate and --duration")
    if foreign := _given(arguments, _OPEN_ONLY):
        raise BadUsage(f"{foreign[0]} belongs to an open loop and needs --arrivals; --mode {arguments.mode} has none")
    if arguments.mode != Mode.SOAK and arguments.soak_interval:
        raise BadUsage(f"--soak-interval belongs to --mode soak; --mode {arguments.mode} does not wait between runs")
    return Plan(
        mode=Mode(arguments.mode),
        runs=_value(arguments, "runs", _CLOSED_ONLY),
        children=arguments.children,
        burst_size=arguments.burst_size or BURST_DEFAULT,
        poll_interval_s=arguments.poll_interval,
        poll_timeout_s=arguments.poll_timeout,
        soak_interval_s=_value(arguments, "soak_interval", _CLOSED_ONLY),
    )


def _open(arguments: argparse.Namespace) -> OpenPlan:
    kind = Arrivals(arguments.arrivals)
    if arguments.mode not in {None, Mode.SMOKE}:
        raise BadUsage(
            f"--mode {arguments.mode} and --arrivals contradict each other: the one waits for its own runs, the other"
            " for nothing; leave one out"
        )
    if foreign := _given(arguments, _CLOSED_ONLY):
        raise BadUsage(f"{foreign[0]} and --arrivals contradict each other: --rate and --duration say how many come")
    if arguments.burst_size is not None and kind is not Arrivals.BURST:
        raise BadUsage(f"--burst-size and --arrivals {kind} contradict each other: only --arrivals burst has bursts")
    for name in ("rate", "duration"):
        if getattr(arguments, name) is None:
            raise BadUsage(f"--arrivals {kind} needs --{name}")
    if arguments.dask_storage is not None and arguments.dask is None:
        raise BadUsage("--dask-storage needs --dask: senders of this machine write where --out says")
    connections = _value(arguments, "connections", _OPEN_ONLY)
    if arguments.rate * arguments.duration > ARRIVALS_MAX:
        raise BadUsage(f"--rate times --duration is more than {ARRIVALS_MAX:,} arrivals: give less of one")
    schedule = Schedule(
        kind=kind,
        rate_per_s=arguments.rate,
        duration_s=arguments.duration,
        seed=_value(arguments, "seed", _OPEN_ONLY),
        burst_size=(arguments.burst_size or BURST_DEFAULT) if kind is Arrivals.BURST else 1,
    )
    try:
        schedule.offsets_ns()
    except EmptyArrivals as fault:
        raise BadUsage(f"--rate and --duration: {fault}") from None
    habits = Habits(arguments.children, arguments.poll_interval, arguments.poll_timeout)
    workers, crew = _crew(arguments)  # last: it asks the cluster, and all else can be refused before
    if connections < workers:
        raise BadUsage(f"--connections {connections} is fewer than --workers {workers}: each sender needs one")
    return OpenPlan(schedule, workers, connections, habits, crew=crew)


def _crew(arguments: argparse.Namespace) -> tuple[int, Crew]:
    """Return how many send, and where; raises BadUsage, or another HarnessError of a cluster that cannot."""
    if arguments.dask is None:
        if arguments.dask_storage is not None:
            raise BadUsage("--dask-storage needs --dask: senders of this machine write where --out says")
        return _value(arguments, "workers", _OPEN_ONLY), LocalCrew()
    from harness.cluster import ClusterCrew, survey

    cluster = survey(arguments.dask, arguments.workers, arguments.dask_storage)
    return len(cluster.workers), ClusterCrew(cluster)
