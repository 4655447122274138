"""Searches for the capacity of each endpoint: rate after rate, window after window, until the bracket is closed.

The load is open loop and Poisson, its instants drawn from the plan's seed. The search decides on what it just measured,
and the answer is read again from the recorded rows (`analysis/ratesets`), so that whoever has the sample set comes to
the same one. How a window is made is in `windows`, what windows prove in `analysis/capacity`.
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

from harness.analysis.bursts import looks
from harness.analysis.capacity import (
    FAILED_SHARE,
    LATE_MS,
    LATE_SHARE,
    RateRequirement,
    RateVerdict,
    Span,
    Window,
    judge_rate,
    rate_trials,
)
from harness.analysis.ratesets import INVALID, Capacity, because, bracket_of, capacities
from harness.analysis.slo import Measure, Slo, Statistic, Status, number, percent, plural
from harness.api import Api
from harness.arrivals import Seconds, poisson
from harness.beside import Beside
from harness.burst_limits import CLEAN_UP_S, latency_requirements
from harness.client import REQUEST_TIMEOUT_S, Client
from harness.errors import BadUsage, ExitCode, HarnessError
from harness.recorder import Recorder
from harness.resources import Resources
from harness.sample import Endpoint, Mode, ResourceSample
from harness.search import BURST_MAX, capacity_ladder, rate_per_s
from harness.windows import Windows

LEAD_S = 1.0
"""Load before a window: several times what the service holds of one request at its slowest target (375 ms)."""

WARM_UP_TRIALS = 3  # at the first rate, not recorded: a process fills its caches
REQUESTS_EXPECTED_MIN = 2.0  # in a window at the lowest rate that may be tried
CONNECTIONS_MIN = 64


def requirements_of(slos: Sequence[Slo], endpoints: Sequence[Endpoint], file: Path) -> tuple[RateRequirement, ...]:
    """Return what rates at each endpoint must meet; raises BadUsage when the file has no latency SLO for one.

    Latency as for bursts. The errors allowed are those of the file's strictest error share, of mode capacity if one is;
    without any, FAILED_SHARE.
    """
    shares = [slo for slo in slos if slo.measure is Measure.RESPONSES and slo.statistic is Statistic.ERROR_SHARE]
    meant = [slo for slo in shares if Mode.CAPACITY in slo.modes] or shares
    failed = min((slo.limit for slo in meant), default=FAILED_SHARE)
    latency = latency_requirements(slos, endpoints, file, Mode.CAPACITY)
    return tuple(RateRequirement(one, failed) for one in latency)


@dataclasses.dataclass(frozen=True, slots=True)
class CapacityPlan:
    """What was asked for on the command line."""

    requirements: tuple[RateRequirement, ...]
    trials: int
    window_s: float
    first_rate_per_s: float
    max_rate_per_s: float
    seed: int
    mode: Mode = Mode.CAPACITY
    scenario: str = "rate"

    def __post_init__(self) -> None:
        """Refuse what contradicts itself; raises BadUsage."""
        if self.first_rate_per_s > self.max_rate_per_s:
            first, most = number(self.first_rate_per_s), number(self.max_rate_per_s)
            raise BadUsage(f"--first-rate {first} is above --max-rate {most}: give a lower first or a higher maximum")
        lowest = rate_per_s(capacity_ladder(self.first_rate_per_s, self.max_rate_per_s).lowest)
        if lowest * self.window_s < REQUESTS_EXPECTED_MIN:
            raise BadUsage(
                f"--window {number(self.window_s)} holds fewer than {REQUESTS_EXPECTED_MIN:g} requests at the lowest"
                f" rate of this search, {number(lowest)}/s: give a longer one, or a higher --first-rate"
            )
        if self._by_little > BURST_MAX:
            raise BadUsage(
                f"--max-rate {number(self.max_rate_per_s)} with a target of {number(self._slowest_ms)} ms needs"
                f" {self._by_little:,} connections, {BURST_MAX:,} is the most: give a lower rate, or a stricter SLO"
            )

    @property
    def _slowest_ms(self) -> float:
        return max(one.latency.limit_ms for one in self.requirements)

    @property
    def _by_little(self) -> int:
        """Return twice the requests under way when each takes as long as the slowest target (L = lambda * W)."""
        return int(np.ceil(2.0 * self.max_rate_per_s * self._slowest_ms / 1e3))

    @property
    def connections(self) -> int:
        """Return how many connections may be open at once."""
        return max(CONNECTIONS_MIN, self._by_little)

    @property
    def connections_flag(self) -> str:
        """Return the flag that makes them fewer."""
        return "--max-rate"

    @property
    def span(self) -> Span:
        """Return how long each trial is."""
        return Span(LEAD_S, self.window_s)

    def arrivals(self, endpoint: Endpoint, level: int, trial: int) -> Seconds:
        """Return when requests of one trial are due, in seconds from the first: the same for the same plan."""
        place = list(Endpoint).index(endpoint)
        seed = np.random.SeedSequence([self.seed, place, level, trial]).generate_state(1)[0]
        # The first one begins the trial; what follows a point of a Poisson process is one.
        return np.concatenate([[0.0], poisson(rate_per_s(level), self.span.whole_s, int(seed))])

    def parameters(self) -> dict[str, Any]:
        """Return the plan as the manifest keeps it."""
        return {
            "requirements": [dataclasses.asdict(requirement) for requirement in self.requirements],
            "trials": self.trials,
            "window_s": self.window_s,
            "lead_s": LEAD_S,
            "first_rate_per_s": self.first_rate_per_s,
            "max_rate_per_s": self.max_rate_per_s,
            "connections": self.connections,
            "seed": self.seed,
            "warm_up_trials": WARM_UP_TRIALS,
            "request_timeout_s": REQUEST_TIMEOUT_S,
        }

    def load(
        self, client: Client, api: Api, recorder: Recorder, resources: Resources, check: Callable[[], None]
    ) -> CapacitySearch:
        """Return what carries this plan out."""
        return CapacitySearch(self, client, api, recorder, resources, check)


class CapacityTally:
    """How far the search is."""

    def __init__(self) -> None:
        self.runs = 1  # most trials of the level at hand
        self.ended = 0
        self.milestone = 0  # levels judged
        self._at, self._before = "warming up", ""

    def begin(self, endpoint: Endpoint, rate: float, trials: int) -> None:
        """Note that a level is begun."""
        self.runs, self.ended, self._at = trials, 0, f"{endpoint} {number(rate)}/s"

    def end_trial(self) -> None:
        """Note that a trial is over."""
        self.ended += 1

    def end_level(self, verdict: RateVerdict, requirement: RateRequirement) -> None:
        """Note what a level came to."""
        self.milestone += 1
        told = because(verdict, requirement)
        status = INVALID if verdict.invalid else verdict.status
        self._before = f"; before: {self._at} {status} after {plural(verdict.trials, 'trials')}"
        self._before += f" ({told})" if told else ""

    def line(self) -> str:
        """Tell it in one plain line."""
        return f"{self._at}: {self.ended} of at most {plural(self.runs, 'trials')}{self._before}"


class CapacitySearch:
    """One search for each endpoint, one after another."""

    def __init__(
        self,
        plan: CapacityPlan,
        client: Client,
        api: Api,
        recorder: Recorder,
        resources: Resources,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`check` is called every second and may raise a HarnessError that ends the search."""
        self.tally = CapacityTally()
        self._plan = plan
        self._name = f"harness-{recorder.path.name}"
        self._beside = Beside(recorder, resources, check, lambda rows: None)
        self._looks: list[ResourceSample] = []
        recorder.on_look = self._looks.append
        numbers = itertools.count(1)
        self._windows = [
            Windows(
                one.latency.endpoint, client, api, recorder, numbers, self._beside.look, plan.connections, plan.span
            )
            for one in plan.requirements
        ]

    async def prepare(self) -> None:
        """Make the workspaces, before anything is measured; raises ServiceUnreachable or ServiceDeclined."""
        for windows in self._windows:
            await windows.prepare(f"{self._name}-{windows.endpoint}")

    async def carry_out(self) -> None:
        """Search. Raises HarnessError when recording, `check` or the preparation of a trial fails."""
        await self._beside.carry(self._search(), self._clean_up)

    async def _search(self) -> None:
        plan = self._plan
        ladder = capacity_ladder(plan.first_rate_per_s, plan.max_rate_per_s)
        for requirement, windows in zip(plan.requirements, self._windows, strict=True):
            tried = dict[int, RateVerdict]()
            for trial in range(WARM_UP_TRIALS):
                await self._window(windows, ladder.first, trial, record=False)
            while (level := bracket_of(ladder, tried).next_level) is not None:
                tried[level] = await self._level(requirement, windows, level)

    async def _level(self, requirement: RateRequirement, windows: Windows, level: int) -> RateVerdict:
        """Make the trials of one level until a look settles it."""
        plan, rate = self._plan, rate_per_s(level)
        planned = rate_trials(rate, plan.window_s, plan.trials)
        self.tally.begin(windows.endpoint, rate, planned)
        seen: list[Window] = []
        for look in looks(planned):
            while len(seen) < look.trials:
                seen.append(await self._window(windows, level, len(seen), record=True))
                self.tally.end_trial()
            verdict = judge_rate(seen, requirement, rate, plan.window_s, plan.trials)
            if verdict.invalid or verdict.status is not Status.INCONCLUSIVE:
                break
        self.tally.end_level(verdict, requirement)
        return verdict

    async def _window(self, windows: Windows, level: int, trial: int, *, record: bool) -> Window:
        self._looks.clear()
        after_s = self._plan.arrivals(windows.endpoint, level, trial)
        return await windows.perform_window(rate_per_s(level), trial, after_s, self._looks, record=record)

    async def _clean_up(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLEAN_UP_S):
                await asyncio.gather(*(windows.clean_up() for windows in self._windows))


@dataclasses.dataclass(frozen=True, slots=True)
class CapacityAnswer:
    """What the recorded rows come to."""

    samples: str  # the set's folder
    trials: int
    window_s: float
    endpoints: dict[str, dict[str, Any]]  # highest_pass, lowest_fail, stable, invalid_from, requirement, levels

    @property
    def exit_code(self) -> ExitCode:
        """Return 0 when every capacity is held from both sides; 2 when the generator is why one is not; else 3."""
        missing = [one for one in self.endpoints.values() if None in (one["highest_pass"], one["lowest_fail"])]
        if any(one["invalid_from"] is not None for one in missing):
            return ExitCode.INVALID
        return ExitCode.INCONCLUSIVE if missing else ExitCode.PASSED

    def lines(self) -> list[str]:
        """Return a table for each endpoint, and its answer in words."""
        told = []
        for name, one in self.endpoints.items():
            told += ["", f"{name}: {one['requirement']}", HEAD]
            told += [_line(level) for level in one["levels"]]
            told.append(_words(name, one))
        return told


def read_capacity(path: Path, slo_file: Path) -> CapacityAnswer:
    """Read the answer from a recorded set; raises HarnessError when the measurement cannot be trusted."""
    from harness.evaluation import load

    evaluation = load([path], slo_file)
    if evaluation.findings:
        raise HarnessError(f"{path}: the measurement is not valid: {evaluation.findings[0].detail}")
    manifest = evaluation.data.manifests[0]
    found = {one.requirement.latency.endpoint.value: _told(one) for one in capacities(evaluation.data)}
    return CapacityAnswer(str(path), manifest.parameters["trials"], manifest.parameters["window_s"], found)


def _told(one: Capacity) -> dict[str, Any]:
    return {
        "highest_pass": one.highest_pass_per_s,
        "lowest_fail": one.lowest_fail_per_s,
        "stable": None if one.stable is None else dataclasses.asdict(one.stable),
        "invalid_from": one.invalid_from_per_s,
        "requirement": one.requirement.words,
        "levels": list(one.levels),
    }


HEAD = (
    f"{'rate/s':>8}  {'verdict':<13}{'trials':>6}{'requests':>9}{'failed':>7}{'slow':>8}{'at most':>8}{'p95 ms':>9}"
    f"{'growth':>8}{'at most':>8}{'queue':>7}{'oldest s':>9}{'late':>7}{'more':>6}"
)


def _line(level: dict[str, Any]) -> str:
    def told(value: float | None, form: str, width: int) -> str:
        return f"{'-' if value is None else format(value, form):>{width}}"

    def worst(names: Sequence[str]) -> float | None:
        return max((level[name] for name in names if level[name] is not None), default=None)

    growth = [f"{name}_growth" for name in ("under_way", "depth", "age")]
    return (
        f"{level['rate_per_s']:>8g}  {level['verdict']:<13}{level['trials']:>6}{level['requests']:>9}"
        f"{level['failed']:>7}{told(level['slow_share'], '.1%', 8)}{told(level['slow_share_upper'], '.1%', 8)}"
        f"{told(level['latency_ms_p95'], '.1f', 9)}{told(worst(growth), '.1%', 8)}"
        f"{told(worst([f'{name}_upper' for name in growth]), '.1%', 8)}{told(level['queue_depth_max'], '.0f', 7)}"
        f"{told(level['oldest_due_tick_s_max'], '.2f', 9)}{told(level['sent_late_share'], '.1%', 7)}"
        f"{told(level['more_trials'], 'd', 6)}  {level['because']}"
    ).rstrip()


def _words(name: str, one: dict[str, Any]) -> str:
    passed, failed, invalid, stable = (one[key] for key in ("highest_pass", "lowest_fail", "invalid_from", "stable"))
    told = f"{name}: {number(passed)}/s is sustained" if passed else f"{name}: no rate was shown to be sustained"
    if stable is not None:
        told += f" ({number(stable['served_per_s'])}/s answered, at least {number(stable['served_per_s_lower'])}/s)"
    if failed is not None:
        return f"{told}, {number(failed)}/s is not" + ("" if passed else " (a lower --first-rate may show one)")
    if invalid is not None:
        late = f"more than {percent(LATE_SHARE)} of requests left over {number(LATE_MS)} ms late"
        return f"{told}; from {number(invalid)}/s the generator could not keep up ({late}), so no limit was found"
    return f"{told}; none was shown not to be (more --trials or a higher --max-rate may)"
