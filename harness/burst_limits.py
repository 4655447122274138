"""Searches for the burst limit of each endpoint: level after level, trial after trial, until `search` says it is over.

It decides on what it just measured, and the answer is read again from the recorded rows, so that whoever has the sample
set comes to the same one. How a trial is made is in `trials`, what trials prove in `analysis/bursts`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.analysis.brackets import limits_of
from harness.analysis.bursts import Requirement, judge, looks, trials_at
from harness.analysis.slo import Measure, Op, Slo, Status, percent, plural
from harness.api import Api
from harness.beside import Beside
from harness.client import REQUEST_TIMEOUT_S, Client
from harness.errors import BadUsage, ExitCode, HarnessError
from harness.recorder import Recorder
from harness.resources import Resources
from harness.sample import Endpoint, Mode
from harness.search import burst_ladder, consider
from harness.trials import Trials

SLOW_SHARE = 0.05  # of a p95, by which burst limits are judged unless the SLO file says otherwise
WARM_UP_TRIALS = 3  # of the first level, not recorded: the first bursts of a process fill its caches
CLEAN_UP_S = 5.0  # what cancelling may take after an interruption


def requirements_of(slos: Sequence[Slo], endpoints: Sequence[Endpoint], file: Path) -> tuple[Requirement, ...]:
    """Return what bursts at each endpoint must meet; raises BadUsage when the file has no latency SLO for one."""
    return latency_requirements(slos, endpoints, file, Mode.BURST_LIMITS)


def latency_requirements(
    slos: Sequence[Slo], endpoints: Sequence[Endpoint], file: Path, mode: Mode
) -> tuple[Requirement, ...]:
    """Return the latency that a search must meet; raises BadUsage when the file has no latency SLO for an endpoint.

    An SLO whose modes include `mode` is taken as it is; without one, the strictest target of the endpoint's other
    latency SLOs is, as a p95. A mean SLO for the mode is a p95 too: a mean hides the tail.
    """
    found = []
    for endpoint in endpoints:
        own = [slo for slo in slos if slo.measure is Measure.LATENCY and slo.endpoint is endpoint]
        if not own:
            raise BadUsage(f"{file} has no latency SLO for {endpoint}: add one, or leave the endpoint out (--endpoint)")
        meant = [slo for slo in own if mode in slo.modes]
        slo = min(meant or own, key=lambda slo: slo.limit)
        share = round(1.0 - slo.statistic.q, 9) if meant and slo.statistic.q is not None else SLOW_SHARE
        found.append(Requirement(endpoint, Op(slo.op), slo.limit, share))
    return tuple(found)


class SearchTally:
    """How far the search is."""

    def __init__(self) -> None:
        self.runs = 1  # most trials of the level at hand
        self.ended = 0
        self.milestone = 0  # levels judged
        self._at, self._before = "warming up", ""

    def begin(self, endpoint: Endpoint, level: int, trials: int) -> None:
        """Note that a level is begun."""
        self.runs, self.ended, self._at = trials, 0, f"{endpoint} {level}"

    def end_trial(self) -> None:
        """Note that a trial is over."""
        self.ended += 1

    def end_level(self, status: Status, share: float, upper: float) -> None:
        """Note what a level came to."""
        self.milestone += 1
        bounded = f"{percent(share)} slow, at most {percent(upper)}"
        self._before = f"; before: {self._at} {status} after {plural(self.ended, 'trials')}, {bounded}"

    def line(self) -> str:
        """Tell it in one plain line."""
        return f"{self._at}: {self.ended} of at most {plural(self.runs, 'trials')}{self._before}"


@dataclasses.dataclass(frozen=True, slots=True)
class BurstPlan:
    """What was asked for on the command line."""

    requirements: tuple[Requirement, ...]
    trials: int
    max_burst: int
    mode: Mode = Mode.BURST_LIMITS
    scenario: str = "burst"

    @property
    def connections(self) -> int:
        """Return how many connections may be open at once."""
        return self.max_burst

    @property
    def connections_flag(self) -> str:
        """Return the flag that makes them fewer."""
        return "--max-burst"

    def parameters(self) -> dict[str, Any]:
        """Return the plan as the manifest keeps it."""
        return {
            "requirements": [dataclasses.asdict(requirement) for requirement in self.requirements],
            "trials": self.trials,
            "max_burst": self.max_burst,
            "warm_up_trials": WARM_UP_TRIALS,
            "request_timeout_s": REQUEST_TIMEOUT_S,
        }

    def load(
        self, client: Client, api: Api, recorder: Recorder, resources: Resources, check: Callable[[], None]
    ) -> BurstLimits:
        """Return what carries this plan out."""
        return BurstLimits(self, client, api, recorder, resources, check)


class BurstLimits:
    """One search for each endpoint, one after another."""

    def __init__(
        self,
        plan: BurstPlan,
        client: Client,
        api: Api,
        recorder: Recorder,
        resources: Resources,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`check` is called every second and may raise a HarnessError that ends the search."""
        self.tally = SearchTally()
        self._plan = plan
        self._name = f"harness-{recorder.path.name}"
        self._beside = Beside(recorder, resources, check, lambda rows: None)
        numbers = itertools.count(1)
        self._trials = [
            Trials(requirement.endpoint, client, api, recorder, numbers, self._beside.look)
            for requirement in plan.requirements
        ]

    async def prepare(self) -> None:
        """Make the workspaces, before anything is measured; raises ServiceUnreachable or ServiceDeclined."""
        for trials in self._trials:
            await trials.prepare(f"{self._name}-{trials.endpoint}")

    async def carry_out(self) -> None:
        """Search. Raises HarnessError when recording, `check` or the preparation of a trial fails."""
        await self._beside.carry(self._search(), self._clean_up)

    async def _search(self) -> None:
        for requirement, trials in zip(self._plan.requirements, self._trials, strict=True):
            ladder, tried = burst_ladder(self._plan.max_burst), dict[int, Status]()
            for _ in range(WARM_UP_TRIALS):
                await trials.perform(ladder.first, 0, record=False)
            while (level := consider(ladder, tried).next_level) is not None:
                tried[level] = await self._level(requirement, trials, level)

    async def _level(self, requirement: Requirement, trials: Trials, level: int) -> Status:
        """Make the trials of one level until a look settles it."""
        planned = trials_at(level, self._plan.trials)
        self.tally.begin(requirement.endpoint, level, planned)
        latency = np.empty((0, level))
        for look in looks(planned):
            while len(latency) < look.trials:
                latency = np.vstack([latency, await trials.perform(level, len(latency))])
                self.tally.end_trial()
            verdict = judge(latency, requirement, self._plan.trials)
            if verdict.status is not Status.INCONCLUSIVE:
                break
        self.tally.end_level(verdict.status, verdict.share, verdict.upper)
        return verdict.status

    async def _clean_up(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLEAN_UP_S):
                await asyncio.gather(*(trials.clean_up() for trials in self._trials))


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What the recorded rows come to."""

    samples: str  # the set's folder
    trials: int
    endpoints: dict[str, dict[str, Any]]  # highest_pass, lowest_fail, requirement, levels

    @property
    def exit_code(self) -> ExitCode:
        """Return 0 when every limit is held from both sides, else 3."""
        found = all(None not in (one["highest_pass"], one["lowest_fail"]) for one in self.endpoints.values())
        return ExitCode.PASSED if found else ExitCode.INCONCLUSIVE

    def lines(self) -> list[str]:
        """Return a table for each endpoint, and its answer in words."""
        told = []
        for name, one in self.endpoints.items():
            told += ["", f"{name}: {one['requirement']}, counted from the instant of the burst", HEAD]
            told += [_line(level) for level in one["levels"]]
            told.append(_words(name, one["highest_pass"], one["lowest_fail"]))
        return told


HEAD = (
    f"{'burst':>6}  {'verdict':<13}{'trials':>6}{'requests':>9}{'failed':>7}{'slow':>8}{'at most':>9}"
    f"{'p95 ms':>9}{'queue':>7}{'more':>6}"
)


def read_limits(path: Path, plan: BurstPlan, slo_file: Path) -> Limits:
    """Read the answer from a recorded set; raises HarnessError when the measurement cannot be trusted."""
    from harness.evaluation import load

    evaluation = load([path], slo_file)
    if evaluation.findings:
        raise HarnessError(f"{path}: the measurement is not valid: {evaluation.findings[0].detail}")
    endpoints = {
        limit.requirement.endpoint.value: {
            "highest_pass": limit.highest_pass,
            "lowest_fail": limit.lowest_fail,
            "requirement": limit.requirement.words,
            "levels": [
                {str(name): None if pd.isna(value) else value for name, value in row.items() if name != "endpoint"}
                for row in limit.levels.to_dict("records")
            ],
        }
        for limit in limits_of(evaluation.data)
    }
    return Limits(str(path), plan.trials, endpoints)


def _line(level: dict[str, Any]) -> str:
    def number(name: str, form: str, width: int) -> str:
        value = level[name]
        return f"{'-' if value is None else format(value, form):>{width}}"

    return (
        f"{level['level']:>6}  {level['verdict']:<13}{level['trials']:>6}{level['requests']:>9}{level['failed']:>7}"
        f"{level['slow_share']:>8.1%}{level['slow_share_upper']:>9.1%}{number('latency_ms_p95', '.1f', 9)}"
        f"{number('queue_depth_max', '.0f', 7)}{number('more_trials', 'd', 6)}"
    )


def _words(name: str, passed: int | None, failed: int | None) -> str:
    up_to = f"bursts of {passed} meet it" if passed else "no burst was shown to meet it"
    if failed is None:
        return f"{name}: {up_to}; none was shown to miss it (more --trials or a higher --max-burst may)"
    return f"{name}: {up_to}, bursts of {failed} do not" + ("" if passed else " (more --trials may show one)")
