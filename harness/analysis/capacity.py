"""What windows of sustained load at one rate prove: rows in, verdicts out.

A rate is sustained when four things hold together, each over many windows: at most a share of the requests is slow, at
most a share fails, and neither the requests under way nor the runs that are due grow by more than a share of what
arrives. The last two are the same question asked on both sides of the service's door, and they are what a latency in a
short window cannot answer: a service that falls behind by 5 % is 0.2 s late after 4 s, and 20 s late after 400.

All growth is told as a share of the arrivals. A queue that is served at the share 1 - g of its arrivals grows by g for
each arrival (fluid limit), and its oldest entry, served in order, gets g seconds older with each second. So one limit,
`GROWTH_SHARE`, is for the requests under way, the depth of the queue and the age of its oldest run alike.

The **trial** is the unit, as with bursts, and the same bounds are used (`bursts`). The first seconds of a trial fill
the pipeline of a service at rest; they are load, and are not judged. Next: `ratesets` reads recorded rows into windows.
How often all this is wrong: `make calibrate`.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from harness.analysis.bursts import (
    ALPHA,
    MORE_TRIALS_MAX,
    Look,
    Requirement,
    bounds_of_share,
    looks,
    tolerance_factor,
)
from harness.analysis.dependence import Bools, Floats, Ints
from harness.analysis.quantiles import binomial_bounds, quantile, smallest
from harness.analysis.slo import Status
from harness.search import TRIALS_MIN, together

GROWTH_SHARE = 0.05
"""What a queue may grow by, as a share of the arrivals. No finite window shows a growth of exactly zero; a twentieth is
a third of the narrowest step of a search (14 %), so it moves the limit by less than the search can tell."""

FAILED_SHARE = 0.01
"""Of requests that may fail, where no SLO says otherwise: that of the burst plan."""

SKEWED_SHARE = 0.25
"""Of the error of a PASS, at which latency and growth are bounded. Near its limit a service is overloaded in few
windows and badly; where none of those was seen, the mean and its spread are both too small. At their full 2.5 % the
bounds let 4.3 % of such rates pass; at a quarter, with the skew that was seen, 1.5 %, and 4 % in the worst world of
`tests/calibration`."""

LOOK_LATE_SHARE = 0.05
"""Of a window's length, by which the last look at the queue may come after its end. Later ones see it drain."""

LATE_MS = 50.0
LATE_SHARE = 0.01
"""A level is invalid when more than this share of its requests left more than so long after they were due."""

REQUESTS_MIN = 1_200
"""Requests that a rate's trials hold at least: of fewer, two failures in a thousand seldom prove that at most one in a
hundred fails, and the climb would end there. A flawless rate is judged at half of them."""

NS = 1e9


class Check(enum.StrEnum):
    """What is asked of every rate."""

    LATENCY = "latency"  # the share of requests that miss the latency target
    ERRORS = "errors"  # the share of requests without a good answer
    UNDER_WAY = "under_way"  # growth of the requests due and not answered, per arrival
    DEPTH = "depth"  # growth of the runs due and not claimed, per arrival
    AGE = "age"  # seconds by which the oldest due run gets older, per second


GROWTH = (Check.UNDER_WAY, Check.DEPTH, Check.AGE)


@dataclasses.dataclass(frozen=True, slots=True)
class RateRequirement:
    """What a rate must meet."""

    latency: Requirement
    failed_share: float = FAILED_SHARE
    growth_share: float = GROWTH_SHARE

    @property
    def words(self) -> str:
        """Return it in short."""
        return f"{self.latency.words}, errors <= {self.failed_share:.3g}, queues grow <= {self.growth_share:.3g}"

    def limit(self, check: Check) -> float:
        """Return the share that a check allows."""
        shares = {Check.LATENCY: self.latency.slow_share, Check.ERRORS: self.failed_share}
        return shares.get(check, self.growth_share)


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """How long a trial is, in seconds."""

    lead_s: float  # fills the pipeline, not judged
    window_s: float  # judged

    @property
    def whole_s(self) -> float:
        """Return for how long requests are due."""
        return self.lead_s + self.window_s


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """Looks at the service's queue, in order of time."""

    at_ns: Ints
    depth: Floats  # nan where it was not told
    age_s: Floats


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """What one trial shows."""

    latency: Floats  # (n_requests,) ms from the intended moment, failures as infinity; of those due in the window
    growth: dict[Check, float]  # by check of GROWTH; nan where it was not told
    depth_max: float  # most runs seen due in the window; nan where it was not told
    age_s_max: float
    served_per_s: float  # good answers within the window
    sent: int  # of the whole trial, lead included
    late: int  # of these, left more than LATE_MS after they were due
    lag_ms_max: float


def observe(intended_at_ns: Ints, sent_at_ns: Ints, done_at_ns: Ints, ok: Bools, seen: Seen, span: Span,
            rate_per_s: float) -> Window:  # fmt: skip
    """Return what one trial shows; arrays (n_requests,) of all its requests, -1 where an instant is unknown.

    The trial begins with its first request. Only looks within the window count for growth: after it nothing arrives.
    """
    begin = int(intended_at_ns.min()) + round(span.lead_s * NS)
    end = begin + round(span.window_s * NS)
    counted = intended_at_ns >= begin
    latency = np.where(ok, (done_at_ns - intended_at_ns) / 1e6, np.inf)[counted]

    def under_way(at_ns: int) -> int:
        return int(((intended_at_ns <= at_ns) & (done_at_ns > at_ns)).sum())

    arrivals = rate_per_s * span.window_s
    growth = {Check.UNDER_WAY: (under_way(end) - under_way(begin)) / arrivals}
    within = (seen.at_ns >= begin) & (seen.at_ns <= end + round(LOOK_LATE_SHARE * span.window_s * NS))
    growth |= _growth_of_queue(Seen(seen.at_ns[within], seen.depth[within], seen.age_s[within]), span, rate_per_s)
    lag_ms = (sent_at_ns - intended_at_ns)[sent_at_ns >= 0] / 1e6
    served = int((ok & (done_at_ns > begin) & (done_at_ns <= end)).sum())
    return Window(
        latency,
        growth,
        _largest(seen.depth[within]),
        _largest(seen.age_s[within]),
        served / span.window_s,
        len(lag_ms),
        int((lag_ms > LATE_MS).sum()),
        _largest(lag_ms),
    )


def _growth_of_queue(seen: Seen, span: Span, rate_per_s: float) -> dict[Check, float]:
    """Return growth from the first to the last look that told; nan when they are less than half a window apart."""
    told = np.flatnonzero(~np.isnan(seen.depth) & ~np.isnan(seen.age_s))
    if len(told) < 2:
        return {Check.DEPTH: math.nan, Check.AGE: math.nan}
    first, last = int(told[0]), int(told[-1])
    apart_s = float(seen.at_ns[last] - seen.at_ns[first]) / NS
    if apart_s < span.window_s / 2.0:
        return {Check.DEPTH: math.nan, Check.AGE: math.nan}
    return {
        Check.DEPTH: float(seen.depth[last] - seen.depth[first]) / (apart_s * rate_per_s),
        Check.AGE: float(seen.age_s[last] - seen.age_s[first]) / apart_s,
    }


def _largest(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.max()) if len(known) else math.nan


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """What one check comes to."""

    status: Status
    value: float  # the share seen; nan when nothing told it
    lower: float  # one-sided bounds, each with the error of the look
    upper: float


@dataclasses.dataclass(frozen=True, slots=True)
class RateVerdict:
    """What the trials at one rate prove."""

    status: Status
    invalid: bool  # the generator could not keep up: says nothing about the service
    findings: dict[Check, Finding]
    trials: int


def rate_trials(rate_per_s: float, window_s: float, trials: int) -> int:
    """Return how many trials a rate gets: `trials`, or more where they would hold fewer than REQUESTS_MIN requests."""
    return max(trials, math.ceil(REQUESTS_MIN / (rate_per_s * window_s)))


def judge_rate(windows: Sequence[Window], requirement: RateRequirement, rate_per_s: float, window_s: float,
               trials: int) -> RateVerdict:  # fmt: skip
    """Return what windows at one rate prove; `trials` as for `rate_trials`.

    PASS needs every check to pass, and is wrong no more often than one of them is; FAIL may come from any, so that side
    of each has its share of the error only (`search.together`). After a number of trials that is no look the answer is
    INCONCLUSIVE: looking more often would spend more error.
    """
    planned = looks(rate_trials(rate_per_s, window_s, trials))
    look = next((one for one in planned if one.trials == len(windows)), None)
    findings = {check: _find(check, windows, requirement, rate_per_s * window_s, look, planned[-1]) for check in Check}
    sent, late = (sum(getattr(window, name) for window in windows) for name in ("sent", "late"))
    invalid = late > LATE_SHARE * sent
    status = Status.INCONCLUSIVE if invalid else together(finding.status for finding in findings.values())
    return RateVerdict(status, invalid, findings, len(windows))


def _find(check: Check, windows: Sequence[Window], requirement: RateRequirement, arrivals: float, look: Look | None,
          last: Look) -> Finding:  # fmt: skip
    limit = requirement.limit(check)
    told, bounds = _bounding(check, windows, requirement, arrivals)
    if not told:
        return Finding(Status.NOT_APPLICABLE, math.nan, math.nan, math.nan)
    # Between two looks the level stays open; what it would be at the end is shown.
    alpha_pass = look.alpha_pass if look is not None and look.alpha_pass else last.alpha_pass
    alpha_fail = look.alpha_fail if look is not None else last.alpha_fail
    value, _, upper = bounds(told, alpha_pass * _pass_share(check))
    lower = bounds(told, alpha_fail / len(Check))[1]
    may_pass = look is not None and look.alpha_pass > 0.0 and told >= TRIALS_MIN
    if may_pass and check is Check.LATENCY and _far_below(windows, requirement.latency, alpha_pass):
        upper = min(upper, limit)
    status = Status.INCONCLUSIVE
    if look is not None and told >= TRIALS_MIN and lower > limit:
        status = Status.FAIL
    elif may_pass and upper <= limit:
        status = Status.PASS
    return Finding(status, value, lower, upper)


def _pass_share(check: Check) -> float:
    """Return the share of a PASS's error at which a check is bounded: failures are no matter of overload."""
    return 1.0 if check is Check.ERRORS else SKEWED_SHARE


Bounding = Callable[[int, float], tuple[float, float, float]]  # (trials, alpha) -> value, lower, upper


def _bounding(
    check: Check, windows: Sequence[Window], requirement: RateRequirement, arrivals: float
) -> tuple[int, Bounding]:
    """Return how many trials tell a check's share, and what bounds it were there so many trials like these."""
    if check in GROWTH:
        seen = np.array([window.growth[check] for window in windows])
        seen = seen[~np.isnan(seen)]
        return len(seen), _bounding_growth(seen, 0.0 if check is Check.AGE else 1.0 / arrivals)
    latency = [window.latency for window in windows]
    failed = check is Check.ERRORS
    hits = [np.isinf(each) if failed else requirement.latency.is_slow(each) for each in latency]
    return len(windows), _bounding_share(hits, None if failed else latency, requirement.latency.slow_share)


def _bounding_growth(seen: Floats, resolution: float) -> Bounding:
    """Bound a mean growth by Student's t over trials, whose spread is not below what one request or run makes.

    Growth has a long right tail, which the upper bound pays for by t + g (1 + 2 t^2) / (6 sqrt(n)) in place of t (the
    first term of the Edgeworth series of t, inverted: Johnson 1978, Hall 1983; the lower bound errs to the safe side).
    Where: g is the skew of the trials seen, 0 when it is to the left.
    """
    value = float(seen.mean()) if len(seen) else math.nan
    spread = max(float(seen.std(ddof=1)), resolution) if len(seen) > 1 else math.inf
    skewed = len(seen) > 2 and float(seen.std()) > 0.0
    skew = max(0.0, float(stats.skew(seen, bias=False))) if skewed else 0.0

    def bounds(trials: int, alpha: float) -> tuple[float, float, float]:
        if trials < 2:
            return value, -math.inf, math.inf
        t, error = float(stats.t.ppf(1.0 - alpha, trials - 1)), spread / math.sqrt(trials)
        tail = skew * (1.0 + 2.0 * t * t) / (6.0 * math.sqrt(trials))
        return value, value - t * error, value + (t + tail) * error

    return bounds


def _bounding_share(hits: Sequence[Bools], latency: Sequence[Floats] | None, tail_share: float) -> Bounding:
    """Bound a share of requests by the exact binomial on the independent ones that the trials are worth.

    With `latency` the spread between trials is also measured at its pooled quantile, as `bursts` explains.
    """
    sizes = np.array([len(each) for each in hits], dtype=np.float64)
    counts = np.array([int(each.sum()) for each in hits], dtype=np.float64)
    n = float(sizes.sum())
    share = float(counts.sum()) / n if n else math.nan
    worth = _design_effect(counts, sizes)
    if latency is not None and n:
        threshold = quantile(np.concatenate(latency), 1.0 - tail_share)
        above = np.array([int((each > threshold).sum()) for each in latency], dtype=np.float64)
        worth = max(worth, _design_effect(above, sizes))

    def bounds(trials: int, alpha: float) -> tuple[float, float, float]:
        if not n:
            return share, 0.0, 1.0
        lower, upper, _ = bounds_of_share(share, n * trials / len(hits), worth, trials, alpha)
        return share, lower, upper

    return bounds


def _design_effect(counts: Floats, sizes: Floats) -> float:
    """Return the variance of a pooled share over trials of unequal sizes over that of independent requests.

    Linearised variance of a ratio (Cochran 1977, 6.3); for equal sizes that of `bursts`. 0 where it cannot be seen.
    """
    trials, n = len(sizes), float(sizes.sum())
    share = float(counts.sum()) / n if n else 0.0
    if trials < 2 or share in {0.0, 1.0}:
        return 0.0
    residual = counts - share * sizes
    between = float((residual**2).sum()) * trials / (trials - 1)
    return between / (n * share * (1.0 - share))


def _far_below(windows: Sequence[Window], requirement: Requirement, alpha: float) -> bool:
    """Say whether even the spread between trials, carried on, stays below the limit; as with bursts (see there)."""
    latency = [window.latency for window in windows if len(window.latency)]
    pooled = np.concatenate(latency) if latency else np.empty(0)
    if len(latency) < TRIALS_MIN or bool(requirement.is_slow(pooled).any()):
        return False
    if binomial_bounds(0.0, float(len(pooled)), alpha)[1] > requirement.slow_share:
        return False
    half = requirement.slow_share / 2.0
    tails = np.array([quantile(each, 1.0 - half) for each in latency])
    if tails.min() <= 0.0:
        return False
    logs = np.log(tails)
    top = float(logs.mean() + tolerance_factor(len(logs), alpha, 1.0 - half) * logs.std(ddof=1))
    return top < math.log(requirement.limit_ms)


def more_windows(windows: Sequence[Window], requirement: RateRequirement, rate_per_s: float, window_s: float,
                 trials: int) -> int | None:  # fmt: skip
    """Return how many more trials like these would settle every open check; None when no number would."""
    verdict = judge_rate(windows, requirement, rate_per_s, window_s, trials)
    last = looks(rate_trials(rate_per_s, window_s, trials))[-1]
    most = 0
    for check, finding in verdict.findings.items():
        if finding.status is not Status.INCONCLUSIVE:
            continue
        told, bounds = _bounding(check, windows, requirement, rate_per_s * window_s)
        limit, alpha_pass = requirement.limit(check), last.alpha_pass * _pass_share(check)

        def settled(n: int, bounds: Bounding = bounds, limit: float = limit, alpha_pass: float = alpha_pass) -> bool:
            passes = bounds(n, alpha_pass)[2] <= limit
            return passes or bounds(n, last.alpha_fail / len(Check))[1] > limit or n > MORE_TRIALS_MAX

        most = max(most, smallest(settled, told + 1) - told)
    return most if 0 < most <= MORE_TRIALS_MAX else None


def served_per_s(windows: Sequence[Window]) -> tuple[float, float]:
    """Return the good answers per second over trials, and their one-sided 95 % lower bound (Student's t)."""
    seen = np.array([window.served_per_s for window in windows])
    half = float(stats.t.ppf(1.0 - 2.0 * ALPHA, len(seen) - 1)) * float(seen.std(ddof=1)) / math.sqrt(len(seen))
    return float(seen.mean()), float(seen.mean()) - half
