"""What the calibration of the capacity search measures, and the page that says it."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

import numpy as np

from harness.analysis.capacity import REQUESTS_MIN
from harness.machine import commit, versions
from tests.calibration.effort import SEED, Bar
from tests.calibration.rate_study import (
    LIMIT_WINDOWS,
    AtTheRate,
    RateResult,
    at_the_rate,
    by_observed_p95,
    search,
    worlds,
)
from tests.calibration.rate_world import REQUIREMENT, SPAN, TRUTH_WINDOWS, RateWorld

SEARCHES = 100
RIVALS = 20  # of these searches, made again by the rival
SEARCHES_EACH = 10  # of each row of the table by spread
REPEATS = 100  # of each rate at the limit
SPREADS = (0.02, 0.05, 0.1)
TRIALS = 20


@dataclasses.dataclass(frozen=True)
class RateMeasured:
    """Everything that the page shows."""

    ours: list[RateResult]
    rival: list[RateResult]
    by_spread: dict[tuple[float, int], list[RateResult]]
    at_limit: list[AtTheRate]

    @property
    def bars(self) -> list[Bar]:
        """Return what must hold, with what was found."""
        n = len(self.ours)
        held, over = (sum(getattr(one, name) for one in self.ours) for name in ("contains", "overclaimed"))
        passed, failed = (max(getattr(one, name) for one in self.at_limit) for name in ("false_pass", "false_fail"))
        return [
            Bar(f"the bracket contains the true capacity in {held} of {n} searches (at least 95 %)", held >= 0.95 * n),
            Bar(f"{over} of {n} searches claim too much (at most 5 %)", over <= 0.05 * n),
            # 2.5 % are claimed; of 100 repeats more than 7 are seen in fewer than 1 % of such studies.
            Bar(f"next to the limit, at most {passed:.1%} of rates pass wrongly", passed <= 7 / 100),
            Bar(f"next to the limit, at most {failed:.1%} of rates fail wrongly", failed <= 7 / 100),
        ]


def measure_rates() -> RateMeasured:
    """Carry everything out; some minutes, half of it counting the truth."""
    random = np.random.default_rng(SEED)
    drawn = list(worlds(random, SEARCHES, SPREADS))
    by_spread = {}
    for spread in (0.0, 0.2):
        some = list(worlds(random, SEARCHES_EACH, (spread,)))
        for trials in (10, 20):
            by_spread[spread, trials] = [search(world, random, trials) for world in some]
    levels = [
        at_the_rate(world, random, trials, REPEATS)
        for trials in (10, 20)
        for world in (
            RateWorld(1, 10.0, 1, 4.0, 0.0),
            RateWorld(2, 8.0, 2, 20.0, 0.1),
            RateWorld(4, 160.0, 4, 60.0, 0.05),
        )
    ]
    return RateMeasured(
        [search(world, random, TRIALS) for world in drawn],
        [by_observed_p95(world, random, TRIALS) for world in drawn[:RIVALS]],
        by_spread,
        levels,
    )


HEAD = "capacity in the bracket | claims too much | fails too early | no bracket | median width | windows"


def rate_page(measured: RateMeasured) -> str:
    """Return the whole page."""
    bars = "\n".join(f"- {bar.sentence}{'' if bar.met else ' **MISSED**'}" for bar in measured.bars)
    told = versions(["numpy", "scipy"])
    spreads = "\n".join(
        f"| {spread:g} | {trials} | {cells(results)} |" for (spread, trials), results in measured.by_spread.items()
    )
    return f"""# Evidence: how often a capacity is wrong

Written by `make calibrate` (`tests/calibration/`) at commit {commit() or "unknown"}; seed {SEED}, so the counts are the
same everywhere with the same libraries (numpy {told["numpy"]}, scipy {told["scipy"]}). A fast share of it is in
`make test`. What is tested and why is in [methodology.md](../methodology.md#capacity).

## What was shown

{bars}

## The worlds

Two queues in a row: requests come at Poisson instants to 1, 2 or 4 servers of one service time, in order (M/D/c, each
server a Lindley recursion), and each answered request becomes a run that waits for 1, 2 or 4 workers of one time. The
capacity of a stage is arithmetic: servers over service time. Capacities are drawn between 16 and 256 a second, evenly
over the octaves; either stage is the tighter one, by 1.3 to 3 times. Both times of a whole trial are longer or shorter
by a lognormal factor (the *spread*); in a third of the worlds 2 of 1,000 requests are refused. A trial starts from rest
and lasts {SPAN.lead_s:g} + {SPAN.window_s:g} s, and is seen by the command's own code: the same ladder, looks, checks.
Whether a rate truly meets the requirement ({REQUIREMENT.words})
is counted over {TRUTH_WINDOWS:,} windows of it.

## Searches with {TRIALS} trials a rate

{len(measured.ours)} worlds. *Width*: lowest failure over highest pass. *Windows*: of {SPAN.window_s:g} s, on average.
The rival, in {len(measured.rival)} of them, doubles and bisects to the same width, and lets a rate pass when its
observed p95 and errors do, as scripts do: it does not look at queues, and so takes a service that falls behind slowly
for one that keeps up.

| search | {HEAD} |
|---|---|---|---|---|---|---|
| ours | {cells(measured.ours)} |
| doubling and bisection by the observed p95 | {cells(measured.rival)} |

## By the spread between trials

{SEARCHES_EACH} worlds each. Where trials differ much, the bracket stays right and grows wide, or a side of it is
missing (exit code 3). At rates of a few requests a second more trials are made than asked for, until they hold
{REQUESTS_MIN:,} requests.

| spread | trials | {HEAD} |
|---|---|---|---|---|---|---|---|
{spreads}

## One rate, next to the limit

{REPEATS} repeats each, of the rates that just miss and just meet the requirement, 1 % apart, found by counting
{LIMIT_WINDOWS:,} windows of each rate that was tried. *Decides*: the check that is missed there. Both errors are
to stay at 2.5 %.

| servers, ms | workers, ms | spread | trials | rate | decides | false pass | false fail |
|---|---|---|---|---|---|---|---|
{chr(10).join(map(limit_row, measured.at_limit))}

## What it does not show

The windows are short. What happens once in a minute, such as a checkpoint of the database, is in some trials and not in
others, and is judged as the spread between them; what happens once in an hour is not seen at all. A soak is for that.
"""


def cells(results: Sequence[RateResult]) -> str:
    """Return a row's cells."""
    shares = [
        sum(each) / len(results)
        for each in (
            [one.contains for one in results],
            [one.overclaimed for one in results],
            [one.underclaimed for one in results],
            [not one.found for one in results],
        )
    ]
    width = statistics.median(one.width for one in results)
    told = " | ".join(f"{share:.1%}" for share in shares)
    return f"{told} | {width:.2f} | {statistics.fmean(one.windows for one in results):,.0f}"


def limit_row(one: AtTheRate) -> str:
    """Return a row of the table next to the limit."""
    world = one.world
    return (
        f"| {world.servers}, {world.service_ms:g} | {world.workers}, {world.run_ms:g} | {world.spread:g} | {one.trials}"
        f" | {one.above_per_s:.1f} | {one.decides} | {one.false_pass:.1%} | {one.false_fail:.1%} |"
    )
